"""`corpus=text`: raw text to token shards. The settings; the work is in build.py."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import Problem
from conf.registry import register
from data_pipeline.config import DataSet, PipelineConfig
from data_pipeline.corpus.build import build
from data_pipeline.executors.base import Executor
from data_pipeline.executors.local import LOCAL
from data_pipeline.steps.base import Step
from data_pipeline.templates import NAMES, special_tokens, template_problems
from data_pipeline.tokenizer import BYTES, SPECIALS, TRAINERS

NAME = re.compile(r"[a-z][a-z0-9_]*")
STAGES = ("read", "split", "tokenizer", "shards", "tokenise")
"""Of the build; no curation step may be called like one."""


@register("corpus", "text_schema")
@dataclass(frozen=True)
class TextCorpus(DataSet):
    """Read, normalise, filter, deduplicate, split, train a tokenizer, tokenise.

    Args:
        sources: name -> where text comes from; see the group `corpus/source`.
        paths: what `corpus=files` reads: directories or single files of text, code and JSON lines.
        readable: least share of what the sources hold that must be readable, in [0, 1].
        steps: name -> curation step; see the group `corpus/step`.
        order: names of the steps that run, in this order.
        validation: share of documents in the validation split, in [0, 1).
        test: share of documents in the test split, in [0, 1).
        tokenizer: directory of the tokenizer to use, for instance a Hugging Face model's; empty trains one.
        algorithm: how it is trained otherwise: "bpe" or "unigram" on bytes, which give back every text as it was, or
            "wordpiece", which forgets white space and cannot express every character.
        vocabulary: ids of the tokenizer that is trained, special tokens included.
        tokenizer_bytes: most text that it is trained on, in bytes; a uniform sample of the train split.
        special_tokens: further ones of the tokenizer that is trained, written <|name|>.
        chat_template: one of ours (chatml, llama3, plain, qwen) that goes with the tokenizer, whose special tokens one
            that is trained gets; empty takes chatml for that, and leaves a given one as it is.
        encodable: least share of the documents that the tokenizer must be able to express, in [0, 1].
        pieces: parts that the work is cut into: at most so many processes, and what a kill can lose of a step.
    """

    sources: dict[str, Any] = field(default_factory=dict)
    paths: list[str] = field(default_factory=list)
    readable: float = 0.9
    steps: dict[str, Any] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    validation: float = 0.01
    test: float = 0.01
    tokenizer: str = ""
    algorithm: str = "bpe"
    vocabulary: int = 32768
    tokenizer_bytes: int = 200_000_000
    special_tokens: list[str] = field(default_factory=list)
    chat_template: str = ""
    encodable: float = 0.9
    pieces: int = 8

    @property
    def ordered(self) -> dict[str, Step]:
        """The steps that run, in order."""
        return {name: self.steps[name] for name in self.order}

    @property
    def specials(self) -> list[str]:
        """Special tokens of the tokenizer that is trained."""
        wanted = special_tokens(self.chat_template) if self.chat_template in NAMES else []
        return list(dict.fromkeys([*SPECIALS, *wanted, *self.special_tokens]))

    def problems(self, config: PipelineConfig, world_size: int) -> list[Problem]:
        found = []
        if not self.sources:
            found.append(Problem("corpus.sources", "{}", "at least one; corpus=demo and corpus=files bring some"))
        for name, source in self.sources.items():
            found += source.problems(f"corpus.sources.{name}")
        for name in self.order:
            if not NAME.fullmatch(name) or name in STAGES:
                fix = f"a name of letters, digits and _ in lower case, other than {', '.join(STAGES)}"
                found.append(Problem("corpus.steps", name, fix))
            if name not in self.steps:
                found.append(Problem("corpus.order", name, f"made of {', '.join(self.steps) or 'corpus.steps'}"))
            else:
                found += self.steps[name].problems(f"corpus.steps.{name}")
        if twice := {name for name in self.order if self.order.count(name) > 1}:
            fix = "each name once; give a step that runs twice a second name in corpus.steps"
            found.append(Problem("corpus.order", ", ".join(sorted(twice)), fix))
        for key in ("readable", "encodable"):
            if not 0 <= getattr(self, key) <= 1:
                found.append(Problem(f"corpus.{key}", getattr(self, key), "a share in [0, 1]"))
        if self.algorithm not in TRAINERS:
            found.append(Problem("corpus.algorithm", self.algorithm, f"one of {', '.join(TRAINERS)}"))
        for token in self.special_tokens:
            if not re.fullmatch(r"<\|\w+\|>", token):  # any other could be learnt, or written, as a word
                found.append(Problem("corpus.special_tokens", token, "letters, digits and _ between <| and |>"))
        found += template_problems("corpus.chat_template", self.chat_template)
        least = BYTES + len(self.specials)
        if not self.tokenizer and self.vocabulary < least:
            found.append(Problem("corpus.vocabulary", self.vocabulary, f"at least {least}: bytes and special tokens"))
        for key in ("validation", "test"):
            if not 0 <= getattr(self, key) < 1:
                found.append(Problem(f"corpus.{key}", getattr(self, key), "a share in [0, 1)"))
        if self.validation + self.test >= 1:
            found.append(Problem("corpus.test", self.test, "less than 1 - corpus.validation: some text must train"))
        if self.pieces < 1:
            found.append(Problem("corpus.pieces", self.pieces, "at least 1"))
        return found

    def run(self, config: PipelineConfig, resolved: dict[str, Any]) -> int:
        executor: Executor = config.executor or LOCAL
        build(self, Path(config.run_dir), Path(config.cache), executor.at_once(config.workers), executor)
        return 0
