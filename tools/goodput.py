"""`python -m tools.goodput path=runs/pretrain`: where a run's wall time went, over all its restarts.

Also of a run that is under way or died, and of all runs of a lifecycle: `path=runs/demo`.
"""

import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf import entry
from conf.errors import LongrunError
from conf.registry import register
from launchers.display import duration
from train.goodput import DIRECTORY, LOST, OVERHEAD, USEFUL, WRITTEN_S, Account, Attempt, account, read


class NoAttemptsError(LongrunError):
    """There is nothing to account for."""


@register("", "goodput_schema")
@dataclass(frozen=True)
class GoodputConfig:
    """Account for the wall time of a training run, or of all in a directory.

    Args:
        path: a run directory, or one that holds run directories.
    """

    path: str = MISSING


def accounts(path: Path) -> dict[str, Account]:
    """Of a run, or of all runs in a directory, in the order they began.

    Raises:
        NoAttemptsError: there is none.
    """
    places = [path] if (path / DIRECTORY).is_dir() else sorted(found.parent for found in path.glob(f"*/{DIRECTORY}"))
    found = {place.name or str(place): account(attempts) for place in places if (attempts := read(place))}
    if not found:
        raise NoAttemptsError(
            f"{path} holds no training run that was started: neither it nor a directory in it has {DIRECTORY}/. Give "
            "the run_dir of a run, or the directory of a lifecycle."
        )
    return dict(sorted(found.items(), key=lambda item: item[1].shares[0].attempt.began_s))


def ending(attempt: Attempt, last: bool) -> str:
    """How an attempt ended, as far as its record tells."""
    if attempt.exit is not None:
        return {0: "0 done", 75: "75 stopped", 76: "76 lost"}.get(attempt.exit, f"{attempt.exit} failed")
    return "under way" if last and time.time() - attempt.alive_s < 10 * WRITTEN_S else "killed or lost"


def show(name: str, found: Account) -> None:
    """Print one run: a line per attempt, and what its time went into."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)  # a file is not folded
    console.print(f"{name}: {found.headline()}", style="bold", soft_wrap=True, markup=False)
    attempts = Table()
    for heading in ("attempt", "began", "host", "job", "ranks", "steps", "lost", "skipped", "down", "wall", "useful"):
        attempts.add_column(heading, justify="left" if heading in ("began", "host") else "right")
    attempts.add_column("exit")
    for share in found.shares:
        one = share.attempt
        useful = sum(share.seconds.get(what, 0.0) for what in USEFUL)
        attempts.add_row(
            str(one.number),
            datetime.fromtimestamp(one.began_s).strftime("%m-%d %H:%M:%S"),
            one.host,
            f"{one.job or '-'}{f' restart {one.restarts}' if one.restarts else ''}",
            str(one.processes),
            "-" if share.first is None else f"{share.first}-{share.last}",
            str(share.lost),
            str(share.skipped),
            duration(share.seconds["down"]),
            duration(one.wall_s),
            f"{useful / max(one.wall_s, 1e-9):.1%}",
            ending(one, share is found.shares[-1]),
        )
    console.print(attempts)
    time_went = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("", "seconds", "share"):
        time_went.add_column(heading, justify="left" if not heading else "right")
    for group, kinds in (("useful", USEFUL), ("overhead", OVERHEAD), ("lost", LOST)):
        for what in kinds:
            if seconds := found.seconds.get(what):
                time_went.add_row(f"{group}: {what}", f"{seconds:,.1f}", f"{seconds / found.wall_s:.1%}")
    time_went.add_row("wall", f"{found.wall_s:,.1f}", "100%", style="bold")
    time_went.add_row("of it for restarts", f"{found.restarts_s:,.1f}", f"{found.restarts_s / found.wall_s:.1%}")
    console.print(time_went)


def main(config: GoodputConfig, resolved: dict[str, Any]) -> int:
    for name, found in accounts(Path(config.path)).items():
        show(name, found)
    return 0


if __name__ == "__main__":
    entry.run("goodput", GoodputConfig, main)
