"""Weights & Biases: online with a key, offline without, and the same run after every restart."""

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from typing import Any
from urllib.parse import urlparse

from conf.registry import register
from data_pipeline.artifact import write_atomically
from train.metrics.base import Run, Sink, Value

ID_FILE = "wandb_id"


@register("logger", "wandb", package="logger.wandb")
@dataclass(frozen=True)
class WandB:
    """Send figures, configuration and summary to Weights & Biases. The key comes from WANDB_API_KEY or ~/.netrc, never
    from the configuration; without one, or with WANDB_MODE=offline, files go to the run directory, to be sent later
    with `wandb sync`.

    Args:
        project: project the run belongs to.
        entity: user or team; empty for the key's own.
        timeout_s: seconds to wait for the server before going on offline.
    """

    project: str = "longrun"
    entity: str = ""
    timeout_s: float = 30.0

    def open(self, run: Run) -> Sink:
        return _Tracker(self, run)


def mode() -> str:
    """What WANDB_MODE asks for; without it, online where there is a key."""
    if asked := os.environ.get("WANDB_MODE"):
        return asked
    import wandb

    try:
        stored = netrc().authenticators(urlparse(wandb.Settings().base_url).hostname or "")
    except (OSError, NetrcParseError):
        stored = None
    return "online" if stored or os.environ.get("WANDB_API_KEY") else "offline"


class _Tracker:
    def __init__(self, option: WandB, run: Run):
        import wandb

        id_file = run.directory / ID_FILE
        if run.resumed_step == 0 or not id_file.exists():
            write_atomically(id_file, secrets.token_hex(4))
        start: dict[str, Any] = {
            "mode": mode(),
            "project": option.project,
            "entity": option.entity or None,
            "name": run.name,
            "id": id_file.read_text().strip(),
            "resume": "allow",
            "config": run.config,
            "dir": str(run.directory),
            "settings": wandb.Settings(init_timeout=option.timeout_s, silent=True, console="off"),
        }
        try:
            self._run = wandb.init(**start)
        except wandb.errors.CommError:  # a key, but no way to the server
            wandb.teardown()  # the service still holds the id
            self._run = wandb.init(**{**start, "mode": "offline"})
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        group = "validation" if "validation_loss" in values else "train"
        self._run.log({"step": step, **{f"{group}/{n.removeprefix('validation_')}": v for n, v in values.items()}})

    def alert(self, kind: str, text: str) -> None:
        self._run.alert(title=kind, text=text, level="ERROR" if kind == "fault" else "WARN")

    def close(self, summary: Mapping[str, Value]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary else 1)
