"""A trial that costs nothing, as a process: its loss is a bowl over `lr`; asked to stop, it ends with 75."""

import json
import signal
import sys
import time
from pathlib import Path

from data_pipeline.artifact import Draft, locked
from tests.launchers.scripted import STEPS, loss

STEP_S = 0.2

if __name__ == "__main__":
    values = dict(text.split("=", 1) for text in sys.argv[1:])
    directory = Path(values.pop("run_dir"))
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda *_: asked.append(True))
    if values["lr"] == "0":
        sys.exit("why it failed")
    with locked(directory):
        checkpoint = directory / "checkpoint"
        first = int(checkpoint.read_text()) + 1 if checkpoint.exists() else 1
        for step in range(first, STEPS + 1):
            value = loss(float(values["lr"]), 0, step)
            with open(directory / "metrics.jsonl", "a") as stream:
                stream.write(json.dumps({"step": step, "validation_loss": value}) + "\n")
            checkpoint.write_text(f"{step}")
            if asked:
                sys.exit(75)
            time.sleep(STEP_S)
        draft = Draft(directory, "bowl", values, {}, metrics={"validation_loss": value})
        draft.publish("metrics.jsonl")
