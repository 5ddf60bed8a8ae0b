"""Layouts in one word: `pp2.tp2.dp_shard2.zero3.interleaved_1f1b.v2.mb4`, or `pp2xtp2xdp2`.

A word is made of parts with `.` or `x` between them, in any order: an axis or a number with its value (`tp2`, `zero3`),
a schedule (`zbv`), another field of `Layout` with its value (`recompute_full`), or the name of a switch alone. Short
forms: `dp` is dp_shard, `v` virtual_stages, `mb` micro_batches. What a pipeline leaves out is as small as works: as
many micro-batches as its schedule needs, and two model chunks a rank where it needs several. `alone` is one process.
"""

import dataclasses
import re
from typing import Any

from conf.errors import LongrunError
from parallel.layout import SCHEDULES, Layout

ALONE = "alone"
SHORT = {"dp_shard": "dp", "virtual_stages": "v", "micro_batches": "mb"}
SEVERAL_CHUNKS = ("interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dual_pipe_v")
"""Schedules that need at least two model chunks per rank."""

FIELDS = {f.name: f for f in dataclasses.fields(Layout)}
NUMBERS = [name for name, field in FIELDS.items() if field.type is int]
SWITCHES = [name for name, field in FIELDS.items() if field.type is bool]
TEXTS = [name for name, field in FIELDS.items() if field.type is str and name != "schedule"]


class WordError(LongrunError):
    """A word that names no layout."""


PART = re.compile(
    rf"(?:(?P<schedule>{'|'.join(sorted(SCHEDULES, key=len, reverse=True))})"
    rf"|(?P<name>{'|'.join([*NUMBERS, *SHORT.values()])})(?P<number>\d+)"
    rf"|(?P<field>{'|'.join(TEXTS)})_(?P<text>[a-z]+|0?\.\d+)"
    rf"|(?P<switch>{'|'.join(SWITCHES)}))(?:[.x](?=.)|$)"
)


def parse(word: str) -> Layout:
    """The layout that a word stands for.

    Raises:
        WordError: names the part that was not understood, or was given twice.
    """
    values: dict[str, Any] = {}
    rest = "" if word == ALONE else word
    while rest:
        name, value, rest = _part(rest, word)
        if name in values:
            raise WordError(f"{word}: {name} is given twice")
        values[name] = value
    layout = Layout(**values)
    several = layout.pp > 1 and layout.schedule in SEVERAL_CHUNKS
    needed = layout.pp * (2 if layout.schedule == "dual_pipe_v" else 1)
    return dataclasses.replace(
        layout,
        virtual_stages=values.get("virtual_stages", 2 if several else 1),
        micro_batches=values.get("micro_batches", needed),
    )


def _part(rest: str, word: str) -> tuple[str, Any, str]:
    """The first part of `rest`: its field, its value, and what follows."""
    match = PART.match(rest)
    if not match:
        parts = [*(f"{SHORT.get(name, name)}N" for name in NUMBERS), *SCHEDULES, *(f"{name}_VALUE" for name in TEXTS)]
        wrong = re.split("[.x]", rest)[0] or rest
        raise WordError(
            f"{word}: {wrong!r} is not understood; parts are {', '.join([*parts, *SWITCHES])}, with . or x between them"
        )
    found = match.groupdict()
    following = rest[match.end() :]
    if found["schedule"]:
        return "schedule", found["schedule"], following
    if found["name"]:
        long = {short: name for name, short in SHORT.items()}
        return long.get(found["name"], found["name"]), int(found["number"]), following
    if found["switch"]:
        return found["switch"], True, following
    return found["field"], found["text"], following


def spell(layout: Layout) -> str:
    """The word that stands for a layout; `parse` reads it."""
    parts = []
    for name, field in FIELDS.items():
        value = getattr(layout, name)
        counted = name == "micro_batches" and layout.pp > 1
        counted |= name == "virtual_stages" and layout.pp > 1 and layout.schedule in SEVERAL_CHUNKS
        if value == field.default and not counted:
            continue
        if name in NUMBERS:
            parts.append(f"{SHORT.get(name, name)}{value}")
        elif name in SWITCHES:
            parts.append(name)
        else:
            parts.append(value if name == "schedule" else f"{name}_{value}")
    return ".".join(parts) or ALONE
