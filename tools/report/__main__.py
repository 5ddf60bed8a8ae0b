"""`python -m tools.report runs=runs/demo`: read the stages, draw, write `report.html` and the artifact around it."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from conf import entry
from conf.errors import LongrunError
from conf.registry import register
from data_pipeline.artifact import MANIFEST, Draft, finished, locked, withdraw, write_atomically
from tools.report.page import BASE, render
from tools.report.read import KIND, Life, read

PAGE = "report.html"


class EmptyLifeError(LongrunError):
    """There is nothing to report on."""


@register("", "report_schema")
@dataclass(frozen=True)
class ReportConfig:
    """Write one self-contained page about all stages in a directory.

    Args:
        runs: directory that holds one directory per stage; a link to the page is put there.
        run_dir: the directory that becomes the artifact.
        title: the page's title; empty for the name of `runs`.
    """

    runs: str = MISSING
    run_dir: str = "${runs}/report"
    title: str = ""


def main(config: ReportConfig, resolved: dict[str, Any]) -> int:
    root, directory = Path(config.runs), Path(config.run_dir)
    life = read(root)
    if not life.stages:
        raise EmptyLifeError(f"{root} holds no stage: nothing in it has a {MANIFEST}. Run a lifecycle first.")
    inputs = {stage.name: stage.artifact for stage in life if stage.artifact}
    recipe = {"title": config.title, "missing": _missing(life), "page": _code()}
    with locked(directory):
        if (made := finished(directory, KIND, recipe, inputs)) and not made.damage(contents=False):
            _link(root, directory)
            print(f"{directory / PAGE} shows these artifacts already")
            return 0
        withdraw(directory, KIND)
        draft = Draft(directory, KIND, recipe, inputs)
        write_atomically(directory / PAGE, render(life, config.title or root.resolve().name))
        draft.metrics = {"stages": len(inputs), "missing": len(life.stages) - len(inputs)}
        draft.publish(PAGE)
    _link(root, directory)
    print(f"the report is {(root / PAGE).resolve().as_uri()}")
    return 0


def _missing(life: Life) -> dict[str, str]:
    return {stage.name: stage.note for stage in life if stage.note or not stage.artifact}


def _code() -> str:
    """A page drawn by other code is another page."""
    files = [BASE, *sorted(file for file in Path(__file__).parent.iterdir() if file.is_file())]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _link(root: Path, directory: Path) -> None:
    """`report.html` beside the stages, where a person looks for it."""
    link = root / PAGE
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(directory / PAGE, root))


if __name__ == "__main__":
    entry.run("report", ReportConfig, main)
