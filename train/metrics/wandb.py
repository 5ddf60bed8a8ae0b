"""Weights & Biases: online with a key, offline without, and the same run after every restart."""

import os
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from typing import Any, ClassVar
from urllib.parse import urlparse

from conf.registry import register
from data_pipeline.artifact import Artifact, write_atomically
from train.metrics.base import Run, Sink, Value, grouped

ID_FILE = "wandb_id"
KEY = "WANDB_API_KEY"


@register("logger", "wandb", package="logger.wandb")
@dataclass(frozen=True)
class WandB:
    """Send figures, configuration, artifacts, alerts and summary to Weights & Biases. The key comes from WANDB_API_KEY
    or ~/.netrc, never from the configuration; without one, with one that is refused, without a way to the server or
    with WANDB_MODE=offline, files go to the run directory, to be sent later with `wandb sync`.

    Args:
        project: project the run belongs to.
        entity: user or team; empty for the key's own.
        timeout_s: seconds to wait for the server at the start before going on offline, and at the end for it to take
            what is left.
        upload: send the files of what the run has made; otherwise only where they are.
    """

    project: str = "longrun"
    entity: str = ""
    timeout_s: float = 20.0
    upload: bool = False
    apart: ClassVar[bool] = True

    def open(self, run: Run) -> Sink:
        return _Tracker(self, run)


def server() -> str:
    import wandb

    return os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)


def key() -> tuple[str, str] | None:
    """Where the key is, and the key."""
    if value := os.environ.get(KEY, "").strip():
        return f"the environment variable {KEY}", value
    try:
        stored = netrc().authenticators(urlparse(server()).hostname or "")
    except (OSError, NetrcParseError):
        stored = None
    return ("~/.netrc", stored[2]) if stored and stored[2] else None


def mode() -> str:
    """What WANDB_MODE asks for; without it, online where there is a key."""
    return os.environ.get("WANDB_MODE") or ("online" if key() else "offline")


def obstacle(timeout_s: float) -> str:
    """Why the server will not have this run, in words; empty if nothing speaks against it."""
    import requests

    if (found := key()) is None:
        return ""  # a service account's identity, or none: wandb knows
    source, value = found
    try:
        answer = requests.post(
            f"{server().rstrip('/')}/graphql",
            json={"query": "query { viewer { id } }"},
            auth=("api", value),
            timeout=timeout_s,
        )
        if answer.ok:
            refused = (answer.json().get("data") or {}).get("viewer", "not told") is None
        else:
            refused = answer.status_code in (401, 403)
    except (requests.RequestException, ValueError, AttributeError) as error:
        return f"{server()} does not answer ({type(error).__name__})"
    if refused:
        return f"{server()} refuses the key of {source}. Put a valid one there (wandb login)"
    return "" if answer.ok else f"{server()} answers with HTTP {answer.status_code}"


class _Tracker:
    def __init__(self, option: WandB, run: Run):
        import wandb

        self._option = option
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
            "config": {**run.config, "inputs": {name: artifact.id for name, artifact in run.inputs.items()}},
            "dir": str(run.directory),
            "settings": wandb.Settings(
                init_timeout=option.timeout_s,
                finish_timeout=option.timeout_s,
                silent=True,
                console="off",
                disable_git=True,  # a diff of the source may hold anything
                save_code=False,
            ),
        }
        why = obstacle(option.timeout_s) if start["mode"] == "online" else ""
        if not why:
            try:
                self._run = wandb.init(**start)
            except (
                wandb.errors.CommError
            ) as error:  # what the question above did not meet: another project, another team
                wandb.teardown()  # the service still holds the id
                why = f"{server()} does not take this run ({error})"
        if why:
            later = f"wandb sync {run.directory}/wandb/offline-run-*"
            print(f"W&B: {why}. The run is recorded offline; send it later: {later}", file=sys.stderr, flush=True)
            self._run = wandb.init(**{**start, "mode": "offline"})
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        for artifact in run.inputs.values():
            self._use(artifact)

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self._run.log({"step": step, **grouped(values)})

    def system(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def alert(self, kind: str, text: str) -> None:
        self._run.alert(title=kind, text=text, level="ERROR" if kind == "fault" else "WARN", wait_duration=60)

    def artifact(self, artifact: Artifact) -> None:
        self._run.log_artifact(self._described(artifact, self._option.upload))

    def close(self, summary: Mapping[str, Value]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary else 1)

    def _use(self, artifact: Artifact) -> None:
        described = self._described(artifact, upload=False)
        if self._run.settings.mode == "offline":
            self._run._log_artifact(described, use_after_commit=True)  # use_artifact, which asks the server first
        else:
            self._run.use_artifact(described)

    def _described(self, artifact: Artifact, upload: bool) -> Any:
        """The same artifact has the same name wherever it is made or used: that is what links runs."""
        import wandb

        facts = {
            "id": artifact.id,
            "recipe": artifact.recipe,
            "inputs": {n: i["id"] for n, i in artifact.inputs.items()},
        }
        described = wandb.Artifact(f"{artifact.kind}-{artifact.id}", artifact.kind, metadata=facts)
        if upload:
            for name in artifact.files:
                described.add_file(str(artifact.path / name), name)
        else:
            described.add_reference(artifact.path.resolve().as_uri(), checksum=False)  # the manifest has them
        return described
