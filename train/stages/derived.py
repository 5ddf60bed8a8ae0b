"""Stages that make an artifact from finished ones in one go: nothing to resume, all or nothing."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from conf.errors import OccupiedError
from data_pipeline.artifact import MANIFEST, Artifact, Draft, finished, locked


@contextmanager
def deriving(
    path: str | Path, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Artifact]
) -> Iterator[Draft | None]:
    """Hold a directory and give a draft to fill in and publish; None where exactly this was made before.

    Raises:
        LiveRunError: another process writes the directory.
        OccupiedError: it holds another artifact.
        ArtifactError: what was made before is damaged.
    """
    path = Path(path)
    with locked(path):
        if done := finished(path, kind, config, inputs):
            done.verify()
            print(f"{path} is finished ({done.id}): nothing to do", flush=True)
            yield None
            return
        if (path / MANIFEST).exists():
            there = Artifact.read(path)
            made_from = ", ".join(f"{name} {link['id']}" for name, link in there.inputs.items()) or "nothing"
            raise OccupiedError(
                f"{path} holds a finished {there.kind!r} (made from {made_from}), which this stage would not make: its "
                "configuration or inputs are others. Give another run_dir, or move that one away."
            )
        yield Draft(path, kind, dict(config), dict(inputs))
