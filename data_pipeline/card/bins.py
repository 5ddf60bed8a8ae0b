"""Bins of histograms: few enough to be counted for any corpus, and the same for all, so that they add up."""

import math


def of_length(length: int) -> int:
    """Two bins to a doubling: bin b holds the lengths from 2^(b/2) up to 2^((b + 1)/2); bin -1 the length 0."""
    return (length * length).bit_length() - 1


def length_from(bin: int) -> float:
    """The least length of a bin."""
    return 2 ** (bin / 2) if bin >= 0 else 0.0


def of_score(score: float) -> float:
    """The least score of a bin: twenty of equal width in [0, 1], where most scores lie, and outside two to a doubling
    of the magnitude."""
    if 0 <= score <= 1:
        return min(int(score * 20), 19) / 20
    exponent = math.floor(2 * math.log2(abs(score))) / 2
    return round(math.copysign(2**exponent, score), 4)
