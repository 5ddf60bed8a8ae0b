"""What a user reads when something is wrong: one message, no traceback."""

from dataclasses import dataclass
from typing import ClassVar


class LongrunError(Exception):
    """A problem the user can mend. The message names what was found, what was expected and how to fix it.

    Entry points print the message alone and exit with `exit_code`. Anything else is a bug and keeps its traceback.
    """

    exit_code: ClassVar[int] = 1


class OccupiedError(LongrunError):
    """The run directory holds what another configuration or other inputs made. The lifecycle moves it aside."""

    exit_code = 73  # EX_CANTCREAT of sysexits.h


class LostError(LongrunError):
    """Lost through no fault of the run's own: another rank died or hangs, a machine is gone, the network broke. The
    same command, started again, goes on; launchers do so, at most so many times without progress."""

    exit_code = 76


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration.

    Args:
        key: the configuration key, as typed on the command line (`parallel.dp_shard`).
        found: its value.
        fix: what was expected and values that would work.
        here: this machine is the reason; another may be able to.
    """

    key: str
    found: object
    fix: str
    here: bool = False

    def __str__(self) -> str:
        return f"{self.key}={self.found}: {self.fix}"


class ConfigError(LongrunError):
    """Every problem of a configuration at once."""

    def __init__(self, problems: list[Problem]):
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{count} in the configuration; nothing was started.\n" + "\n".join(f"  - {p}" for p in problems)
        )
