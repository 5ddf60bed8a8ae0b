"""A stage that costs nothing, in the shape of the real ones: typed configuration, inputs, artifact, exit codes."""

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING

from conf import entry
from conf.errors import LongrunError, OccupiedError, Problem
from data_pipeline.artifact import Artifact, Draft, finished, locked


@dataclass
class DummyConfig:
    """See `main` for what each behaviour does."""

    run_dir: str = MISSING
    source: str = ""
    sources: list[str] = field(default_factory=list)
    value: int = 0
    text: str = ""
    behaviour: str = "well"
    seconds: float = 0.0
    defaults: list[Any] = field(
        default_factory=lambda: [
            {"override hydra/job_logging": "none"},
            {"override hydra/hydra_logging": "none"},
            "_self_",
        ]
    )
    hydra: Any = field(default_factory=lambda: {"output_subdir": None, "run": {"dir": "."}})

    def problems(self) -> list[Problem]:
        return [] if self.value >= 0 else [Problem("value", self.value, "0 or more")]


def main(config: DummyConfig, resolved: dict[str, Any]) -> int:
    said = os.environ
    rank = int(said.get("RANK") or said.get("SLURM_PROCID") or 0)
    size = int(said.get("WORLD_SIZE") or said.get("SLURM_STEP_NUM_TASKS") or 1)
    print(f"rank {rank} of {size} with value {config.value} and text {config.text}")
    directory = Path(config.run_dir)
    if rank:
        time.sleep(config.seconds)
        return 0
    inputs = {Path(p).name: Artifact.read(p) for p in [config.source, *config.sources] if p}
    recipe = {"value": config.value, "text": config.text}
    with locked(directory):
        if finished(directory, "dummy", recipe, inputs):
            return 0
        if (directory / "manifest.json").exists():
            raise OccupiedError(f"{directory} was made by another configuration")
        starts = directory / "starts"
        starts.write_text(f"{int(starts.read_text()) + 1 if starts.exists() else 1}")
        (directory / "checkpoints").mkdir(exist_ok=True)
        match config.behaviour:
            case "fails":
                raise LongrunError("something the user can mend")
            case "early" if int(starts.read_text()) < 3:
                return 75
            case "early once" if int(starts.read_text()) < 2:
                return 75
            case "always early":
                return 75
            case "loses a rank" if int(starts.read_text()) < 3:
                (directory / "checkpoints" / f"step-{int(starts.read_text()):08d}").mkdir()
                return 76
            case "always loses a rank":
                os.kill(os.getpid(), signal.SIGKILL)
            case "leaves nothing":
                return 0
            case "stops on request":
                for number in (signal.SIGTERM, signal.SIGUSR2):
                    signal.signal(number, lambda *_: sys.exit(75))
            case "ignores requests":
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
        draft = Draft(directory, "dummy", recipe, inputs)
        print("working", flush=True)
        time.sleep(config.seconds)
        (directory / "out.txt").write_text(f"{config.value}")
        draft.publish("out.txt")
    return 0


if __name__ == "__main__":
    ConfigStore.instance().store(name="dummy", node=DummyConfig)
    entry.run("dummy", DummyConfig, main)
