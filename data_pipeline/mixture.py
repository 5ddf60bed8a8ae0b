"""Several corpora in the proportions asked for, as one stream of samples whose order is a function.

Sample k of a run: `blend.py` tells which source gives it and how many that source gave before; the source's own
permutation (`order.py`), another one each epoch, tells which of its windows that is. So the state of a mixture is k.

Shape suffixes: S sources, B sequences, L tokens.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conf.errors import LongrunError, Problem
from conf.registry import register
from data_pipeline.artifact import Artifact, fingerprint
from data_pipeline.batch import MicroBatch, Span, Texts
from data_pipeline.blend import LEAST_SHARE, Blend, Stage, segments
from data_pipeline.order import LONGEST, AsNumbered, Orders
from data_pipeline.shards import Shard, ShardError, stem_of
from data_pipeline.text import TextData, window_problems
from data_pipeline.tokenizer import Tokenizer


@dataclass  # not frozen: OmegaConf could not merge a YAML into the values of a dict or list
class MixtureSource:
    """One corpus of a mixture.

    Args:
        path: corpus artifact, as `python -m data_pipeline` writes it; all have the same tokenizer.
        weight: its part of the tokens, relative to the other sources' weights; 0 keeps it for a later stage.
        epochs: most passes over it, for instance 4 or 0.5; 0 for no limit.
        tokens: most tokens that are taken from it, repeated ones included; 0 for no limit.
        packing: see `data=text`.
        long_documents: see `data=text`.
    """

    path: str = ""
    weight: float = 1.0
    epochs: float = 0.0
    tokens: float = 0.0
    packing: str = "stream"
    long_documents: str = "split"

    def text(self, sequence_length: int) -> TextData:
        """The corpus by itself."""
        return TextData(self.path, sequence_length, self.packing, self.long_documents)

    def cap(self, windows: int, sequence_length: int) -> int:
        """Samples that it may give."""
        by_epochs = math.floor(self.epochs * windows) if self.epochs else LONGEST
        by_tokens = math.floor(self.tokens / sequence_length) if self.tokens else LONGEST
        return min(by_epochs, by_tokens, LONGEST)


@dataclass  # not frozen: OmegaConf could not merge a YAML into the values of a dict or list
class MixtureStage:
    """Other weights from some token of the run on.

    Args:
        begin: tokens of the run before it.
        weights: of the sources by name; those not named rest.
    """

    begin: float = 0.0
    weights: dict[str, float] = field(default_factory=dict)


@register("data", "mixture")
@dataclass(frozen=True)
class MixtureData:
    """Windows of running text out of several corpora.

    A source that has given all it may is left out from there on, and the others share the rest by their weights.

    Args:
        sources: the corpora by name.
        stages: changes of the weights, in the order in which they come.
        sequence_length: tokens per window.
        warm_up_from: length warm-up: at the beginning of the run each window is cut into documents of so many tokens,
            a length that doubles until it is `sequence_length`; a step has the same tokens throughout. 0 for none.
        warm_up_tokens: tokens of the run after which windows are whole; each length before lasts equally long.
    """

    sources: dict[str, MixtureSource] = field(default_factory=dict)
    stages: list[MixtureStage] = field(default_factory=list)
    sequence_length: int = 512
    warm_up_from: int = 0
    warm_up_tokens: float = 0.0

    @property
    def corpora(self) -> dict[str, str]:
        """The artifacts that are read, by the names that they have among a run's inputs."""
        return {f"data.{name}": source.path for name, source in self.sources.items()}

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        """Everything wrong with the settings; where they are well, with the corpora and what the run needs of them."""
        found = self._length_problems() + self._source_problems() + self._stage_problems()
        return found or ([] if config.dry_run else self._corpus_problems(config.stage))

    def _length_problems(self) -> list[Problem]:
        found = []
        if self.sequence_length < 1:
            found.append(Problem("data.sequence_length", self.sequence_length, "at least 1 token"))
        lengths = [self.sequence_length]
        while lengths[-1] > 1 and lengths[-1] % 2 == 0:
            lengths.append(lengths[-1] // 2)
        if self.warm_up_from not in (0, *lengths):
            fix = f"data.sequence_length halved so many times: one of {', '.join(map(str, lengths[:0:-1]))}; 0 for none"
            found.append(Problem("data.warm_up_from", self.warm_up_from, fix))
        if not 0 <= self.warm_up_tokens < math.inf:
            found.append(Problem("data.warm_up_tokens", self.warm_up_tokens, "a number of at least 0"))
        if (self.warm_up_from > 0) != (self.warm_up_tokens > 0):
            fix = f"set data.warm_up_tokens with data.warm_up_from ({self.warm_up_from} now), or neither"
            found.append(Problem("data.warm_up_tokens", self.warm_up_tokens, fix))
        return found

    def _source_problems(self) -> list[Problem]:
        found = []
        if not self.sources:
            fix = "+data.sources={web: {path: runs/web}, ...}, or a YAML like conf/experiment/mixture.yaml"
            found.append(Problem("data.sources", {}, fix))
        for name, source in self.sources.items():
            key = f"data.sources.{name}"
            if not source.path:
                found.append(Problem(f"{key}.path", "", "the directory of a corpus, for instance runs/demo/corpus"))
            for part in ("epochs", "tokens"):
                if not 0 <= (value := getattr(source, part)) < math.inf:
                    found.append(Problem(f"{key}.{part}", value, "a number of at least 0; 0 for no limit"))
            if 0 < source.tokens < self.sequence_length:
                fix = f"at least one window of data.sequence_length={self.sequence_length}; 0 for no limit"
                found.append(Problem(f"{key}.tokens", source.tokens, fix))
            found += window_problems(key, source.packing, source.long_documents)
        return found

    def _stage_problems(self) -> list[Problem]:
        """Of the weights, and of when they change."""
        found, begin = [], 0.0
        weights = {name: source.weight for name, source in self.sources.items()}
        if self.sources:
            found += _weight_problems({f"data.sources.{n}.weight": w for n, w in weights.items()}, "data.sources")
        for number, stage in enumerate(self.stages):
            key = f"data.stages[{number}]"
            if not begin < stage.begin < math.inf:
                found.append(Problem(f"{key}.begin", stage.begin, f"more than {begin:g} tokens: stages follow in time"))
            begin = stage.begin
            if unknown := sorted(stage.weights.keys() - self.sources.keys()):
                fix = f"names of data.sources: {', '.join(self.sources)}"
                found.append(Problem(f"{key}.weights", ", ".join(unknown), fix))
            found += _weight_problems({f"{key}.weights.{n}": w for n, w in stage.weights.items()}, f"{key}.weights")
        for name, weight in weights.items():
            if weight == 0 and not any(stage.weights.get(name) for stage in self.stages):
                fix = "no stage names it either: give it a weight, or leave it out"
                found.append(Problem(f"data.sources.{name}.weight", weight, fix))
        return found

    def _corpus_problems(self, stage: Any) -> list[Problem]:
        """What the artifacts say: their splits, tokenizers, and whether they are enough."""
        found: list[Problem] = []
        caps, tokenizers = {}, {}
        for name, source in self.sources.items():
            key = f"data.sources.{name}"
            try:
                artifact = Artifact.read(source.path, kind="corpus")
                tokenizers[name] = artifact.facts["tokenizer"]["fingerprint"]
                windows, _ = source.text(self.sequence_length).windows(Shard(stem_of(artifact, "train")), artifact.id)
            except LongrunError as error:
                found.append(Problem(f"{key}.path", source.path, str(error)))
                continue
            caps[name] = source.cap(len(windows), self.sequence_length)
            if caps[name] < 1:
                fix = f"at least one of its {len(windows)} windows: more epochs; 0 for no limit"
                found.append(Problem(f"{key}.epochs", source.epochs, fix))
        if len(set(tokenizers.values())) > 1:
            fix = (
                f"corpora of one tokenizer, or the same numbers mean other words; make the others again with "
                f"corpus.tokenizer={self.sources[next(iter(tokenizers))].path}/tokenizer"
            )
            told = ", ".join(f"{name} {made_with}" for name, made_with in tokenizers.items())
            found.append(Problem("data.sources", f"tokenizers {told}", fix))
        if found or not hasattr(stage, "global_batch"):
            return found
        plan = segments([caps[name] for name in self.sources], self.changes())
        there, needed = plan[-1].end, stage.steps * stage.global_batch
        if there < needed:
            fix = (
                f"needs {needed:,} samples, and the caps of data.sources (epochs, tokens) allow {there:,}: at most "
                f"{there // stage.global_batch} steps, or raise the caps"
            )
            found.append(Problem("stage.steps", stage.steps, fix))
        for number, change in enumerate(self.changes()[1:]):
            if needed <= change.begin:
                fix = f"less than the {needed * self.sequence_length:,} tokens of the run, or leave the stage out"
                found.append(Problem(f"data.stages[{number}].begin", self.stages[number].begin, fix))
            elif there <= change.begin:
                fix = f"the sources before it have given all they may after {there * self.sequence_length:,} tokens"
                found.append(Problem(f"data.stages[{number}].begin", self.stages[number].begin, fix))
        return found

    def changes(self) -> list[Stage]:
        """The stages, the first one included, as positions in samples."""
        first = Stage(0, tuple(source.weight for source in self.sources.values()))
        later = [
            Stage(math.ceil(s.begin / self.sequence_length), tuple(s.weights.get(name, 0.0) for name in self.sources))
            for s in self.stages
        ]
        return [first, *later]

    def open(self, split: str, tokenizer: Tokenizer, seed: int) -> "Mixture | Union":
        """The mixture of the train split; of another split, all windows of all corpora that have it.

        Raises:
            ArtifactError: a path is no finished corpus.
            ShardError: a split is missing, damaged, empty, or of another tokenizer.
        """
        texts = {name: source.text(self.sequence_length) for name, source in self.sources.items()}
        if split != "train":
            held = {name: text for name, text in texts.items() if _holds(text.path, split)}
            if not held:
                raise ShardError(f"None of the corpora in data.sources has text in its {split} split; give one some.")
            return Union([text.open(split, tokenizer, seed) for text in held.values()])
        opened: dict[str, Texts] = {name: text.open(split, tokenizer, seed) for name, text in texts.items()}
        caps = [source.cap(len(opened[name]), self.sequence_length) for name, source in self.sources.items()]
        warm_up = WarmUp(self.sequence_length, self.warm_up_from, float(self.warm_up_tokens))
        return Mixture(opened, Blend(caps, self.changes(), seed), warm_up)


def _weight_problems(weights: Mapping[str, float], key: str) -> list[Problem]:
    """Of weights that stand under their keys, and all together under `key`."""
    bad = [Problem(name, weight, "a number of at least 0") for name, weight in weights.items() if not weight >= 0]
    total = sum(weights.values())
    if bad:
        return bad
    if not 0 < total < math.inf:
        return [Problem(key, "{" + ", ".join(f"{w:g}" for w in weights.values()) + "}", "weights, one of them above 0")]
    fix = f"0, or at least {LEAST_SHARE:g} of the sum of the weights, {total:g}"
    return [Problem(name, weight, fix) for name, weight in weights.items() if 0 < weight < LEAST_SHARE * total]


def _holds(path: str, split: str) -> bool:
    """Whether a corpus has something to predict in a split."""
    return Artifact.read(path, kind="corpus").metrics["splits"].get(split, {}).get("tokens", 0) > 1


@dataclass(frozen=True)
class WarmUp:
    """How long the documents of a window may be, as a function of the position in the run (GrowLength; Jin et al. 2023,
    arXiv:2310.00576; here with the same tokens per step).

    Args:
        whole: tokens of a window.
        first: tokens at the beginning: `whole` halved some times; 0 for no warm-up.
        tokens: tokens of the run after which windows are whole.
    """

    whole: int
    first: int
    tokens: float

    def length(self, k: int) -> int:
        """Most tokens of a document in sample k."""
        if not self.first or k * self.whole >= self.tokens:
            return self.whole
        doublings = (self.whole // self.first).bit_length() - 1
        return self.first << int(doublings * (k * self.whole) / self.tokens)

    def cut(self, micro_batch: MicroBatch, ks: Sequence[int]) -> MicroBatch:
        """Other documents and positions in the same tokens. Labels stay: the first token of a piece is still predicted
        from the piece before."""
        lengths_B = torch.tensor([self.length(k) for k in ks])
        if bool((lengths_B == self.whole).all()):
            return micro_batch
        places_BL = torch.arange(self.whole) % lengths_B[:, None]
        positions_BL = torch.minimum(micro_batch.positions_BL, places_BL)
        numbers_BL = (positions_BL == 0).cumsum(1) - 1
        documents_BL = numbers_BL.where(micro_batch.documents_BL >= 0, micro_batch.documents_BL)
        return replace(micro_batch, positions_BL=positions_BL, documents_BL=documents_BL)


@dataclass(frozen=True)
class Origin:
    """Where a sample of a run comes from.

    Args:
        source: name of the corpus in the mixture; empty where there is only one.
        epoch: passes over that corpus before this one.
        sample: its number there.
        spans: its documents, in order.
        longest: tokens after which documents are cut at this point of the run (length warm-up).
    """

    source: str
    epoch: int
    sample: int
    spans: list[Span]
    longest: int


class Mixture:
    """Samples of several sources, numbered by their position in the run.

    Args:
        sources: the samples of each source by name, all of one length in tokens.
        blend: which source comes when.
        warm_up: of the length of documents.
    """

    order = AsNumbered()

    def __init__(self, sources: Mapping[str, Texts], blend: Blend, warm_up: WarmUp):
        self.names, self.sources = list(sources), list(sources.values())
        self.blend, self.warm_up = blend, warm_up
        seeds = [int(fingerprint([blend.seed, "source", name]), 16) for name in sources]
        self._orders = Orders([len(source) for source in self.sources], seeds)
        held = {name: source.fingerprint for name, source in sources.items()}
        shares = [[s.begin, s.end, s.bounds_S.tolist()] for s in blend.segments]
        parts = ["mixture", list(held.items()), shares, blend.seed, warm_up.whole, warm_up.first, warm_up.tokens]
        self.fingerprint = fingerprint(parts)

    def __len__(self) -> int:
        return self.blend.length

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The samples at these positions of the run.

        Raises:
            ExhaustedError: a position lies behind the last.
            ShardError: a corpus was damaged after it was opened.
        """
        sources_B, windows_B = self.drawn(np.asarray(indices))
        rows = [np.flatnonzero(sources_B == source) for source in range(len(self.sources))]
        parts = [
            source.micro_batch(windows_B[here].tolist())
            for source, here in zip(self.sources, rows, strict=True)
            if len(here)
        ]
        gathered = torch.from_numpy(np.argsort(np.concatenate(rows)))
        joined = {f.name: torch.cat([getattr(part, f.name) for part in parts])[gathered] for f in fields(MicroBatch)}
        joined["samples_B"] = torch.tensor(indices, dtype=torch.int64)
        return self.warm_up.cut(MicroBatch(**joined), indices)

    def drawn(self, ks: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source, and number of its sample, at each position of the run."""
        sources, numbers = self.blend[ks]
        return sources, self._orders[sources, numbers]

    def origin(self, k: int) -> Origin:
        """Where the sample at a position of the run comes from."""
        (source,), (number,) = self.blend[np.array([k])]
        samples = self.sources[source]
        window = int(self._orders[np.array([source]), np.array([number])][0])
        return Origin(
            self.names[source], int(number) // len(samples), window, samples.spans(window), self.warm_up.length(k)
        )

    def given(self, k: int) -> dict[str, dict[str, float]]:
        """What each source has given before a position of the run: samples, tokens (padding included), epochs."""
        counts = zip(self.names, self.sources, self.blend.taken(k).tolist(), strict=True)
        return {
            name: {"samples": count, "tokens": count * self.warm_up.whole, "epochs": count / len(source)}
            for name, source, count in counts
        }


class Union:
    """All samples of several sets, one set after the other.

    Args:
        parts: the sets, all of one length in tokens.
    """

    def __init__(self, parts: Sequence[Texts]):
        self.parts = parts
        self.fingerprint = fingerprint(["union", *(part.fingerprint for part in parts)])
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The samples with these numbers."""
        chosen = np.searchsorted(self._ends, indices, side="right").tolist()
        rows = [
            self.parts[part].micro_batch([index - int(self._ends[part]) + len(self.parts[part])])
            for part, index in zip(chosen, indices, strict=True)
        ]
        joined: dict[str, Tensor] = {
            f.name: torch.cat([getattr(row, f.name) for row in rows]) for f in fields(MicroBatch)
        }
        return MicroBatch(**joined | {"samples_B": torch.tensor(indices, dtype=torch.int64)})

    def spans(self, index: int) -> list[Span]:
        """What a sample holds, in order."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[part].spans(index - int(self._ends[part]) + len(self.parts[part]))
