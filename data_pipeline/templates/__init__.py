"""Chat templates of our own writing, by name: each marks with `{% generation %}` what the assistant says, and shows the
declared tools and the calls. `docs/post_training_data.md` says how each renders them.

transformers, and what renders through it, takes the marks away.
"""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import LongrunError, Problem

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer

log = logging.getLogger(__name__)

DIRECTORY = Path(__file__).parent
NAMES = tuple(sorted(file.stem for file in DIRECTORY.glob("*.jinja")))


class TemplateError(LongrunError):
    """A chat template is missing, fails on a conversation, or does not let the assistant's words be told apart."""


def template(name: str) -> str:
    """Jinja source of a template.

    Args:
        name: one of `NAMES`.
    """
    return (DIRECTORY / f"{name}.jinja").read_text(encoding="utf-8")


def special_tokens(name: str) -> list[str]:
    """Tokens, such as `<|im_end|>`, that a tokenizer must have so that a template's marks are one token each."""
    return sorted(set(re.findall(r"<\|\w+\|>", template(name))))


def template_problems(key: str, name: str) -> list[Problem]:
    """What is wrong with a setting that names a template; empty is none of ours."""
    if not name or name in NAMES:
        return []
    return [Problem(key, name, f"one of {', '.join(NAMES)}, or empty for the tokenizer's own")]


def with_template(tokenizer: "Tokenizer", name: str) -> "Tokenizer":
    """The same tokenizer with another chat template.

    Args:
        tokenizer: must know the template's special tokens.
        name: one of `NAMES`; empty keeps the tokenizer's own.

    Raises:
        TemplateError: the tokenizer lacks a special token of the template, so that nothing would end a turn.
    """
    from data_pipeline.tokenizer import Tokenizer

    if not name:
        return tokenizer
    known = {token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.special}
    if missing := [token for token in special_tokens(name) if token not in known]:
        fitting = [other for other in NAMES if known.issuperset(special_tokens(other))]
        raise TemplateError(
            f"chat_template={name} needs special tokens that {tokenizer.source} lacks: {', '.join(missing)}. "
            f"Take {' or '.join(fitting)}, or a tokenizer that has them."
        )
    chosen = Tokenizer(tokenizer.backend, tokenizer.config, template(name), tokenizer.source)
    if not _parts_at_the_answer(chosen):
        log.warning(
            "chat_template=%s: %s joins the white space that ends a prompt differently once an answer follows, so that "
            "the model is asked in tokens that it was not trained on. Take another template.",
            name,
            tokenizer.source,
        )
    return chosen


def _parts_at_the_answer(tokenizer: "Tokenizer") -> bool:
    """Whether the tokens of a prompt are the first of those of prompt and answer."""
    from data_pipeline import chat

    asked = [{"role": "user", "content": "Which number?"}]
    opening = chat.prompt(tokenizer, asked)
    whole = tokenizer.encode(chat.render(tokenizer, [*asked, {"role": "assistant", "content": "The answer is 7."}]))
    return whole[: len(opening)] == opening
