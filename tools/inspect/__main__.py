"""`python -m tools.inspect`: from documents to samples and back.

    corpus=runs/demo/corpus document='Flask/docs/index.rst'     its way through the steps
    corpus=runs/demo/corpus text='a few words of it'            the documents that hold them
    run=runs/demo/pretrain sample=17                            sample 17 of the run, token by token
    run=runs/demo/pretrain step=100                             the samples and documents of a step
    run=runs/demo/pretrain document='Flask/docs/index.rst'      the steps that see it
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data_pipeline.config
import train.config  # noqa: F401  registers what a run can be made of
from conf import entry
from conf.errors import Problem
from conf.registry import register
from tools.chat import quoted
from tools.inspect import show
from tools.inspect.errors import InspectError
from tools.inspect.run import Run
from tools.inspect.trail import Corpus, follow, search

FREE_TEXT = ("document", "text")


@register("", "inspect_schema")
@dataclass(frozen=True)
class InspectConfig:
    """Show where a document went, what a sample holds, what a training step saw.

    Args:
        corpus: directory of a corpus; with `document` or `text`.
        run: directory of a training run, finished or not; with `sample`, `step`, `document` or `text`.
        document: id of a document, as quarantine, the data card and samples show it.
        text: words that stand in a document exactly so.
        sample: position of a sample in the run, from 0; -1 for none.
        step: training step, from 1 as the logs number them; 0 for none.
    """

    corpus: str = ""
    run: str = ""
    document: str = ""
    text: str = ""
    sample: int = -1
    step: int = 0

    def problems(self) -> list[Problem]:
        """One thing must be asked of one place."""
        if bool(self.corpus) == bool(self.run):
            return [Problem("corpus", self.corpus or "''", "either the directory of a corpus, or run=... of a run")]
        asked = {
            "document": bool(self.document),
            "text": bool(self.text),
            "sample": self.sample >= 0,
            "step": self.step > 0,
        }
        possible = list(asked) if self.run else ["document", "text"]
        chosen = [key for key, given in asked.items() if given]
        if len(chosen) != 1 or chosen[0] not in possible:
            place = "run" if self.run else "corpus"
            fix = f"one of {', '.join(possible)} with {place}=..."
            return [Problem(chosen[-1] if chosen else possible[0], " and ".join(chosen) or "''", fix)]
        return []


def main(config: InspectConfig, resolved: dict[str, Any]) -> int:
    if config.corpus:
        corpus = Corpus(Path(config.corpus))
        show.trail(corpus, follow(corpus, config.document or only(corpus, config.text)))
        return 0
    run = Run(Path(config.run))
    if config.sample >= 0:
        show.sample(run, config.sample)
    elif config.step:
        show.step(run, config.step)
    else:
        for path in run.paths:
            corpus = Corpus(path)
            name = config.document or only(corpus, config.text)
            trail = follow(corpus, name)
            if trail.split == "train":
                show.seen(run, trail, corpus.path / "shards" / "train")
            else:
                show.unseen(trail)
    return 0


def only(corpus: Corpus, fragment: str) -> str:
    """Id of the document that holds the fragment.

    Raises:
        InspectError: none does, or several do; lists them.
    """
    matches = search(corpus, fragment)
    if not matches:
        raise InspectError(
            f"no document of {corpus.path} holds {fragment!r}. Line ends and spaces count; give fewer words."
        )
    if len(matches) > 1:
        lines = [f"  {match.id}  ({match.where}): {match.around}" for match in matches]
        raise InspectError(
            f"{len(matches)} documents of {corpus.path} hold {fragment!r}, at the least:\n" + "\n".join(lines) + "\n"
            "Give one of these as document=..., or more of its text."
        )
    return matches[0].id


if __name__ == "__main__":
    sys.argv[1:] = quoted(sys.argv[1:], FREE_TEXT)
    entry.run("inspect", InspectConfig, main)
