"""`python -m tools.chat target=...`: talk to a run, an export, a Hugging Face directory or a URL.

Answers are shown as they come. With `prompt="..."` it prints one answer and ends, for scripts; otherwise it reads
messages line by line, remembers the conversation, and ends with the input. /reset forgets it; Ctrl-C cuts an answer.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import Quote, QuotedString

from conf import entry
from conf.errors import Problem
from conf.registry import register
from tools import api_key
from tools.speaker import Embedded, Messages, Remote, Speaker
from train.generate import GenerationError, Sampling

MODES = ("auto", "chat", "complete")
FREE_TEXT = ("prompt", "system")
RESET, EXIT = "/reset", "/exit"


@register("", "chat_schema")
@dataclass(frozen=True)
class ChatConfig:
    """Talk to a model.

    Args:
        target: a run, an export, a Hugging Face directory, or the URL of a server that speaks the OpenAI protocol.
        prompt: one message to answer; empty reads messages from the terminal or standard input.
        system: instructions at the head of the conversation.
        mode: "chat", "complete" (continue the text), or "auto": chat where the model learned to.
        max_tokens: most tokens of an answer.
        temperature: 0 takes the likeliest token; higher is more varied.
        top_p: keep the likeliest tokens that together reach this probability; 1 keeps all.
        top_k: keep this many of the likeliest tokens; 0 keeps all.
        stop: texts that end an answer, besides the model's own.
        seed: of the draws.
        name: of the model on a server that offers several; empty takes the first.
        key_file: file with the API key of a server, where LONGRUN_API_KEY is not set.
    """

    target: str = "runs/demo/export"
    prompt: str = ""
    system: str = ""
    mode: str = "auto"
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)
    seed: int = 0
    name: str = ""
    key_file: str = ""

    def problems(self) -> list[Problem]:
        """Values outside their range."""
        return [] if self.mode in MODES else [Problem("mode", self.mode, f"one of {', '.join(MODES)}")]

    def sampling(self) -> Sampling:
        """Raises GenerationError for settings out of range."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.top_k, tuple(self.stop), self.seed)

    def speaker(self) -> Speaker:
        """Whoever answers at `target`.

        Raises:
            LongrunError: there is no model there, or no server answers.
        """
        if not self.target.startswith(("http://", "https://")):
            return Embedded(self.target, self.mode)
        key = api_key.from_environment() or (api_key.read(self.key_file) if self.key_file else None)
        return Remote(self.target, key, self.mode != "complete", self.name)


class Conversation:
    """What was said so far.

    Args:
        speaker: who answers.
        sampling: how.
        system: instructions at its head; empty for none.
    """

    def __init__(self, speaker: Speaker, sampling: Sampling, system: str):
        self.speaker, self.sampling = speaker, sampling
        self.head: Messages = [{"role": "system", "content": system}] if system else []
        self.messages: Messages = list(self.head)

    def reset(self) -> None:
        self.messages = list(self.head)

    def say(self, text: str) -> None:
        """Print the answer to `text` as it comes, and remember both. Ctrl-C keeps what had come.

        Raises:
            LongrunError: there is no answer; the conversation is as it was before.
        """
        asked: Messages = [*self.messages, {"role": "user", "content": text}]
        pieces: list[str] = []
        try:
            for piece in self.speaker.answer(asked, self.sampling):
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [cut]", end="")
        finally:
            print(flush=True)
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]


def talk(conversation: Conversation) -> None:
    """Read messages until the input ends."""
    person = sys.stdin.isatty()
    if person:
        import readline  # noqa: F401  gives input() its line editing and history

        how = "It answers." if conversation.speaker.chats else "It continues your text."
        print(f"{conversation.speaker.name}. {how} {RESET} starts anew, {EXIT} or Ctrl-D ends.")
    while True:
        try:
            text = input("> " if person else "")
        except (EOFError, KeyboardInterrupt):
            return
        if text.strip() == EXIT:
            return
        if text.strip() == RESET:
            conversation.reset()
        elif text.strip():
            try:
                conversation.say(text)
            except GenerationError as error:
                print(f"{error} {RESET} starts anew.", file=sys.stderr)


def main(config: ChatConfig, resolved: dict[str, Any]) -> int:
    sampling = config.sampling()
    conversation = Conversation(config.speaker(), sampling, config.system)
    if config.prompt:
        conversation.say(config.prompt)
    else:
        talk(conversation)
    return 0


def quoted(arguments: Sequence[str], free_text: Sequence[str] = FREE_TEXT) -> list[str]:
    """Command-line arguments in which free text is safe from Hydra, to which commas, braces and ${} mean something."""
    safe = []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key in free_text and equals:
            # A backslash keeps OmegaConf from resolving `${`; those that stand before it must then be doubled.
            text = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
            argument = f"{key}={QuotedString(text, Quote.single).with_quotes()}"
        safe.append(argument)
    return safe


if __name__ == "__main__":
    sys.argv[1:] = quoted(sys.argv[1:])
    entry.run("chat", ChatConfig, main)
