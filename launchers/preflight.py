"""Compose and check every stage's configuration before the first one starts.

A misspelt key of the last stage must not wait for the days that the first ones take. What this machine cannot do is no
problem: the one that a stage is started on may be another. `python -m launchers.preflight`
reads a JSON list of `Check` from standard input and writes the answers to standard output. It is a process of its own
because the stages' schemas bring torch with them, which the lifecycle does without.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

from conf import entry
from conf.errors import ConfigError, LongrunError
from conf.registry import OPTIONS


@dataclass(frozen=True)
class Check:
    """One stage's call.

    Args:
        stage: its name in the lifecycle.
        call: what follows `python -m`.
        processes: ranks it is started on.
        missing: directories on the command line that an earlier stage has yet to write.
    """

    stage: str
    call: list[str]
    processes: int
    missing: list[str]


@dataclass(frozen=True)
class Answer:
    """What became of a call.

    Args:
        problem: what its entry point would say to this command line; empty when it would start.
        run_dir: the directory it would write, where it got so far.
        groups: the configuration groups that there are, where it composes.
    """

    problem: str = ""
    run_dir: str = ""
    groups: list[str] = field(default_factory=list)


def check(calls: list[Check]) -> dict[str, str]:
    """Stage -> what is wrong with its configuration; stages without a problem are left out."""
    return {stage: answer.problem for stage, answer in answers(calls).items() if answer.problem}


def answers(calls: list[Check]) -> dict[str, Answer]:
    """Stage -> what became of its call."""
    result = subprocess.run(
        [sys.executable, "-m", "launchers.preflight"],
        input=json.dumps([asdict(call) for call in calls]),
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise LongrunError(f"the stages' configurations could not be checked:\n{result.stderr.strip()}")
    return {stage: Answer(**answer) for stage, answer in json.loads(result.stdout).items()}


def _answer(call: Check) -> Answer:
    def compose_only(config_name: str, schema: type, main: Any) -> None:
        """In place of `conf.entry.run`: everything up to the start."""
        from hydra import compose, initialize_config_module
        from omegaconf import open_dict

        try:
            with initialize_config_module("conf", version_base="1.3"):
                node = compose(config_name, overrides=overrides, return_hydra_config=True)
            offered = {group for group, _ in OPTIONS if group}
            found["groups"] = sorted(offered | set(node.hydra.runtime.choices))  # a list of options is no choice
            with open_dict(node):
                del node["hydra"]
            found["run_dir"] = getattr(entry.typed(node, schema), "run_dir", "")
        except ConfigError as error:
            told = [str(p) for p in error.problems if not p.here and not any(path in str(p) for path in call.missing)]
            messages.extend(told)
        except (LongrunError, OSError) as error:
            if not call.missing:  # else it may be about an input that is yet to come
                messages.append(str(error))
        except (entry.HydraException, entry.OmegaConfBaseException) as error:
            messages.append(entry.explain(error, schema))

    command, *overrides = call.call
    messages: list[str] = []
    found: dict[str, Any] = {}
    printed = io.StringIO()
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(call.processes)} if call.processes > 1 else {}
    with (
        mock.patch.object(entry, "run", compose_only),
        mock.patch.dict(os.environ, ranks),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(printed),
    ):
        runpy.run_module(command, run_name="__main__")
    return Answer("\n".join(messages), **found)


if __name__ == "__main__":
    calls = [Check(**call) for call in json.load(sys.stdin)]
    json.dump({call.stage: asdict(_answer(call)) for call in calls}, sys.stdout)
