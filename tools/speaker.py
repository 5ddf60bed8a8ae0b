"""Who answers in a chat: a model in this process, or a server that speaks the OpenAI protocol.

Shape suffixes: none; conversations are lists of messages.
"""

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from conf.errors import LongrunError
from tools.api_key import VARIABLE, ApiKey

if TYPE_CHECKING:
    from train.generate import Sampling

Messages = list[dict[str, str]]
TIMEOUT_S = 300.0


class ChatError(LongrunError):
    """The other side cannot be reached, refuses, or breaks off."""


class Speaker(Protocol):
    """Answers conversations, piece by piece."""

    name: str
    chats: bool
    """Whether it answers conversations; else it continues the text of the last message."""

    def answer(self, messages: Messages, sampling: "Sampling") -> Iterator[str]: ...


class Embedded:
    """A model in this process, by the built-in generator.

    Args:
        target: a run, an export, or a Hugging Face directory.
        mode: "chat" uses the chat template, "complete" continues text; "auto" is "complete" for a model that never
            saw a conversation (a pre-training run, or one without a chat template).
    """

    def __init__(self, target: str, mode: str):
        from dataclasses import replace

        import torch

        from data_pipeline.artifact import MANIFEST, Artifact
        from data_pipeline.tokenizer import Tokenizer
        from train.export.source import end_ids
        from train.generate import Generator
        from train.models import hf, hf_weights

        directory = hf.model_directory(target)
        kind = Artifact.read(target).kind if (Path(target) / MANIFEST).exists() else "model"
        tokenizer = Tokenizer.load(directory)
        config = replace(hf.read_config(directory), attention="sdpa")
        where = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        model = hf_weights.decoder(directory, config, *where)
        self.name = f"{kind} {target}"
        self.chats = mode == "chat" or (mode == "auto" and tokenizer.chat_template is not None and kind != "pretrain")
        self.ends = tuple(tokenizer.decode([end], skip_special=False) for end in end_ids(directory, tokenizer))
        self.tokenizer = tokenizer
        self.generator = Generator(model.eval(), tokenizer)

    def answer(self, messages: Messages, sampling: "Sampling") -> Iterator[str]:
        """Raises GenerationError where the conversation is longer than the model takes."""
        from dataclasses import replace

        from data_pipeline import chat

        if self.chats:
            prompt = chat.prompt(self.tokenizer, messages)
            sampling = replace(sampling, stop=(*sampling.stop, *self.ends))
        else:
            prompt = self.tokenizer.encode(messages[-1]["content"])
        return self.generator.stream(prompt, sampling)


@dataclass
class Remote:
    """A server at a URL: `/v1/chat/completions` (or `/v1/completions`) as server-sent events.

    Args:
        url: scheme, host and port; a trailing /v1 may be there.
        key: sent as a bearer token; None sends none.
        chats: talk, or else continue text.
        name: the model to ask for; empty takes the first that the server offers.
    """

    url: str
    key: ApiKey | None
    chats: bool = True
    name: str = ""

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1")
        if not self.name:
            with self._request("GET", "/v1/models") as response:
                offered = json.loads(response.read()).get("data", [])
            if not offered:
                raise ChatError(f"{self.url} offers no model; give it with name=NAME.")
            self.name = offered[0]["id"]

    def answer(self, messages: Messages, sampling: "Sampling") -> Iterator[str]:
        """Raises ChatError where the server refuses or breaks off."""
        body: dict[str, Any] = {
            "model": self.name,
            "stream": True,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed,
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.top_k:  # no part of OpenAI's protocol, but vLLM and others know it
            body["top_k"] = sampling.top_k
        body |= {"messages": messages} if self.chats else {"prompt": messages[-1]["content"]}
        with self._request("POST", "/v1/chat/completions" if self.chats else "/v1/completions", body) as response:
            yield from self._events(response)

    def _events(self, response: http.client.HTTPResponse) -> Iterator[str]:
        for line in response:
            field, _, data = line.decode().partition(":")
            if field != "data":  # an empty line between events, or a comment
                continue
            if data.strip() == "[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ChatError(f"{self.url} broke off: {event['error'].get('message', event['error'])}")
            for choice in event.get("choices", []):
                if piece := choice["delta"].get("content") if "delta" in choice else choice.get("text"):
                    yield piece
        raise ChatError(f"{self.url} closed the connection in the middle of an answer; look at the server's log.")

    @contextmanager
    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream, application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key.value}"
        connection = kind(parts.netloc, timeout=TIMEOUT_S)
        try:
            connection.request(method, parts.path + path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise ChatError(self._refusal(response))
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise ChatError(
                f"{self.url} cannot be reached ({error}). Is the server running? `make serve` starts one."
            ) from error
        finally:
            connection.close()

    def _refusal(self, response: http.client.HTTPResponse) -> str:
        if response.status == http.client.UNAUTHORIZED:
            sent = "the API key that was sent" if self.key else "a request without an API key"
            return f"{self.url} refuses {sent} (401). Set {VARIABLE}, or key_file=FILE with the key the server made."
        text = response.read(4096).decode(errors="replace")
        try:
            content = json.loads(text)
            text = content["error"]["message"]
        except (json.JSONDecodeError, KeyError, TypeError):
            pass  # not in OpenAI's form: show it as it is
        return f"{self.url} answers {response.status} {response.reason}: {text.strip()[:500]}"
