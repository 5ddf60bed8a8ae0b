"""Documents to tokens: the ids that the tokenizers library gives, several times faster on one core.

A byte-level tokenizer splits a text into words and applies its model to each word by itself. The library spends most of
its time on the split, because it keeps track of where every character came from, and on words that it has seen before.
Here the split is one compiled pattern, and the model is asked once for every distinct word. What a pattern cannot
express (other normalisers, other splits, words that were added by name, characters beyond the Basic Multilingual
Plane) goes through the library, document by document.

Shape suffixes: T tokens of one document.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizer import BYTE_CHARACTERS, Tokenizer

if TYPE_CHECKING:
    import tokenizers

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How ByteLevel splits (Radford et al. 2019)."""
GPT2_DIGITS = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
"""The same after each digit was set apart: to the other parts, a digit is where the text ends."""
BEYOND_BMP = re.compile("[\U00010000-\U0010ffff]")
WORDS = 2**19
"""Most words that are remembered, about 100 MB; the frequent ones are seen early."""
LONGEST_WORD = 64
"""Longer ones, in characters, seldom come twice and are not remembered."""
CHECKED = 256
"""Every so many documents, one is encoded by the library as well."""


class Encoder:
    """Encodes documents of unknown origin, as `Tokenizer.encode_documents` does.

    Args:
        tokenizer: whose ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.dtype: type[np.integer] = np.uint16 if tokenizer.vocabulary <= 2**16 else np.int32
        """What holds the ids in a shard."""
        content = json.loads(tokenizer.backend.to_str())
        self.words = _words(content) if _is_simple(content) else None
        self.composes = content["normalizer"] is not None
        named = [token["content"] for token in content["added_tokens"] if not token["special"]]
        self.named = re.compile("|".join(map(re.escape, named))) if named else None
        self.known = _Known(tokenizer.backend.model, self.dtype)
        self.documents = 0

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.integer]]:
        """Ids of each text; nothing is added at either end.

        Raises:
            RuntimeError: a document that was encoded both ways has other ids than the library's.
        """
        encoded = [self._by_words(text) for text in texts]
        others = [number for number, ids_T in enumerate(encoded) if ids_T is None]
        checked = [n for n, ids_T in enumerate(encoded) if ids_T is not None and (self.documents + n) % CHECKED == 0]
        self.documents += len(texts)
        by_library = self.tokenizer.encode_documents([texts[number] for number in others + checked])
        for number, ids in zip(others + checked, by_library, strict=True):
            ids_T = np.array(ids, self.dtype)
            if (ours_T := encoded[number]) is not None and not np.array_equal(ours_T, ids_T):
                raise RuntimeError(
                    f"{self.tokenizer.source}: words and library give other ids for {texts[number][:200]!r}; "
                    "data_pipeline/encoding.py mistakes how this tokenizer splits."
                )
            encoded[number] = ids_T
        return encoded  # type: ignore[return-value]  # those that were None are now filled in

    def _by_words(self, text: str) -> NDArray[np.integer] | None:
        """Ids of the text; None where only the library knows them."""
        if self.words is None or BEYOND_BMP.search(text) or (self.named and self.named.search(text)):
            return None
        if self.composes and not text.isascii():
            text = self.tokenizer.backend.normalizer.normalize_str(text)
            if BEYOND_BMP.search(text) or (self.named and self.named.search(text)):
                return None
        words = self.words.findall(text)
        if sum(map(len, words)) != len(text):  # the pattern leaves something out, which is then a word too
            return None
        return np.frombuffer(b"".join(map(self.known.__getitem__, words)), self.dtype)


class _Known(dict[str, bytes]):
    """Word -> its ids, as the bytes of an array: joining them is all that is left to do for a text."""

    def __init__(self, model: "tokenizers.models.Model", dtype: type[np.integer]):
        super().__init__()
        self.model = model
        self.dtype = dtype

    def __missing__(self, word: str) -> bytes:
        spelt = "".join([BYTE_CHARACTERS[byte] for byte in word.encode()])
        ids = np.array([token.id for token in self.model.tokenize(spelt)], self.dtype).tobytes()
        if len(word) <= LONGEST_WORD and len(self) < WORDS:
            self[word] = ids
        return ids


def _is_simple(content: dict[str, Any]) -> bool:
    """Whether the tokenizer changes a text in no other way than composing its characters (NFC), which leaves ASCII as
    it is, and gives a word the same ids each time."""
    normaliser = content["normalizer"]
    return (normaliser is None or normaliser["type"] == "NFC") and not content["model"].get("dropout")


def _words(content: dict[str, Any]) -> re.Pattern[str] | None:
    """The pattern whose matches are the words of a byte-level tokenizer; None for any other tokenizer."""
    splitter = content["pre_tokenizer"] or {"type": "none"}
    parts = splitter["pretokenizers"] if splitter["type"] == "Sequence" else [splitter]
    *first, last = parts
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    match first:
        case [] if last["use_regex"]:
            return translated(GPT2)
        case [{"type": "Digits", "individual_digits": True}] if last["use_regex"]:
            return translated(GPT2_DIGITS)
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}]:
            return None if last["use_regex"] else translated(pattern)
    return None


@cache
def translated(pattern: str) -> re.Pattern[str] | None:
    """A pattern of the tokenizers library as one of Python's, for the Basic Multilingual Plane; None if it uses more
    than letters, digits, spaces, line ends and the plain operators."""
    out, inside, place = "", False, 0
    for found in re.finditer(r"\\[pP]\{\w+\}|\\.|\(\?.:?|&&|\[:|.", pattern, re.DOTALL):
        token = found[0]
        match token:
            case r"\p{L}" | r"\p{N}" | r"\s":
                members = _members(token)
                out += members if inside else f"[{members}]"
            case r"\S" if not inside:
                out += "[^" + _members(r"\s") + "]"
            case r"\r" | r"\n" | "(?:" | "(?i:" | "(?!":
                out += token
            case "[" | "]":
                inside = token == "["
                out += token
            case _ if len(token) == 1:
                out += token
            case _:
                return None
        place = found.end()
    return re.compile(out) if place == len(pattern) else None


@cache
def _members(kind: str) -> str:
    """The characters of a class as ranges for a Python pattern, as the library's own engine has them: the versions of
    Unicode may differ."""

    def ranges() -> Iterator[str]:
        from tokenizers import Regex, pre_tokenizers

        every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
        runs = pre_tokenizers.Split(Regex(f"(?:{kind})+"), "removed", invert=True).pre_tokenize_str(every)
        for run, _ in runs:
            yield re.escape(run[0]) + (f"-{re.escape(run[-1])}" if len(run) > 1 else "")

    return "".join(ranges())
