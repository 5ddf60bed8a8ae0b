"""Whose fault it is that a run is lost, from two looks at what the ranks say of themselves."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from conf.errors import LongrunError, LostError
from parallel.standing import Standing, missing

HERE, HURT, LEFT = "here", "hurt", "left"
"""States of a rank: at work; thrown out by a collective that broke or came too late; gone as it should."""


class PeerError(LostError):
    """Another rank died or hangs; the message names it."""


class BrokenError(LostError):
    """A collective broke or came too late, though all ranks came to it and live: it was the network between them."""


class PeerFailedError(LongrunError):
    """Another rank failed, by an error of its own; the message has its reason. The same command would fail again."""


@dataclass(frozen=True)
class Sign:
    """The last that a rank has said of itself.

    Args:
        host: its machine.
        state: HERE, HURT or LEFT.
        step: the last step that it has finished.
        count: number of the sign.
        standing: where it stands, once that is asked.
    """

    host: str = "unknown"
    state: str = HERE
    step: int = 0
    count: int = 0
    standing: Standing | None = None

    @classmethod
    def read(cls, text: str) -> Self:
        values = json.loads(text)
        return cls(**{**values, "standing": Standing.read(standing) if (standing := values["standing"]) else None})


@dataclass(frozen=True)
class Verdict:
    """Whose fault it is.

    Args:
        ranks: those at fault.
        text: the message.
        kind: a key of ERRORS.
    """

    ranks: list[int]
    text: str
    kind: str = "lost"

    @property
    def error(self) -> LongrunError:
        """For the other ranks."""
        return ERRORS[self.kind](self.text)


ERRORS: dict[str, type[LongrunError]] = {
    "gone": PeerError,  # and cannot say where they stand
    "lost": PeerError,
    "broken": BrokenError,
    "failed": PeerFailedError,
}


def judge(
    before: dict[int, Sign], now: dict[int, Sign], own: tuple[int, Sign], size: int, stacks: Path | None
) -> Verdict | None:
    """Two looks at the others, SUSPICION_S apart.

    Args:
        own: this rank, and what it would say of itself.
        stacks: see `Watch.stacks`.
    """
    present = {rank: sign for rank, sign in now.items() if sign.state != LEFT}
    silent = {rank: sign for rank, sign in present.items() if sign == before[rank]}
    left = {rank: sign for rank, sign in now.items() if sign.state == LEFT}
    waited_for = {rank: sign for rank, sign in present.items() if sign.state == HERE}
    thrown_out = own[1].state == HURT
    if held := [rank for rank in silent if has_written(stacks, rank)]:
        what = "is stuck: no sign of life since step {}, but it could write its stack. Something holds the interpreter."
        return _verdict({rank: silent[rank] for rank in held}, what, size, stacks, kind="gone")
    if silent:
        what = "is gone: no sign of life since step {}. Was it killed, is its machine up, had it memory?"
        return _verdict(silent, what, size, stacks, kind="gone")
    if not thrown_out:
        return None  # nobody is silent after all, or it is this rank that the others wait for
    if left:
        fault, what = left, "left the run after step {}, and the others did not."
    elif waited_for:
        fault, what = waited_for, "hangs: it lives, but did not come to a collective after step {}."
    else:
        return _skipped({**present, own[0]: own[1]}, size, stacks)
    return _verdict(fault, what, size, stacks)


def _skipped(signs: dict[int, Sign], size: int, stacks: Path | None) -> Verdict:
    """All were thrown out of a collective."""
    behind, which = missing({rank: sign.standing for rank, sign in signs.items() if sign.standing})
    if behind:
        what = f"skipped {which} after step {{}}: the others waited there, and it in another."
        return _verdict({rank: signs[rank] for rank in behind}, what, size, stacks)
    steps = max(sign.step for sign in signs.values())
    text = f"a collective broke after step {steps}, though all {size} ranks came to it and live. Is the network well?"
    return Verdict([], text, "broken")


def _verdict(fault: dict[int, Sign], what: str, size: int, stacks: Path | None, kind: str = "lost") -> Verdict:
    steps = " and ".join(map(str, sorted({sign.step for sign in fault.values()})))
    look = (
        f"Look at {stacks}/rank-{min(fault)}.txt and the end of its output."
        if stacks
        else "Look at the end of its output."
    )
    return Verdict(sorted(fault), f"{who(fault, size)} {what.format(steps)} {look}", kind)


def has_written(stacks: Path | None, rank: int) -> bool:
    try:
        return stacks is not None and file_of(stacks, rank).stat().st_size > 0
    except OSError:  # it is not there, or the disk is not
        return False


def file_of(stacks: Path, rank: int) -> Path:
    """Where a rank writes its stacks."""
    return stacks / f"rank-{rank}.txt"


def table(standings: dict[int, Standing], size: int) -> str:
    """Who stands where, the ranks of one place in one line."""
    places: dict[str, list[int]] = {}
    for rank in range(size):
        place = str(standings[rank]) if rank in standings else "said nothing"
        places.setdefault(place, []).append(rank)
    return "\n".join(f"  rank {spans(ranks)}: {place}" for place, ranks in places.items())


def who(ranks: dict[int, Sign], size: int) -> str:
    hosts = sorted({sign.host for sign in ranks.values()})
    return f"rank {spans(ranks)} of {size} (on {', '.join(hosts)})"


def spans(ranks: Iterable[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and found[-1][1] == rank - 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
