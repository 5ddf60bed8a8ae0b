"""`python -m tools.annotate items=items.jsonl votes=ann.jsonl annotator=ann`: say which of two answers is better.

Each pair is shown once, its answers in a random order of the annotator's own. A vote is on disk before the next pair is
shown; the same command goes on where it was left. `corpus=votes` makes preferences of the votes.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf import entry
from conf.registry import register
from data_pipeline.artifact import fingerprint
from data_pipeline.votes import SIDES, TIE, read_items, read_votes

SKIP, QUIT = "s", "q"
HELP = f"1 or 2: this answer is better, 0: neither is, {SKIP}: skip, {QUIT}: quit"


@register("", "annotate_schema")
@dataclass(frozen=True)
class AnnotateConfig:
    """Compare answers, pair by pair.

    Args:
        items: file of {"id", "prompt", "responses": [a, b]}.
        votes: file that votes are appended to, as {"item", "annotator", "label"}.
        annotator: whose votes they are.
    """

    items: str = MISSING
    votes: str = MISSING
    annotator: str = MISSING


def shown(value: Any) -> str:
    """Text or messages, for a terminal: without characters that could steer it."""
    text = value if isinstance(value, str) else "\n\n".join(f"[{turn['role']}] {turn['content']}" for turn in value)
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def order_of(annotator: str, item: str) -> tuple[str, str]:
    """Which answer is shown first, and which second."""
    return SIDES if int(fingerprint([annotator, item]), 16) % 2 else SIDES[::-1]


def left(items: dict[str, dict[str, Any]], voted: set[str], annotator: str) -> Iterator[dict[str, Any]]:
    """Items without a vote, in an order of the annotator's own, so that all are voted on alike where nobody ends."""
    for item in sorted(items, key=lambda item: fingerprint([annotator, item, "order"])):
        if item not in voted:
            yield items[item]


def label_of(key: str, order: tuple[str, str]) -> str | None:
    """The label that a key stands for; None where it is no vote."""
    return {"1": order[0], "2": order[1], "0": TIE}.get(key)


def append(file: Path, vote: dict[str, str]) -> None:
    """One line, on disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(json.dumps(vote, ensure_ascii=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def ask(item: dict[str, Any], order: tuple[str, str], person: bool) -> str | None:
    """Show a pair and read what is thought of it: a label, SKIP, or None at the end."""
    first, second = (shown(item["responses"][SIDES.index(side)]) for side in order)
    print(f"\n=== {shown(item['id'])}\n{shown(item['prompt'])}\n\n--- 1\n{first}\n\n--- 2\n{second}\n", flush=True)
    while True:
        try:
            key = input(f"{HELP} > " if person else "").strip().lower()
        except (EOFError, KeyboardInterrupt):
            return None
        if key == QUIT:
            return None
        if key == SKIP:
            return SKIP
        if (label := label_of(key, order)) is not None:
            return label
        print(f"{key!r} is none of these. {HELP}", flush=True)


def main(config: AnnotateConfig, resolved: dict[str, Any]) -> int:
    items = read_items(Path(config.items))
    file = Path(config.votes)
    votes = read_votes([file], items) if file.exists() else {}
    voted = {item for item, labels in votes.items() if config.annotator in labels}
    done = 0
    for item in left(items, voted, config.annotator):
        label = ask(item, order_of(config.annotator, item["id"]), sys.stdin.isatty())
        if label is None:
            break
        if label != SKIP:
            append(file, {"item": item["id"], "annotator": config.annotator, "label": label})
            done += 1
    print(
        f"{done} votes of {config.annotator} added to {file}; {len(items) - len(voted) - done} of {len(items)} are left"
    )
    return 0


if __name__ == "__main__":
    entry.run("annotate", AnnotateConfig, main)
