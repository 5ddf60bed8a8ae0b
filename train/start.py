"""What a training run starts from: a tokenizer, an architecture, weights."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from conf.errors import ConfigError, LongrunError
from data_pipeline.artifact import MANIFEST, Artifact, fingerprint, sha256_of
from data_pipeline.templates import with_template
from data_pipeline.tokenizer import Tokenizer
from train.models import hf, hf_weights
from train.models.transformer import Decoder, DecoderConfig, initialise
from train.objectives.base import Samples

if TYPE_CHECKING:
    from train.config import RunConfig


class StartError(LongrunError):
    """Tokenizer, model and data do not belong together."""


@dataclass(frozen=True)
class Start:
    """Resolved from the paths in `data`, `init_from` and `model`.

    Args:
        tokenizer: the corpora's where they have one, else that of `init_from`; with the chat template that the data
            name.
        architecture: that of `init_from` (with the dropout, attention kernel and balance of experts of `model`), else
            `model`.
        vocabulary: rows of the embedding: the tokenizer's ids, and any surplus that `init_from` has.
        weights: directory of the initial weights; None for random ones.
        inputs: the artifacts this run reads, by name.
        fingerprints: what they hold, by name; must not change while the run lasts.
        opened: splits that were opened.
    """

    tokenizer: Tokenizer
    architecture: DecoderConfig
    vocabulary: int
    weights: Path | None
    inputs: dict[str, Artifact]
    fingerprints: dict[str, str]
    opened: dict[str, Samples] = field(default_factory=dict)

    @classmethod
    def of(cls, config: "RunConfig") -> "Start":
        """Read tokenizer and architecture, and check them against each other.

        Raises:
            StartError: no tokenizer, or the corpus's does not continue that of the model; or samples are longer than
                the model's context.
            TemplateError: the tokenizer lacks tokens of the chat template.
            ConfigError: the layout cannot divide the model of `init_from`.
        """
        inputs = {name: Artifact.read(path) for name, path in _paths(config.data).items()}
        fingerprints = {name: artifact.id for name, artifact in inputs.items()}
        own, data = _tokenizer(list(inputs.values()))
        if not config.init_from:
            if own is None:
                raise StartError(
                    f"{data} brings no tokenizer and init_from is empty: set init_from to the model to go on "
                    "from (a run directory, an export, or a Hugging Face directory), whose tokenizer is used."
                )
            fingerprints["tokenizer"] = own.fingerprint
            _check_length(config, config.model, "model.max_positions")
            return cls(own, config.model, own.vocabulary, None, inputs, fingerprints)
        directory = hf.model_directory(config.init_from)
        brought = Tokenizer.load(directory)
        tokenizer = brought if own is None else own
        if own is not None:
            _continues(own, brought, data, directory)
        tokenizer = with_template(
            tokenizer, getattr(config.data, "chat_template", "")
        )  # what the run will be saved with
        if (Path(config.init_from) / MANIFEST).exists():
            inputs["model"] = Artifact.read(config.init_from)
        weights = inputs["model"].id if "model" in inputs else fingerprint_of(directory)
        fingerprints |= {"tokenizer": tokenizer.fingerprint, "model": weights}
        # What only concerns training is this run's own choice.
        architecture = hf.read_config(directory)
        architecture = replace(
            architecture,
            dropout=config.model.dropout,
            attention=config.model.attention,
            moe=architecture.moe.trained_as(config.model.moe),
        )
        if problems := config.parallel.model_problems(architecture.sizes):
            raise ConfigError(problems)
        _check_length(config, architecture, f"max_position_embeddings of {directory / hf.CONFIG}")
        rows = int(json.loads((directory / hf.CONFIG).read_text())["vocab_size"])
        return cls(tokenizer, architecture, max(rows, tokenizer.vocabulary), directory, inputs, fingerprints)

    @property
    def data(self) -> list[Artifact]:
        """What the samples come from."""
        return [artifact for name, artifact in self.inputs.items() if name != "model"]

    @property
    def foreign(self) -> dict[str, str]:
        """Part of the recipe: initial weights that come from no artifact, by their content."""
        return {"init_from": self.fingerprints["model"]} if self.weights and "model" not in self.inputs else {}

    def open(self, config: "RunConfig", split: str) -> Samples:
        """The samples of a split, once: where they are encoded, that takes its time.

        Raises:
            LongrunError: see the options of `data`.
        """
        if split not in self.opened:
            self.opened[split] = config.data.open(split, self.tokenizer, config.seed)
        return self.opened[split]

    def build(self) -> Decoder:
        """The model without storage; `fill` gives it values once it is placed."""
        with torch.device("meta"):
            return self.architecture.build(self.vocabulary)

    def fill(self, model: nn.Module, seed: int) -> None:
        """Random weights by name and seed, or the initial ones with rows for tokens that the tokenizer gained."""
        assert isinstance(model, Decoder)
        if self.weights is None:
            initialise(model, seed)
        else:
            hf_weights.load(model, self.weights, self.architecture)


def _paths(data: Any) -> dict[str, str]:
    """The artifacts that an option of `data` reads, by the names that they have among the inputs."""
    return getattr(data, "corpora", None) or {"data": data.path}


def _tokenizer(data: list[Artifact]) -> tuple[Tokenizer | None, Path]:
    """The tokenizer that the data bring, if they do, and where it is.

    Raises:
        StartError: they bring different ones.
    """
    directories = [artifact.path for artifact in data if (artifact.path / "tokenizer").is_dir()]
    if not directories:
        return None, data[0].path
    first, *others = (Tokenizer.load(directory / "tokenizer") for directory in directories)
    for directory, other in zip(directories[1:], others, strict=True):
        if other.fingerprint != first.fingerprint:
            raise StartError(
                f"{directory} was made with another tokenizer ({other.fingerprint}, {other.vocabulary} ids) than "
                f"{directories[0]} ({first.fingerprint}, {first.vocabulary} ids): the same numbers would mean other "
                f"words. Make it again with corpus.tokenizer={directories[0] / 'tokenizer'}."
            )
    return first, directories[0]


def _check_length(config: "RunConfig", architecture: DecoderConfig, source: str) -> None:
    """What is served reads no further than the configuration that is written beside the weights."""
    if config.data.sequence_length > architecture.max_positions:
        raise StartError(
            f"data.sequence_length={config.data.sequence_length} is longer than the context of the model, "
            f"{architecture.max_positions} tokens ({source}). Give at most that many, or a model with more."
        )


def fingerprint_of(directory: Path) -> str:
    """Of a Hugging Face directory: its configuration, and names, sizes and samples of its weight files. Two models of
    one shape differ in nearly every sample; reading the files through would take minutes where they are large."""
    files = [[file.name, file.stat().st_size, *_samples(file)] for file in sorted(directory.glob("*.safetensors"))]
    return fingerprint([sha256_of(directory / hf.CONFIG), files])


def _samples(file: Path, count: int = 256, size: int = 4096) -> list[str]:
    """Hashes of pieces of a file, evenly spaced from its beginning to its end."""
    last = max(0, file.stat().st_size - size)
    found = []
    with open(file, "rb") as stream:
        for number in range(count):
            stream.seek(last * number // (count - 1))
            found.append(fingerprint(stream.read(size).hex()))
    return found


def _continues(own: Tokenizer, brought: Tokenizer, data: Path, model: Path) -> None:
    """The corpus may have more tokens than the model, but those of the model must keep their ids."""
    if own.fingerprint == brought.fingerprint:
        return
    ids = own.backend.get_vocab(with_added_tokens=True)
    moved = [t for t, i in brought.backend.get_vocab(with_added_tokens=True).items() if ids.get(t) != i]
    if moved:
        raise StartError(
            f"the tokenizer of {data} is not that of the model {model}, nor that one with tokens added: {len(moved)} "
            f"of the model's {brought.vocabulary} tokens have no or another id there, for instance {moved[0]!r}. Make "
            "the corpus with the model's tokenizer."
        )
