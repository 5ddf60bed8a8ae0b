"""Passwords, private keys and keys of services."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence

from conf.secrets import KEY_BLOCK, TOKEN_PATTERNS, URL_PASSWORD
from data_pipeline.personal.spans import Span, disjoint

KEY_END = re.compile(r"-----END (?:[A-Z0-9]{1,20} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
KEY_BODY = re.compile(r"[A-Za-z0-9+/=:,\s\\-]{0,16384}")
LONGEST_KEY = 16_384
"""Characters of a key block; what is longer is no key."""
SAMPLE = re.compile(
    r"example|sample|dummy|changeme|placeholder|redacted|your|xxxx|0000|123456|abcdef|abc123", re.IGNORECASE
)
COMMON = re.compile(r"passw|secret|token|^(?:pass|pwd|postgres|root|admin|guest)$", re.IGNORECASE)
"""What manuals write for a password."""
NAMES = (
    *("secret", "token", "password", "passwd", "pwd", "api_key", "apikey", "api-key", "access_key", "accesskey"),
    *("private_key", "auth_key", "client_key", "credential", "authorization"),
)
VALUE = re.compile(
    r"(?:s|_\w{0,20}+)?[\"']?\s{0,3}(?::=|=>|[:=])\s{0,3}(?:(?:bearer|basic|token)\s{1,3})?"
    r"(?:\"([^\"\s]{8,256}+)\"|'([^'\s]{8,256}+)'|([\w+/=~-]{16,256}+)(?![(.\[]))",
    re.IGNORECASE,
)
ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
LEAST_DIGITS_OF_SECRETS = 2
LEAST_ENTROPY = 3.0
"""Bits per character of a value that is taken for a secret; English words have about 2.5 to 3, random hex 3.5 to 4."""


def key_blocks(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Private keys in PEM, with or without an end."""
    done = 0
    for match in KEY_BLOCK.finditer(text) if "PRIVATE KEY" in text else ():
        if match.start() < done:
            continue
        body = KEY_BODY.match(text, match.end())
        assert body is not None  # it matches nothing too
        end = KEY_END.search(text, match.end(), match.end() + LONGEST_KEY)
        following = KEY_BLOCK.search(text, match.end(), end.start() if end else match.end() + LONGEST_KEY)
        if end and not following:
            done = end.end()
        else:
            done = min(body.end(), following.start()) if following else body.end()
        yield match.start(), done


def tokens(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Keys of known services, by their shape."""
    found = [
        match.span()
        for begin, pattern in TOKEN_PATTERNS.items()
        if begin in text
        for match in pattern.finditer(text)
        if not match[0].endswith("EXAMPLE") and entropy(match[0]) >= LEAST_ENTROPY
    ]
    yield from disjoint(found)


def url_passwords(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """The password in scheme://user:password@host."""
    for match in URL_PASSWORD.finditer(text) if "://" in text else ():
        if not set(match[1]) & set("${}<>*[]%") and not SAMPLE.search(match[1]) and not COMMON.search(match[1]):
            yield match.span(1)


def assignments(text: str, regions: Sequence[str]) -> Iterator[Span]:
    """Values that look random, assigned to what is called a key, token or password."""
    lower = text.lower()
    if len(lower) != len(text):  # some letters become two
        lower = text.translate(ASCII_LOWER)
    found = []
    for name in NAMES:
        position = lower.find(name)
        while position >= 0:
            position += len(name)
            if match := VALUE.match(text, position):
                number = match.lastindex or 0
                if random_looking(match[number]):
                    found.append(match.span(number))
            position = lower.find(name, position)
    yield from disjoint(found)


def random_looking(value: str) -> bool:
    """Whether no one would write it by hand: letters and digits mixed, many different ones, no word for a sample."""
    mixed = sum(map(str.isdigit, value)) >= LEAST_DIGITS_OF_SECRETS and any(map(str.isalpha, value))
    return mixed and entropy(value) >= LEAST_ENTROPY and not SAMPLE.search(value) and not set(value) & set("${}<>()[] ")


def entropy(value: str) -> float:
    """Of the characters of a value, in bits per character (Shannon 1948)."""
    counts = Counter(value).values()
    return math.log2(len(value)) - sum(count * math.log2(count) for count in counts) / len(value)
