"""What is on disk of a run's checkpoints: which steps, and whether they are as they were written."""

import json
import zlib
from pathlib import Path

from conf.checkpoints import steps as steps
from conf.errors import LongrunError

CHECKSUMS = "checksums.json"
TRAINER = "trainer.json"
INDEX = "index.json"
PICKLED_INDEX = ".metadata"
"""What torch's own writer calls its index, and this program did until it had its own."""


class CheckpointError(LongrunError):
    """A checkpoint cannot be written, or none of those on disk can be read."""


class FencedError(CheckpointError):
    """Another run has taken over the directory: this one must not commit."""


def path_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}"


def damaged_of(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.damaged"


def damage(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint's files: missing, of another size, or of another checksum.

    Args:
        part: which share of the files to look at, so that `parts` ranks can divide them.
    """
    try:
        recorded: dict[str, dict[str, int]] = json.loads((checkpoint / CHECKSUMS).read_text())
        names = sorted(recorded)
        if PICKLED_INDEX in names:
            return [f"its index ({PICKLED_INDEX}) is a pickle, of an older release; those can run code and stay closed"]
        if not {INDEX, TRAINER} <= set(names) or any(Path(name).name != name for name in names):
            return [f"{CHECKSUMS} is not that of a checkpoint"]
        found = [_damage_of(checkpoint / name, recorded[name]) for name in names[part::parts]]
        return [reason for reason in found if reason]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{CHECKSUMS} cannot be read: {error}"]


def _damage_of(file: Path, recorded: dict[str, int]) -> str:
    try:
        if not file.exists():
            return f"{file.name} is missing"
        if (size := file.stat().st_size) != recorded["bytes"]:
            return f"{file.name} has {size} bytes, {recorded['bytes']} were written"
        return (
            "" if crc32_of(file) == recorded["crc32"] else f"{file.name} has another checksum than when it was written"
        )
    except OSError as error:
        return f"{file.name} cannot be read: {error.strerror}"


def crc32_of(file: Path) -> int:
    value = 0
    buffer = memoryview(bytearray(1 << 22))
    with open(file, "rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            value = zlib.crc32(buffer[:count], value)
    return value
