"""The key that a served model asks for: from the environment, or from a file that only its owner reads."""

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from conf.errors import LongrunError

VARIABLE = "LONGRUN_API_KEY"
FILE = "api-key"
OWNER_ONLY = 0o600
LEAST_LENGTH = 16
"""Characters of a key that a server asks for; `openssl rand -base64 32` makes one of 44."""


class ApiKeyError(LongrunError):
    """The key file cannot be used."""


@dataclass(frozen=True)
class ApiKey:
    """A secret: not in logs, not on command lines, not in what is printed of this object.

    Args:
        value: the key itself.
        shell: what a shell command writes in its place.
        file: where it lies; None when it came from the environment.
    """

    value: str = field(repr=False)
    shell: str
    file: Path | None = None


def from_environment() -> ApiKey | None:
    value = os.environ.get(VARIABLE, "").strip()
    return ApiKey(value, f"${VARIABLE}") if value else None


def read(file: str | Path) -> ApiKey:
    """The key in a file.

    Raises:
        ApiKeyError: there is none, it is empty, or others may read it.
    """
    file = Path(file)
    try:
        mode, value = file.stat().st_mode, file.read_text().strip()
    except OSError as error:
        raise ApiKeyError(
            f"no API key: {file} cannot be read ({error.strerror}). Set {VARIABLE}, or name its file."
        ) from error
    if mode & 0o077:
        raise ApiKeyError(f"others may read the API key in {file} (mode {mode & 0o777:o}): chmod 600 {file}")
    if not value:
        raise ApiKeyError(f"{file} is empty: delete it, and the next start makes a new key.")
    return ApiKey(value, f"$(cat {file})", file)


def read_or_make(directory: Path) -> ApiKey:
    """The key of the environment, else that of the directory, made if need be.

    Raises:
        ApiKeyError: it is so short that it can be guessed, or its file cannot be used.
    """
    if given := from_environment():
        if len(given.value) < LEAST_LENGTH:
            raise ApiKeyError(
                f"{VARIABLE} has {len(given.value)} characters; expected {LEAST_LENGTH} or more, such as "
                "`openssl rand -base64 32` prints. Unset it, and a key is made."
            )
        return given
    file = directory / FILE
    if not file.exists():
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, OWNER_ONLY)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_urlsafe(32) + "\n")
    return read(file)
