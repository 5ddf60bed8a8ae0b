"""Secrets: what one looks like. None is in a configuration, and none of the environment is printed.

What a run is given on its command line or in YAML is written to disk, to logs and to trackers. A secret belongs in an
environment variable or in a file that only its owner reads.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TextIO
from urllib.parse import unquote

from conf.errors import ConfigError, Problem

KEY_BLOCK = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
TOKENS = {
    # how every key of a service begins: how it goes on
    "AKIA": r"[A-Z2-7]{16}",  # AWS
    "ASIA": r"[A-Z2-7]{16}",
    "ghp_": r"[A-Za-z0-9]{36,255}+",  # GitHub
    "gho_": r"[A-Za-z0-9]{36,255}+",
    "ghu_": r"[A-Za-z0-9]{36,255}+",
    "ghs_": r"[A-Za-z0-9]{36,255}+",
    "ghr_": r"[A-Za-z0-9]{36,255}+",
    "github_pat_": r"\w{22,255}+",
    "glpat-": r"[\w-]{20,64}+",  # GitLab
    "xox": r"[abeoprs]-[A-Za-z0-9-]{10,250}+",  # Slack
    "AIza": r"[\w-]{35}",  # Google
    "sk_live_": r"[A-Za-z0-9]{16,247}+",  # Stripe
    "rk_live_": r"[A-Za-z0-9]{16,247}+",
    "sk-": r"(?:(?:proj|svcacct|ant)-[\w-]{20,250}+|[A-Za-z0-9]{48})",  # OpenAI, Anthropic
    "hf_": r"[A-Za-z]{34}",  # Hugging Face
    "npm_": r"[A-Za-z0-9]{36}",
    "pypi-AgE": r"[\w-]{50,250}+",
    "SG.": r"[\w-]{22}\.[\w-]{43}",  # SendGrid
    "eyJ": r"[\w-]{10,1000}+\.eyJ[\w-]{10,4000}+\.[\w-]{16,1000}+",  # JSON web tokens (RFC 7519)
}
TOKEN_PATTERNS = {
    begin: re.compile(rf"{re.escape(begin)}(?<![\w-]{re.escape(begin)}){rest}(?![\w-])")
    for begin, rest in TOKENS.items()
}
WEBHOOK = re.compile(
    r"https://(?:hooks\.slack\.com/(?:services|workflows|triggers)|[\w.]*discord(?:app)?\.com/api/webhooks"
    r"|[\w-]+\.webhook\.office\.com)/[\w/-]{8}"
)
"""Who knows the address may write there."""
URL_PASSWORD = re.compile(r"://[^\s/:@\"'<>]{0,64}:([^\s/:@\"'<>]{3,128})@")
WORDS = {
    *("password", "passwd", "passphrase", "pwd", "secret", "secrets", "credential", "credentials", "apikey"),
    *("authorization", "authtoken", "accesstoken", "webhook"),
}
"""A key with one of these words in its name holds a secret."""
KEYS = {"api", "access", "account", "private", "auth", "secret", "signing", "encryption", "client", "ssh"}
TOKENS_OF = {
    *("access", "api", "auth", "bearer", "bot", "github", "gitlab", "hf", "hub", "id", "mlflow", "refresh", "session"),
    *("tracking", "wandb"),
}
"""What a key of ours is called is `pad_token` or `text_key`; that of a service `hf_token` or `api_key`."""
PLACES = {"file", "path", "directory", "dir", "env", "variable", "name"}
"""`key_file` says where a secret lies, not what it is."""
ACTIONS = {"", "replace", "tag", "drop", "keep"}
"""What `corpus.steps.pii.secret` asks for: what is done with secrets found in text."""
LEAST_LENGTH = 8
"""Characters. A shorter value of the environment is not looked for."""
LONG, VARIED = 16, 8
"""Characters, and different ones. A value of the environment with fewer could be an ordinary word, as in
DB_PASSWORD=postgres: it is looked for as a whole, not within others."""
NOT_SHOWN = "(a secret, not shown)"
FIX = (
    "{why}. Configurations are written to disk, logs and trackers: take it out, change it if it was written already, "
    "and give it in an environment variable ({variable}) or in a file of mode 600"
)
VARIABLES = {"wandb": "WANDB_API_KEY", "mlflow": "MLFLOW_TRACKING_TOKEN", "hf": "HF_TOKEN", "hub": "HF_TOKEN"}


def named_secret(key: str) -> bool:
    """Whether a configuration key, the last part of a dotted one, is called like one that holds a secret."""
    words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", key.rsplit(".", 1)[-1])]
    if not words or words[-1] in PLACES:
        return False
    return (
        bool(set(words) & WORDS)
        or words == ["token"]
        or any(
            (after == "key" and before in KEYS) or (after == "token" and before in TOKENS_OF)
            for before, after in pairwise(words)
        )
    )


def secret_variable(name: str) -> bool:
    """Whether an environment variable is called like one that holds a secret: there, any KEY or TOKEN is one, and PWD
    is the working directory."""
    return name != "PWD" and (named_secret(name) or name.lower().rsplit("_", 1)[-1] in ("token", "key"))


def _path(value: str) -> bool:
    """Whether a text says where something lies. Base64 can begin with a slash, and has no dot."""
    if os.path.exists(os.path.expanduser(value)):
        return True
    return value.startswith("/") and ("." in value or os.path.exists(f"/{value.split('/')[1]}"))


def shape(value: str) -> str:
    """What a text holds that can only be a secret, in words; empty if nothing."""
    if KEY_BLOCK.search(value):
        return "a private key"
    if any(begin in value and pattern.search(value) for begin, pattern in TOKEN_PATTERNS.items()):
        return "the key of a service"
    if WEBHOOK.search(value):
        return "the address of a webhook"
    if any("$" not in match[1] for match in URL_PASSWORD.finditer(value)):
        return "an address with a password"
    return ""


def of_environment(variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Secret -> name of the variable it is in, for all that are long enough to be looked for."""
    found = {}
    for name, value in variables.items():
        if (secret_variable(name) and not _path(value.strip())) or (shape(value) and not URL_PASSWORD.search(value)):
            found[value.strip()] = name
        for match in URL_PASSWORD.finditer(value):
            found |= {match[1]: name, unquote(match[1]): name}
    return {secret: name for secret, name in found.items() if len(secret) >= LEAST_LENGTH}


def _unmistakable(secret: str) -> bool:
    """Whether no ordinary text holds it by accident."""
    return len(secret) >= LONG and len(set(secret)) >= VARIED


def problems(resolved: Mapping[str, Any]) -> list[Problem]:
    """Secrets in a configuration, by their key, their shape, or because the environment holds the same; the values are
    not told."""
    known = of_environment()
    return [problem for key, value in _leaves(resolved, "") if (problem := _problem(key, value, known))]


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse a command line with a secret in it, before anything quotes it.

    Raises:
        ConfigError: names each key; no value is told.
    """
    known = of_environment()
    found = []
    for place, argument in enumerate(arguments, 1):
        key, equals, value = argument.lstrip("-+~").partition("=")
        where = key if equals and not shape(key) else f"argument {place}"
        leaves = [(where, value if equals else argument)]
        if value[:1] in ("{", "["):
            leaves += [(f"{where}.{m[1]}", m[2]) for m in re.finditer(r"([\w.-]+)\s*[:=]\s*([^\s,}\]]+)", value)]
        found += [problem for name, text in leaves if (problem := _problem(name, text, known))]
    if found:
        raise ConfigError(found)


def _leaves(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{place}")
    elif isinstance(value, str):
        yield key, value
        if match := re.fullmatch(r"[-+~]*([\w.@/-]+)=(.*)", value, re.DOTALL):
            yield f"{key}.{match[1]}", match[2]


def _problem(key: str, value: str, known: Mapping[str, str]) -> Problem | None:
    value = value.strip().strip("\"'")
    parts = [part for part in key.split(".") if not part.isdigit()]
    named = next((part for part in parts if named_secret(part)), None)
    if found := shape(value):
        why = f"this is {found}"
    elif holder := next((name for secret, name in known.items() if _holds(value, secret)), None):
        why = f"this is the value of the environment variable {holder}"
    elif named and value not in ACTIONS and value not in ("null", "true", "false", "???") and not _path(value):
        why = f"a key called {named} holds a secret"
    else:
        return None
    variable = next((name for part, name in VARIABLES.items() if part in key.lower()), "of the service's own name")
    return Problem(key, NOT_SHOWN, FIX.format(why=why, variable=variable))


def _holds(value: str, secret: str) -> bool:
    return value == secret or (_unmistakable(secret) and secret in value)


def redactor(variables: Mapping[str, str] = os.environ) -> Callable[[str], str]:
    """A function that puts the name of its variable in the place of each secret of the environment: `[HF_TOKEN]`. One
    that could be a word is known where it is all there is, and as the password of an address."""
    known = of_environment(variables)
    if not known:
        return lambda text: text
    longest_first = [(re.escape(secret), _unmistakable(secret)) for secret in sorted(known, key=len, reverse=True)]
    pattern = re.compile("|".join(text if sure else rf"\A{text}\Z|(?<=:){text}(?=@)" for text, sure in longest_first))
    return lambda text: pattern.sub(lambda match: f"[{known[match[0]]}]", text)


class _Redacting:
    """A text stream that says the names of secrets in their place."""

    def __init__(self, stream: TextIO, redacted: Callable[[str], str]):
        self._stream, self._redacted = stream, redacted

    def write(self, text: str) -> int:
        self._stream.write(self._redacted(text))
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unprinted() -> Iterator[None]:
    """What Python prints in the block, tracebacks of the program's end included, is without the environment's secrets.

    The streams stay so where an exception leaves the block: its traceback is yet to be printed.
    """
    out, err = sys.stdout, sys.stderr
    if not of_environment():
        yield
        return
    redacted = redactor()
    sys.stdout, sys.stderr = _Redacting(out, redacted), _Redacting(err, redacted)  # type: ignore[assignment]
    try:
        yield
    except SystemExit:
        sys.stdout, sys.stderr = out, err
        raise
    sys.stdout, sys.stderr = out, err
