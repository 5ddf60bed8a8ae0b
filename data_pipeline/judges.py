"""Whoever grades: a server that speaks the OpenAI protocol, or a model in a directory."""

import http.client
import json
import os
import time
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from conf.errors import LongrunError
from data_pipeline.artifact import sha256_of

KEY_VARIABLE = "LONGRUN_API_KEY"
"""Environment variable with the key of a server; tools.chat reads the same."""
LONGEST_REPLY = 2**20
"""Bytes of a server's answer that are read."""
REFUSED = (http.client.UNAUTHORIZED, http.client.FORBIDDEN, http.client.NOT_FOUND)
"""What a server answers alike to every question."""
PASSING = (http.client.REQUEST_TIMEOUT, http.client.TOO_MANY_REQUESTS)
"""What it may answer otherwise a moment later, beside errors of its own."""
PAUSE_S = 0.5
"""Before a second attempt, in seconds; doubled for each further one."""


class JudgeError(LongrunError):
    """The judge cannot be asked, or fails on too many records."""


class ReplyError(Exception):
    """One reply could not be had or holds no grade."""


class Judge(Protocol):
    """Whoever replies."""

    @property
    def identity(self) -> Any:
        """What decides the replies, as JSON."""

    def reply(self, request: str) -> str:
        """Raises ReplyError where there is none."""


def model_directory(target: str) -> Path:
    """The Hugging Face directory of a run, an export, or one that is given as such."""
    inner = Path(target) / "model"
    return inner if inner.is_dir() else Path(target)


class Server:
    """A server at a URL, by `/v1/chat/completions`, at temperature 0.

    Args:
        url: scheme, host and port; a trailing /v1 may be there.
        name: the model to ask for; empty takes the first that the server offers.
        max_tokens: of a reply.
        timeout_s: seconds for a reply.
        attempts: how often a request is made that fails for reasons that may pass.

    Raises:
        JudgeError: it cannot be reached, refuses, or offers no model.
    """

    def __init__(self, url: str, name: str, max_tokens: int, timeout_s: float, attempts: int):
        self.url = url.rstrip("/").removesuffix("/v1")
        self.max_tokens, self.timeout_s, self.attempts = max_tokens, timeout_s, attempts
        self.name = name or self._first()

    @property
    def identity(self) -> Any:
        return [self.url, self.name]

    def reply(self, request: str) -> str:
        """Raises JudgeError where the server refuses whatever it is asked, ReplyError where it fails."""
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": request}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }
        answer = self._asked("POST", "/v1/chat/completions", body)
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise ReplyError(f"an answer without choices[0].message.content: {str(answer)[:100]}") from error
        if not isinstance(content, str):
            raise ReplyError(f"content is {type(content).__name__}; expected text")
        return content

    def _first(self) -> str:
        try:
            return str(self._asked("GET", "/v1/models", None)["data"][0]["id"])
        except (ReplyError, KeyError, IndexError, TypeError) as error:
            raise JudgeError(
                f"{self.url} does not say which model it has ({error}). Is the server running? Give corpus.judge.name."
            ) from error

    def _asked(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of an answer, after as many attempts as it takes."""
        fault = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(PAUSE_S * 2 ** (attempt - 1))
            try:
                status, text = self._once(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                fault = f"{type(error).__name__}: {error}"
                continue
            if status == http.client.OK:
                try:
                    return json.loads(text)
                except (ValueError, RecursionError) as error:
                    raise ReplyError(f"an answer that is not JSON: {text[:100]!r}") from error
            if status in REFUSED:
                raise JudgeError(
                    f"{self.url}{path} answers {status}: {text[:200]!r}. Check corpus.judge.target, corpus.judge.name "
                    f"and the key in {KEY_VARIABLE}."
                )
            fault = f"the server answers {status}: {text[:100]!r}"
            if status < http.client.INTERNAL_SERVER_ERROR and status not in PASSING:
                break
        raise ReplyError(fault)

    def _once(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, str]:
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY_VARIABLE, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        connection = kind(parts.netloc, timeout=self.timeout_s)
        try:
            connection.request(method, parts.path + path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            return response.status, response.read(LONGEST_REPLY).decode(errors="replace")
        finally:
            connection.close()


class Local:
    """A model in this process, by transformers, taking the likeliest token every time.

    Args:
        directory: Hugging Face directory.
        max_tokens: of a reply.
    """

    def __init__(self, directory: Path, max_tokens: int):
        self.directory, self.max_tokens = directory, max_tokens

    @cached_property
    def identity(self) -> Any:
        files = [*self.directory.glob("*.safetensors"), *self.directory.glob("*.json"), *self.directory.glob("*.jinja")]
        return [[file.name, sha256_of(file)] for file in sorted(files)]

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.directory, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                self.directory, local_files_only=True, trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise JudgeError(f"{self.directory} holds no model that can grade: {error}") from error
        return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def reply(self, request: str) -> str:
        """Raises JudgeError where there is no model, ReplyError for what is longer than it reads."""
        import torch

        tokenizer, model = self._loaded
        if tokenizer.chat_template:
            asked = [{"role": "user", "content": request}]
            ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
        else:
            ids = tokenizer(request)["input_ids"]
        longest = getattr(model.config, "max_position_embeddings", len(ids) + self.max_tokens)
        if len(ids) + self.max_tokens > longest:
            raise ReplyError(f"{len(ids)} tokens to read and {self.max_tokens} to reply; the model has {longest}")
        tokens = torch.tensor([ids], device=model.device)
        with torch.inference_mode():
            made = model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=self.max_tokens, do_sample=False
            )
        return str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
