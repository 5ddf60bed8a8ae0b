"""`python -m launchers.sweep search=tpe -- train experiment=demo 'optim.lr=log(1e-4, 1e-2)'`."""

import shlex
import sys
from typing import Any

from conf import entry
from data_pipeline.artifact import locked
from launchers.base import DONE
from launchers.graph import quoted
from launchers.sweep.config import SweepConfig
from launchers.sweep.run import Sweep
from launchers.sweep.space import corners


def main(config: SweepConfig, resolved: dict[str, Any]) -> int:
    sweep = Sweep(config)
    if config.dry_run:
        sweep.check()
        sweep.display.say(f"{sweep.trials} trials, for instance:")
        corner = next(corners(sweep.space))
        sweep.display.say(shlex.join(["python", "-m", *sweep.call(0, corner)]), style="")
        return DONE
    with locked(config.root):
        return sweep.run()


def with_command(arguments: list[str]) -> list[str]:
    """The arguments with what follows `--` as the value of the key `command`."""
    if "--" not in arguments:
        return arguments
    at = arguments.index("--")
    command = [text.replace("${", "\\${") for text in arguments[at + 1 :]]  # interpolations are the trial's to resolve
    return [*arguments[:at], f"command={quoted(command)}"]


if __name__ == "__main__":
    sys.argv[1:] = with_command(sys.argv[1:])
    entry.run("sweep", SweepConfig, main)
