"""Where a rank stands: the line of ours that it is at, and the collectives that it has come to.

The latter is what torch's flight recorder holds: the last collectives of every process group, numbered.
"""

import faulthandler
import json
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self, TextIO

import torch

ROOT = Path(__file__).parent.parent
RECORDED = 2000
"""Collectives that the flight recorder keeps (TORCH_FR_BUFFER_SIZE)."""
RECORDERS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
"""Of gloo, and of NCCL where torch has it."""
MACHINERY = {__file__, str(Path(__file__).with_name("watch.py")), str(Path(__file__).with_name("distributed.py"))}
"""Files that lead here and say nothing."""


@dataclass(frozen=True)
class Standing:
    """One rank's place in the run.

    Args:
        line: the innermost line of ours that its main thread is at.
        last: the last collective that it came to, as group, number and name; None where it was point to point, or there
            was none.
        since_ns: when that was, in ns of UNIX time.
        reached: group -> number of the last collective in it.
    """

    line: str = "an unknown line"
    last: tuple[str, int, str] | None = None
    since_ns: int = 0
    reached: dict[str, int] = field(default_factory=dict)

    @classmethod
    def here(cls, error: BaseException | None = None) -> Self:
        """Of this process: where its main thread is, or where the error came from."""
        entries = [entry for name in RECORDERS for entry in _recorded(name)]
        reached: dict[str, int] = {}
        for entry in entries:
            if not entry["is_p2p"]:
                reached[_group(entry)] = entry["collective_seq_id"]
        last = max(entries, key=lambda entry: entry["time_created_ns"], default=None)
        if last is None:
            return cls(_line(error))
        name = None if last["is_p2p"] else (_group(last), last["collective_seq_id"], _name(last))
        return cls(_line(error), name, last["time_created_ns"], reached)

    @classmethod
    def read(cls, values: Mapping) -> Self:
        """Back from JSON."""
        last = values["last"]
        return cls(**{**values, "last": (last[0], last[1], last[2]) if last else None})

    def __str__(self) -> str:
        return f"at {self.line}" + (f", in or after {_shown(self.last)}" if self.last else "")


def _recorded(name: str) -> list[dict[str, Any]]:
    dump = getattr(torch._C._distributed_c10d, name, None)
    return json.loads(dump()).get("entries", []) if dump else []


def _group(entry: Mapping) -> str:
    return str(entry["process_group"][0])


def _name(entry: Mapping) -> str:
    return str(entry["profiling_name"]).partition(":")[2] or str(entry["profiling_name"])


def _shown(collective: tuple[str, int, str]) -> str:
    group, number, name = collective
    return f"{name} (collective {number} of group {group})"


def missing(standings: Mapping[int, Standing]) -> tuple[list[int], str]:
    """Of ranks that all wait: those that did not come to the collective where others wait for them, and which one.

    Who waits for whom may go round: a rank that skipped a collective waits in a later one, for those it left waiting.
    So the wait that began first counts.
    """
    for waiting in sorted(standings.values(), key=lambda standing: standing.since_ns):
        if waiting.last is not None:
            group, number, _ = waiting.last
            behind = [rank for rank, other in standings.items() if other.reached.get(group, number) < number]
            if behind:
                return behind, _shown(waiting.last)
    return [], ""


def write_stacks(stream: TextIO, error: BaseException | None = None) -> None:
    """Every thread of this process, and the way of the error that threw it out of its place."""
    stream.write(f"{Standing.here(error)}\n")
    if error is not None:
        stream.write("".join(traceback.format_exception(error)))
    stream.flush()
    faulthandler.dump_traceback(stream, all_threads=True)


def _line(error: BaseException | None) -> str:
    frames: Iterable[tuple[FrameType, int]]
    if error is not None:
        frames = reversed(list(traceback.walk_tb(error.__traceback__)))
    else:
        frames = traceback.walk_stack(sys._current_frames().get(threading.main_thread().ident or 0))
    for frame, number in frames:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and str(file) not in MACHINERY and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{number} in {frame.f_code.co_name}"
    return Standing.line
