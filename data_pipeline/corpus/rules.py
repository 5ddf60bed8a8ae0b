"""Thresholds: what a document must be like to be kept, and how much a step may lose."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """What a document must be like to be kept.

    Args:
        least_characters: shorter documents are dropped.
        most_characters: longer ones are dropped.
        shortest_words: least mean length of words in prose, in characters.
        longest_words: most mean length of words in prose, in characters.
        alphabetic_words: least share of words in prose with a letter.
        stop_words: least number of different common English words in prose.
        symbols: most "#" and "..." per word of prose.
        bullets: most share of lines that begin with a bullet, in prose.
        repeated_lines: most share of characters in lines of prose that occurred before.
        line_length: most mean length of lines of code, in characters.
        longest_line: most characters in one line of code.
        alphanumeric: least share of letters and digits in code.
    """

    least_characters: int = 200
    most_characters: int = 2_000_000
    shortest_words: float = 3.0
    longest_words: float = 10.0
    alphabetic_words: float = 0.7
    stop_words: int = 2
    symbols: float = 0.1
    bullets: float = 0.9
    repeated_lines: float = 0.3
    line_length: float = 100.0
    longest_line: int = 1000
    alphanumeric: float = 0.25


@dataclass(frozen=True)
class Gates:
    """Least share of documents that a step must pass on; less means that something is wrong, not that the text is bad.

    Args:
        read: of the files and records found, those that can be read.
        quality: of those, the ones that the quality rules accept.
        deduplicate: of those, the ones that are not copies.
    """

    read: float = 0.9
    quality: float = 0.25
    deduplicate: float = 0.25
