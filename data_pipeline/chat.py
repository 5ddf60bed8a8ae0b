"""Conversations: a chat template turns messages into tokens, of which only the assistant's are learned.

Rendering is transformers' own, so the ids are those that a serving engine makes of the same messages. What the
assistant says is found in either of two ways: the template marks it with `{% generation %}`, or the conversation is
rendered up to each assistant turn, with the generation prompt, and from there to the end of the turn.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import fingerprint, sha256_of
from data_pipeline.batch import IGNORED
from data_pipeline.packing import Packed
from data_pipeline.records import EmptySetError, message_faults, read_records, without_assistant
from data_pipeline.templates import TemplateError, template, template_problems, with_template
from data_pipeline.tool_calls import exchange_faults, tool_faults

if TYPE_CHECKING:
    from tokenizers import Encoding

    from data_pipeline.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Message = dict[str, Any]
"""{"role": "system" | "user" | "assistant" | "tool", "content": text}; calls of tools as in `tool_calls.py`. As in
OpenAI's protocol, of an assistant turn with "weight": 0 nothing is learned."""
Tools = Sequence[dict[str, Any]]

CHATML = template("chatml")
"""The default chat template, written into our own tokenizers."""


@dataclass(frozen=True)
class Conversation:
    """One conversation as tokens.

    Args:
        tokens: ids of the whole rendered conversation.
        learned: for each token, whether the assistant says it (content and end of turn).
    """

    tokens: list[int]
    learned: list[bool]

    def inputs_and_labels(self, limit: int) -> tuple[list[int], list[int]]:
        """Input tokens and the token each predicts, -100 where that is not the assistant's.

        What follows the last label changes no loss and is left out.

        Args:
            limit: most input tokens; later ones are cut.

        Returns:
            Two lists of the same length; empty when no label is left.
        """
        labels = [token if learned else IGNORED for token, learned in zip(self.tokens, self.learned, strict=True)]
        labels = labels[1 : limit + 1]
        while labels and labels[-1] == IGNORED:
            labels.pop()
        return self.tokens[: len(labels)], labels


def render(
    tokenizer: "Tokenizer", messages: Sequence[Message], tools: Tools | None = None, *, generation_prompt: bool = False
) -> str:
    """The conversation as text.

    Args:
        tokenizer: whose template is used.
        messages: the turns.
        tools: that the assistant may call.
        generation_prompt: end with the opening of an assistant turn.

    Raises:
        TemplateError: the tokenizer has no template, or the template fails on these messages.
    """
    return _render(tokenizer, messages, tools, generation_prompt=generation_prompt, marked=False)[0]


def prompt(tokenizer: "Tokenizer", messages: Sequence[Message], tools: Tools | None = None) -> list[int]:
    """Tokens after which the assistant's answer begins."""
    return tokenizer.encode(render(tokenizer, messages, tools, generation_prompt=True))


def encode(
    tokenizer: "Tokenizer", messages: Sequence[Message], first: int = 0, tools: Tools | None = None
) -> Conversation:
    """Tokens of a conversation, and which of them the assistant says.

    Args:
        tokenizer: whose template is used.
        messages: the turns.
        first: assistant turns before this message are context: nothing of them is learned.
        tools: that the assistant may call.

    Raises:
        TemplateError: see `render`; or the template rewrites earlier turns, so that what the assistant says cannot be
            found.
    """
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.chat_template or "") is not None
    text, spans = _render(tokenizer, messages, tools, generation_prompt=False, marked=marked)
    said = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not marked:
        spans = [_span(tokenizer, text, messages, tools, i) for i in said]
    elif len(spans) != len(said):
        raise _template_error(
            tokenizer,
            f"marks {len(spans)} generations in a conversation of {len(said)} assistant turns. "
            "Put {% generation %} around the content and the end of turn of every assistant message.",
        )
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    tokens = encoding.ids
    learned = [False] * len(tokens)
    for i, (start, end) in zip(said, spans, strict=True):
        if i >= first and messages[i].get("weight", 1) != 0:
            if marked:
                begin, stop = _covered(encoding, start, end)
            else:
                begin, stop = (_common_prefix(tokens, tokenizer.encode(text[:bound])) for bound in (start, end))
                stop = _end_of_turn(tokenizer, tokens, begin, stop)
            learned[begin:stop] = [True] * (stop - begin)
    return Conversation(tokens, learned)


def _render(
    tokenizer: "Tokenizer", messages: Sequence[Message], tools: Tools | None, *, generation_prompt: bool, marked: bool
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2.exceptions import TemplateError as JinjaError
    from transformers.utils.chat_template_utils import render_jinja_template

    if not tokenizer.chat_template:
        raise _template_error(tokenizer, "is missing. Put a chat_template.jinja beside tokenizer.json.")
    try:
        rendered: Any = render_jinja_template(
            conversations=[list(messages)],
            tools=list(tools) if tools else None,
            chat_template=tokenizer.chat_template,
            add_generation_prompt=generation_prompt,
            return_assistant_tokens_mask=marked,
            **tokenizer.special_tokens,
        )
    except (JinjaError, TypeError, ValueError) as error:  # the latter of a template that adds text to what is none
        roles = ", ".join(message["role"] for message in messages)
        raise _template_error(tokenizer, f"fails on a conversation of [{roles}]: {error}.") from error
    texts, spans = rendered
    return texts[0], list(spans[0]) if marked else []


def _span(
    tokenizer: "Tokenizer", text: str, messages: Sequence[Message], tools: Tools | None, i: int
) -> tuple[int, int]:
    """Where in `text` assistant message i stands, by rendering what comes before it and what comes up to its end."""
    before = render(tokenizer, messages[:i], tools, generation_prompt=True)
    upto = render(tokenizer, messages[: i + 1], tools)
    if not (text.startswith(upto) and upto.startswith(before)):
        raise _template_error(
            tokenizer,
            f"renders message {i} of {len(messages)} differently once others follow, or without its generation prompt, "
            "so what the assistant says cannot be told apart. Put {% generation %} ... {% endgeneration %} around it "
            "in chat_template.jinja, or train on conversations of one assistant turn.",
        )
    return len(before), len(upto)


def _template_error(tokenizer: "Tokenizer", what: str) -> TemplateError:
    template = tokenizer.chat_template or ""
    excerpt = f" ({template[:60]!r}...)" if template else ""
    return TemplateError(f"The chat template of {tokenizer.source}{excerpt} {what}")


def _covered(encoding: "Encoding", start: int, end: int) -> tuple[int, int]:
    """The tokens that a span of text has a part in, as transformers counts them."""
    inside = [token for token in map(encoding.char_to_token, range(start, end)) if token is not None]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def _common_prefix(tokens: list[int], others: list[int]) -> int:
    """Number of leading tokens that agree. A token across a boundary of text belongs to what comes after it."""
    for i, (a, b) in enumerate(zip(tokens, others, strict=False)):
        if a != b:
            return i
    return min(len(tokens), len(others))


def _end_of_turn(tokenizer: "Tokenizer", tokens: list[int], begin: int, stop: int) -> int:
    """Leave out the white space that a template puts after the end-of-turn token: nobody generates it."""
    special = next((i for i in reversed(range(begin, stop)) if tokens[i] in tokenizer.special_ids), None)
    if special is not None and not tokenizer.decode(tokens[special + 1 : stop]).strip():
        return special + 1
    return stop


def chat_faults(record: Any) -> list[str]:
    """What keeps a record from being {"messages": [...]} with something for the assistant to learn."""
    if not isinstance(record, dict):
        return [f'a {type(record).__name__}; expected an object {{"messages": [...]}}']
    faults = message_faults(record.get("messages"), "messages") + declared_faults(record)
    if not faults:
        faults += exchange_faults(record["messages"], record.get("tools"))
        if without_assistant(record["messages"]):
            roles = ", ".join(message["role"] for message in record["messages"])
            faults.append(f"no assistant turn among [{roles}]; expected at least one, to be learned")
        elif all(message.get("weight", 1) == 0 for message in record["messages"] if message["role"] == "assistant"):
            faults.append("no assistant turn of a weight other than 0; expected at least one, to be learned")
    return faults


def declared_faults(record: dict[str, Any]) -> list[str]:
    """What is wrong with the tools that a record declares; it need not declare any."""
    return tool_faults(record["tools"]) if "tools" in record else []


OVERLONG = ("truncate", "drop")


def record_problems(path: str, sequence_length: int, overlong: str, chat_template: str) -> list[Problem]:
    """What is wrong with the settings that chat and preference data share."""
    problems = template_problems("data.chat_template", chat_template)
    if not path:
        problems.append(Problem("data.path", "", "the directory of a chat artifact, for instance runs/demo/tasks"))
    if sequence_length < 2:
        problems.append(Problem("data.sequence_length", sequence_length, "at least 2 tokens"))
    if overlong not in OVERLONG:
        problems.append(Problem("data.overlong", overlong, f"one of {', '.join(OVERLONG)}"))
    return problems


@register("data", "chat")
@dataclass(frozen=True)
class ChatData:
    """Conversations, packed into windows; the loss is on what the assistant says.

    Args:
        path: directory with {train,validation,test}.jsonl of {"messages": [{"role", "content"}, ...]}.
        sequence_length: tokens per window.
        overlong: what happens to a conversation longer than a window: "truncate" cuts its end, "drop" leaves it out.
        chat_template: one of ours (chatml, llama3, plain, qwen), kept with the model from then on; empty for the
            tokenizer's own.
    """

    path: str = ""
    sequence_length: int = 512
    overlong: str = "truncate"
    chat_template: str = ""

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        return record_problems(self.path, self.sequence_length, self.overlong, self.chat_template)

    def open(self, split: str, tokenizer: "Tokenizer", seed: int) -> Packed:
        """Read, check, encode and pack one split: a pure function of the file, the tokenizer and the seed.

        Raises:
            RecordError: lists every record of a wrong shape.
            EmptySetError: no conversation is left.
            TemplateError: see `encode`.
        """
        file = Path(self.path) / f"{split}.jsonl"
        tokenizer = with_template(tokenizer, self.chat_template)
        records = read_records(self.path, split, chat_faults)
        conversations = [encode(tokenizer, record["messages"], tools=record.get("tools")) for record in records]
        samples = self.fitting(conversations, str(file))
        made_with = [tokenizer.fingerprint, tokenizer.chat_template]
        parts = ["chat", sha256_of(file), *made_with, self.sequence_length, self.overlong, seed]
        name = fingerprint(parts)
        return Packed(list(samples.values()), self.sequence_length, seed, tokenizer.pad, name, str(file), list(samples))

    def fitting(self, conversations: Sequence[Conversation], source: str) -> dict[int, tuple[list[int], list[int]]]:
        """Input tokens and labels of the conversations by their number, each within `sequence_length`.

        Args:
            conversations: each has something learned.
            source: where they come from, for messages.

        Raises:
            EmptySetError: nothing is learned in some conversation, or none is left.
        """
        silent = [i + 1 for i, conversation in enumerate(conversations) if not any(conversation.learned)]
        if silent:
            raise EmptySetError(
                f"{source}: {len(silent)} conversations have no token to learn, the first in line {silent[0]}: the "
                "chat template renders nothing of what the assistant says. Mend its {% generation %} marks."
            )
        samples, cut, dropped = {}, 0, 0
        for number, conversation in enumerate(conversations):
            tokens, labels = conversation.inputs_and_labels(len(conversation.tokens))
            if len(labels) > self.sequence_length:
                limit = self.sequence_length if self.overlong == "truncate" else 0
                tokens, labels = conversation.inputs_and_labels(limit)
                cut, dropped = cut + bool(labels), dropped + (not labels)
            if labels:
                samples[number] = tokens, labels
        counts = f"of {len(conversations)} conversations {cut} were cut to data.sequence_length={self.sequence_length}"
        if not samples:
            raise EmptySetError(f"{source}: {counts} and {dropped} dropped; none is left. Make it larger.")
        if cut or dropped:
            log.warning("%s: %s and %d dropped", source, counts, dropped)
        return samples
