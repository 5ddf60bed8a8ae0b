"""What the trainer's checkpoints are called, for those that write them and those that only look how far a run is."""

import re
from pathlib import Path

CHECKPOINTS = "checkpoints"
"""Their directory in a run's."""
NAME = re.compile(r"step-(\d{8,})")


def steps(directory: Path) -> list[int]:
    """The steps with a committed checkpoint, oldest first."""
    names = [entry.name for entry in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(match[1]) for name in names if (match := NAME.fullmatch(name)))
