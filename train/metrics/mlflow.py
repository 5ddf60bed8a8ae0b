"""MLflow: a tracking server, or a database file beside the runs; the same run after every restart."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from conf.registry import register
from data_pipeline.artifact import MANIFEST, Artifact, write_atomically
from train.metrics.base import Run, Sink, Value, grouped, numbers

ID_FILE = "mlflow_id"
URI = "MLFLOW_TRACKING_URI"
MOST_PARAMETERS = 100
"""In one call."""
LONGEST = 500
"""Characters of a parameter that every store takes."""


@register("logger", "mlflow", package="logger.mlflow")
@dataclass(frozen=True)
class MLflow:
    """Send figures, configuration and summary to MLflow (extra `mlflow`). Where to is MLFLOW_TRACKING_URI, without it
    the file `mlflow.db` beside the run directory: look at it with `mlflow ui --backend-store-uri sqlite:///runs/mlflow.db`.
    Credentials are MLflow's own environment variables.

    Args:
        experiment: what the run belongs to.
    """

    experiment: str = "longrun"
    apart: ClassVar[bool] = True

    def open(self, run: Run) -> Sink:
        return _Tracked(self, run)


class _Tracked:
    def __init__(self, option: MLflow, run: Run):
        from mlflow.tracking.client import MlflowClient

        beside = run.directory.resolve().parent
        uri = os.environ.get(URI)
        self._client = MlflowClient(tracking_uri=uri or f"sqlite:///{beside}/mlflow.db")
        id_file = run.directory / ID_FILE
        if run.resumed_step == 0 or not id_file.exists():
            experiment = self._client.get_experiment_by_name(option.experiment)
            place = None if uri else (beside / "mlflow_artifacts").as_uri()
            number = (
                experiment.experiment_id if experiment else self._client.create_experiment(option.experiment, place)
            )
            self._id = self._client.create_run(number, run_name=run.name).info.run_id
            write_atomically(id_file, self._id)
            self._describe(run)
        else:
            self._id = id_file.read_text().strip()
            self._client.update_run(self._id, status="RUNNING")

    def _describe(self, run: Run) -> None:
        """Parameters are written once: MLflow refuses to change them."""
        from mlflow.entities import Param, RunTag

        flat = [Param(name, str(value)[:LONGEST]) for name, value in _flat(run.config)]
        for start in range(0, len(flat), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=flat[start : start + MOST_PARAMETERS])
        tags = [RunTag(f"input.{name}", artifact.id) for name, artifact in run.inputs.items()]
        self._client.log_batch(self._id, tags=[*tags, RunTag("run_dir", str(run.directory))])

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        self._metrics(step, grouped(values))

    def system(self, step: int, values: Mapping[str, float]) -> None:
        self._metrics(step, values)

    def _metrics(self, step: int, values: Mapping[str, Value]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now_ms, step) for name, value in numbers(values)])

    def alert(self, kind: str, text: str) -> None:
        self._client.set_tag(self._id, f"alert.{kind}", text)

    def artifact(self, artifact: Artifact) -> None:
        self._client.set_tag(self._id, "artifact", artifact.id)
        self._client.log_artifact(self._id, str(artifact.path / MANIFEST))

    def close(self, summary: Mapping[str, Value]) -> None:
        if summary:
            self._metrics(int(summary.get("steps", 0)), {f"summary/{name}": v for name, v in summary.items()})
        self._client.set_terminated(self._id, "FINISHED" if summary else "KILLED")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found += _flat(value, f"{prefix}{name}.") if inner else [(prefix + str(name), value)]
    return found
