"""What a tokenizer makes of a corpus: how far its tokens reach, by language, kind and source, and which it never uses.

Fertility is tokens per word (Rust et al. 2021, arXiv:2012.15613), where a word is a run of characters without white
space: it says nothing for languages that write none, for which there are characters per token.

Shape suffixes: V ids of the vocabulary.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizer import Tokenizer

GROUP = ("split", "language", "kind", "source")
"""Metadata by which sizes are kept apart."""
LABEL = "size"
SHOWN = 10
"""Tokens listed in each list of examples."""


@dataclass
class Sizes:
    """How much text, and how many tokens of it.

    Args:
        documents: number of them.
        bytes: of UTF-8.
        characters: code points.
        words: runs of characters without white space.
        tokens: end-of-text tokens left out.
    """

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    words: int = 0
    tokens: int = 0

    def add(self, text: str, tokens: int) -> None:
        """Count a document."""
        self.documents += 1
        self.bytes += len(text) if text.isascii() else len(text.encode())
        self.characters += len(text)
        self.words += len(text.split())
        self.tokens += tokens

    def __add__(self, other: "Sizes") -> "Sizes":
        return Sizes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def labelled(self, group: tuple[str, ...]) -> Iterator[tuple[str, int]]:
        """Statistics of a pipeline step."""
        return (("\t".join((LABEL, name, *group)), size) for name, size in asdict(self).items())

    @staticmethod
    def read(totals: Mapping[str, int]) -> dict[tuple[str, ...], "Sizes"]:
        """What `labelled` wrote, by group."""
        found: dict[tuple[str, ...], dict[str, int]] = {}
        for label, total in totals.items():
            kind, *rest = label.split("\t")
            if kind == LABEL:
                found.setdefault(tuple(rest[1:]), {})[rest[0]] = total
        return {group: Sizes(**sizes) for group, sizes in found.items()}

    def ratios(self) -> dict[str, float]:
        """The sizes, and bytes and characters per token and tokens per word."""
        return {
            **asdict(self),
            "bytes_per_token": self.bytes / max(self.tokens, 1),
            "characters_per_token": self.characters / max(self.tokens, 1),
            "tokens_per_word": self.tokens / max(self.words, 1),
        }


def report(tokenizer: Tokenizer, sizes: Mapping[tuple[str, ...], Sizes], counts_V: NDArray[np.int64]) -> dict[str, Any]:
    """The report, as the manifest has it.

    Args:
        tokenizer: whose.
        sizes: by the values of GROUP.
        counts_V: how often each id occurs, end-of-text tokens left out.
    """
    spellings = [tokenizer.spelling(number) for number in range(tokenizer.vocabulary)]
    ordinary = [n for n, spelling in enumerate(spellings) if spelling and n not in tokenizer.special_ids]
    unused = [n for n in ordinary if not counts_V[n]]
    used = sorted((n for n in ordinary if counts_V[n]), key=lambda n: (-len(spellings[n]), n))
    total = max(int(counts_V.sum()), 1)
    fragments = sum(int(counts_V[n]) for n in ordinary if not _is_text(spellings[n]))
    unknown = 0 if tokenizer.unknown is None else int(counts_V[tokenizer.unknown])
    return {
        "all": _summed(sizes.values()).ratios(),
        **{key: _by(place, sizes) for place, key in enumerate(GROUP)},
        "unused": len(unused),
        "unused_examples": [_shown(spellings[n]) for n in unused[:SHOWN]],
        "longest": [{"token": _shown(spellings[n]), "count": int(counts_V[n])} for n in used[:SHOWN]],
        "fragments": fragments / total,
        "unknown": unknown / total,
        "lossless": tokenizer.lossless,
    }


def table(found: Mapping[str, Any]) -> str:
    """The report for a person at a terminal."""
    rows = [("all", found["all"])]
    for key in GROUP:
        rows += [(f"{key} {value or '(none)'}", ratios) for value, ratios in found[key].items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{'tokenizer':{width}} {'bytes/token':>12} {'chars/token':>12} {'tokens/word':>12} {'tokens':>15}"]
    for name, ratios in rows:
        figures = (ratios[key] for key in ("bytes_per_token", "characters_per_token", "tokens_per_word"))
        lines.append(
            f"{name:{width}} " + " ".join(f"{figure:12.2f}" for figure in figures) + f" {ratios['tokens']:15,}"
        )
    lines.append(
        f"unused {found['unused']:,}; no whole characters {found['fragments']:.2%}; unknown {found['unknown']:.2%}; "
        f"longest {', '.join(repr(entry['token']) for entry in found['longest'][:3])}"
    )
    return "\n".join(lines)


def _by(place: int, sizes: Mapping[tuple[str, ...], Sizes]) -> dict[str, dict[str, float]]:
    values = sorted({group[place] for group in sizes})
    if values == [""]:  # the step that finds it out did not run
        return {}
    return {value: _summed(s for group, s in sizes.items() if group[place] == value).ratios() for value in values}


def _summed(sizes: Iterable[Sizes]) -> Sizes:
    return sum(sizes, start=Sizes())


def _is_text(spelling: bytes) -> bool:
    try:
        spelling.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(spelling: bytes) -> str:
    return spelling.decode(errors="backslashreplace")
