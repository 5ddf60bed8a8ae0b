"""What of an example counts when prompts and answers are compared."""

import unicodedata
from itertools import dropwhile, takewhile
from typing import Any


def normalised(text: str) -> str:
    """A text without what a person would not call a difference: Unicode forms (NFKC), case, white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def said(record: dict[str, Any]) -> list[dict[str, Any]]:
    """All messages of an example up to its answers."""
    return record["messages"] if "messages" in record else record["prompt"]


def opening(record: dict[str, Any]) -> str:
    """The prompt that an example is about, normalised: what the user says before anyone answers.

    System turns do not count: one question under two of them is one question. A conversation's later questions follow
    from the first. Without a user turn it is all that is said.
    """
    asked = dropwhile(lambda message: message["role"] != "user", said(record))
    first = [message["content"] for message in takewhile(lambda message: message["role"] == "user", asked)]
    return normalised("\n".join(first or [message["content"] for message in said(record)]))
