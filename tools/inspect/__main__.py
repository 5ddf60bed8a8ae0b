"""`python -m tools.inspect`: from documents to samples and back.

path=runs/demo/corpus document=Flask/docs/index.rst     its way through the steps
path=runs/demo/corpus text='a few words of it'          the same, of the document that holds them
path=runs/demo/pretrain sample=17                       sample 17 of the run, token by token
path=runs/demo/pretrain step=100                        the samples and documents of a step
path=runs/demo/pretrain document=Flask/docs/index.rst   the steps that see it
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import MISSING

import data_pipeline.config  # noqa: F401  registers what a corpus can be made of
import train.config  # noqa: F401  and a run
from conf import entry
from conf.errors import Problem
from conf.registry import register
from tools.chat import quoted
from tools.inspect import show
from tools.inspect.errors import InspectError, NotFoundError
from tools.inspect.run import Run
from tools.inspect.trail import MOST_MATCHES, Corpus, Trail, follow, search
from train.rundir import CONFIG

FREE_TEXT = ("document", "text")


@register("", "inspect_schema")
@dataclass(frozen=True)
class InspectConfig:
    """Show where a document went, what a sample holds, what a training step saw.

    Args:
        path: directory of a corpus, or of a training run, finished or not.
        document: id of a document, as quarantine, the data card and samples show it.
        text: words that stand in a document exactly so.
        sample: position of a sample in the run, from 0; -1 for none.
        step: training step, from 1 as the logs number them; 0 for none.
    """

    path: str = MISSING
    document: str = ""
    text: str = ""
    sample: int = -1
    step: int = 0

    def problems(self) -> list[Problem]:
        """One thing must be asked."""
        asked = {"document": self.document, "text": self.text, "sample": self.sample >= 0, "step": self.step > 0}
        chosen = [key for key, given in asked.items() if given]
        if len(chosen) == 1:
            return []
        return [Problem(" and ".join(chosen) or "document", "given" if chosen else "''", f"one of {', '.join(asked)}")]


def main(config: InspectConfig, resolved: dict[str, Any]) -> int:
    path = Path(config.path)
    if not (path / CONFIG).exists():
        if config.sample >= 0 or config.step:
            raise InspectError(f"{path} is no training run: it has no {CONFIG}. Give the run_dir of one.")
        corpus = Corpus(path)
        show.trail(corpus, follow(corpus, config.document or only(corpus, config.text)))
        return 0
    run = Run(path)
    if config.sample >= 0:
        show.sample(run, config.sample)
    elif config.step:
        show.step(run, config.step)
    else:
        for corpus, way in ways([Corpus(path) for path in dict.fromkeys(run.paths)], config):
            show.seen(run, way, corpus.path / "shards" / "train")
    return 0


def ways(corpora: Sequence[Corpus], config: InspectConfig) -> list[tuple[Corpus, Trail]]:
    """The way of the document that is asked for, in each of the corpora that have it.

    Raises:
        InspectError: none has it, or one has several that hold the text.
    """
    found, missing = [], []
    for corpus in corpora:
        try:
            found.append((corpus, follow(corpus, config.document or only(corpus, config.text))))
        except NotFoundError as error:
            missing.append(str(error))
    if not found:
        raise NotFoundError("\n".join(missing))
    return found


def only(corpus: Corpus, fragment: str) -> str:
    """Id of the document that holds the fragment.

    Raises:
        NotFoundError: none does.
        InspectError: several do; lists them.
    """
    matches = search(corpus, fragment)
    if not matches:
        raise NotFoundError(
            f"no document of {corpus.path} holds {fragment!r}. Line ends and spaces count; give fewer words."
        )
    if len(matches) > 1:
        count = f"{len(matches)} documents{' or more' if len(matches) == MOST_MATCHES else ''}"
        lines = [f"  {match.id}  ({match.where}): {match.around}" for match in matches]
        raise InspectError(
            "\n".join([f"{count} of {corpus.path} hold {fragment!r}:", *lines])
            + "\nGive one of these as document=..., or more of its text."
        )
    return matches[0].id


if __name__ == "__main__":
    sys.argv[1:] = quoted(sys.argv[1:], FREE_TEXT)
    entry.run("inspect", InspectConfig, main)
