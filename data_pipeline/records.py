"""JSON lines that people wrote: every record is checked before any is used, and all faults are reported together."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from conf.errors import LongrunError
from data_pipeline.rows import rows
from data_pipeline.tool_calls import call_faults

ROLES = ("system", "user", "assistant", "tool")
KIND = "chat"
"""Of artifacts that hold conversations and preferences."""
SHOWN = 20
"""Faults listed in a message; the others are counted."""


class RecordError(LongrunError):
    """Records of a file do not have the expected shape; names file, line, what was found and what was expected."""


class EmptySetError(LongrunError):
    """A data set holds nothing that can be used."""


def read_records(directory: str | Path, stem: str, faults: Callable[[Any], list[str]]) -> list[dict[str, Any]]:
    """Read `<directory>/<stem>.jsonl`.

    Args:
        directory: an artifact, or any directory with such a file.
        stem: the file's name without its ending.
        faults: says of one record what is wrong with it: "found ...; expected ...".

    Raises:
        RecordError: lists every record that is not JSON or has a fault.
        FileError: the file cannot be read.
        EmptySetError: there is no such file, or no record in it.
    """
    file = Path(directory) / f"{stem}.jsonl"
    if not file.exists():
        present = ", ".join(sorted(f.name for f in Path(directory).glob("*.jsonl"))) or "no .jsonl file"
        raise EmptySetError(
            f"{file} does not exist; the directory holds {present}. Give the directory of a chat artifact."
        )
    records, bad = [], []
    for row in rows(file):
        bad += [f"{file}:{row.number}: {fault}" for fault in ([row.fault] if row.reason else faults(row.value))]
        records.append(row.value)
    if bad:
        raise RecordError(listed(bad, "fault", file))
    if not records:
        raise EmptySetError(f"{file} holds no record; there is nothing to train on or to measure.")
    return records


def listed(faults: Sequence[str], noun: str, where: object) -> str:
    """The message of an error that lists faults: how many, the first of them, and that no more was done."""
    more = f"\n  and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
    count = f"1 {noun}" if len(faults) == 1 else f"{len(faults)} {noun}s"
    return f"{count} in {where}; nothing was started.\n  " + "\n  ".join(faults[:SHOWN]) + more


def write_records(file: Path, records: Sequence[dict[str, Any]]) -> int:
    """One JSON object per line; returns how many."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return len(records)


def message_faults(messages: Any, field: str) -> list[str]:
    """What keeps `messages` from being a list of {"role", "content"}, each with calls of tools at most.

    Args:
        messages: the value found.
        field: where it was found, for the message.
    """
    if not isinstance(messages, list) or not messages:
        return [f"{field} is {found(messages)}; expected a list of messages"]
    faults = []
    for number, message in enumerate(messages):
        where = f"{field}[{number}]"
        if not isinstance(message, dict):
            faults.append(f'{where} is {found(message)}; expected {{"role": ..., "content": ...}}')
            continue
        if message.get("role") not in ROLES:
            faults.append(f"{where}.role is {message.get('role')!r}; expected one of {', '.join(ROLES)}")
        content = message.get("content")
        if not isinstance(content, str):
            faults.append(f"{where}.content is {found(content)}; expected text")
        elif message.get("role") == "assistant" and not content.strip() and "tool_calls" not in message:
            faults.append(f"{where} is an empty assistant turn; expected text to learn, or no such turn")
        if "weight" in message and message["weight"] not in (0, 1):
            faults.append(f"{where}.weight is {found(message['weight'])}; expected 0 or 1")
        if "tool_calls" in message:
            faults += call_faults(message["tool_calls"], where)
            if message.get("role") != "assistant":
                faults.append(f"{where} has tool_calls; only the assistant may call")
    return faults


def without_assistant(messages: list[dict[str, Any]]) -> bool:
    return not any(message["role"] == "assistant" for message in messages)


def found(value: Any) -> str:
    """A value, for a message: its type and its beginning."""
    if value is None:
        return "missing"
    text = json.dumps(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
