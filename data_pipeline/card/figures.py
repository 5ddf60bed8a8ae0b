"""Numbers as a reader takes them in."""

from typing import Any


def number(value: Any) -> str:
    """1,234,567 or 0.1235; what is no number as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(value: float) -> str:
    """Bytes with a decimal prefix, as disks and networks count."""
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"


def share(value: float) -> str:
    return f"{value:.1%}"


def percent(value: float) -> str:
    """With two places, for what is nearly all or nearly nothing."""
    return f"{value:.2%}"


def compact(value: float) -> str:
    """Four digits at most, with a prefix: 12.5k."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{prefix}"
    return f"{value:.4g}"


def counted(count: int, what: str) -> str:
    """For instance 1 document, 1,200 documents."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def cut(text: str, length: int) -> str:
    """At most so many characters, the last an ellipsis where something is left out."""
    return text if len(text) <= length else text[: length - 1] + "…"
