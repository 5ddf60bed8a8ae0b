"""What detectors share: places in a text, words before them, numbers in a row."""

import re
from collections.abc import Callable, Iterator, Sequence

Span = tuple[int, int]
CUE = 40
"""Characters before a number in which a word may say what it is."""
LAST_DIGIT = re.compile(r"\d(?= )|\d$")


def replaced(text: str, spans: Sequence[Span], replacement: Callable[[int, int], str]) -> str:
    """The text with every span replaced; they are in order and do not overlap."""
    if not spans:
        return text
    parts, done = [], 0
    for begin, end in spans:
        parts += [text[done:begin], replacement(begin, end)]
        done = end
    return "".join([*parts, text[done:]])


def cued(text: str, begin: int, cue: re.Pattern[str]) -> bool:
    """Whether a word shortly before says what follows."""
    return cue.search(text, max(0, begin - CUE), begin) is not None


def longest(text: str, pattern: re.Pattern[str], accepted: Callable[[int, int], bool]) -> Iterator[Span]:
    """Numbers in groups of digits. Two in a row look like one: of what matches, the longest beginning that is accepted,
    and if none is, what begins after its first group."""
    position = 0
    while match := pattern.search(text, position):
        begin = match.start()
        ends = [begin + group.end() for group in LAST_DIGIT.finditer(match[0])]
        end = next((end for end in reversed(ends) if accepted(begin, end)), None)
        if end:
            yield begin, end
        position = end or (begin + 1 if text[begin] == "(" else ends[0])


def disjoint(spans: Sequence[Span]) -> Iterator[Span]:
    """In order, without those that overlap an earlier one."""
    done = 0
    for begin, end in sorted(spans):
        if begin >= done:
            yield begin, end
            done = end
