"""{"prompt"?, "chosen", "rejected"}: two answers to one prompt, which may each hold the whole conversation.

Texts, messages, or the transcripts of hh-rlhf (Bai et al. 2022, arXiv:2204.05862), in which turns begin with
"\\n\\nHuman:" and "\\n\\nAssistant:".
"""

import re
from itertools import takewhile
from typing import Any

from data_pipeline.formats.base import (
    PREFERENCE,
    Converted,
    Format,
    Record,
    offered,
    others,
    says,
    text,
    tools,
    turns,
)

SPEAKERS = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"\n\n(Human|Assistant):")


@offered("preference")
class Preference(Format):
    """Where no prompt is given, it is what the two conversations share."""

    keys = ("chosen", "rejected")

    def convert(self, record: Record, faults: list[str]) -> list[Converted]:
        head = [says("system", text(record, "system", faults))] if record.get("system") else []
        sides = {side: _turns(record[side], side, "assistant", faults) for side in ("chosen", "rejected")}
        prompt: list[Record] = []
        if record.get("prompt") is not None:
            prompt = _turns(record["prompt"], "prompt", "user", faults)
            repeated = len(prompt) if all(said[: len(prompt)] == prompt for said in sides.values()) else 0
        else:
            repeated = _shared(*sides.values())
            prompt = sides["chosen"][:repeated]
            if not prompt:
                faults.append("chosen and rejected share no turn and there is no prompt; expected either")
        for side, said in sides.items():
            if said[repeated:] and said[repeated]["role"] in ("user", "system"):
                faults.append(
                    f"{side} goes on with a turn of the {said[repeated]['role']} where it parts from the prompt; "
                    "expected the same conversation on both sides, up to an answer of the assistant"
                )
        answers = {side: said[repeated:] for side, said in sides.items()}
        left = others(record, "system")
        return [Converted(PREFERENCE, {"prompt": head + prompt, **answers, **tools(record, faults), **left})]


def _shared(chosen: list[Record], rejected: list[Record]) -> int:
    """Turns at the head of two conversations that are the same, the last turn of either left out."""
    pairs = zip(chosen[:-1], rejected[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _turns(value: Any, where: str, role: str, faults: list[str]) -> list[Record]:
    """Messages, one text, or a transcript."""
    if not (isinstance(value, str) and TURN.match(value)):
        return turns(value, where, role, faults)
    _, *parts = TURN.split(value)
    said = [says(SPEAKERS[name], content.strip()) for name, content in zip(parts[::2], parts[1::2], strict=True)]
    # A transcript that is a prompt ends with the opening of the answer.
    return said[:-1] if where == "prompt" and said[-1] == says("assistant", "") else said
