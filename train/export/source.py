"""The model that is handed on, and everything it was made from."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.errors import LongrunError
from data_pipeline import chat
from data_pipeline.artifact import MANIFEST, Artifact, ArtifactError, fingerprint, sha256_of
from data_pipeline.tokenizer import Tokenizer
from train.models import hf
from train.models.hf_weights import Stored
from train.models.transformer import DecoderConfig

ANSWER = "The answer is 7."


class SourceError(LongrunError):
    """What was given to be exported holds no model."""


@dataclass(frozen=True)
class Source:
    """A model on disk.

    Args:
        path: what `init_from` said: an artifact, or a Hugging Face directory.
        directory: the Hugging Face directory in it.
        artifact: its manifest; None for a bare Hugging Face directory.
        fingerprint: of every byte of its configuration, weights and tokenizer.
        config: its architecture.
        tokenizer: its tokenizer.
    """

    path: Path
    directory: Path
    artifact: Artifact | None
    fingerprint: str
    config: DecoderConfig
    tokenizer: Tokenizer

    @classmethod
    def read(cls, init_from: str) -> "Source":
        """Find the model, its tokenizer and its manifest.

        Raises:
            SourceError: an artifact of a kind that holds no model.
            ArtifactError: a run that has not ended, or its files are not those that were recorded.
            HuggingFaceError: no model of a supported architecture.
        """
        path = Path(init_from)
        artifact = Artifact.read(path) if (path / MANIFEST).exists() else None
        if artifact and not any(name.startswith("model/") for name in artifact.files):
            raise SourceError(
                f"{path} holds a {artifact.kind!r}, which has no model/ to export. "
                "Set init_from to a training run (pretrain, sft, dpo) or to a Hugging Face directory."
            )
        if artifact is None and (path / "config.yaml").exists():
            raise ArtifactError(
                f"{path} is a run that has not ended: it has no {MANIFEST}. Let it end, then export it."
            )
        if artifact:
            artifact.verify()
        directory = hf.model_directory(path)
        config, tokenizer = hf.read_config(directory), Tokenizer.load(directory)
        return cls(path, directory, artifact, _content(directory, artifact), config, tokenizer)

    @property
    def name(self) -> str:
        return f"{self.path} ({self.artifact.kind} {self.artifact.id})" if self.artifact else f"{self.path}"

    def weights(self) -> Stored:
        """Checked, and read when asked for."""
        return Stored(self.directory, self.config)


def _content(directory: Path, artifact: Artifact | None) -> str:
    """Other weights in files of the same shape are another model: a verdict on one says nothing of the other."""
    recorded = {artifact.path / name: file["sha256"] for name, file in artifact.files.items()} if artifact else {}
    files = [directory / hf.CONFIG, directory / "tokenizer.json", *sorted(directory.glob("*.safetensors"))]
    return fingerprint([[file.name, recorded.get(file) or sha256_of(file)] for file in files])


def end_ids(directory: Path, tokenizer: Tokenizer) -> list[int]:
    """Tokens that end an answer: end of text, end of an assistant's turn, and those that the model already had.

    Args:
        directory: Hugging Face directory of the model, whose generation_config.json counts where there is one.
        tokenizer: the model's.
    """
    found = [tokenizer.eos]
    if (turn := end_of_turn(tokenizer)) is not None:
        found.append(turn)
    if (directory / "generation_config.json").exists():
        stored = json.loads((directory / "generation_config.json").read_text()).get("eos_token_id")
        found += stored if isinstance(stored, list) else [] if stored is None else [stored]
    return list(dict.fromkeys(found))


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts behind what the assistant says; None where it puts none."""
    if tokenizer.chat_template is None:
        return None
    messages = [{"role": "user", "content": "Which number?"}, {"role": "assistant", "content": ANSWER}]
    behind = chat.render(tokenizer, messages).rpartition(ANSWER)[2]
    return next((token for token in tokenizer.encode(behind) if token in tokenizer.special_ids), None)


def ancestors(artifact: Artifact) -> Iterator[tuple[str, Artifact]]:
    """The artifacts that went into this one, nearest first, each once, with the name under which it did.

    Those that are gone or were made anew since are left out: what they said no longer holds.
    """
    seen: set[str] = set()
    queue = [artifact]
    while queue:
        parent = queue.pop(0)
        for name, link in parent.inputs.items():
            try:
                child = Artifact.read(parent.path / link["path"])
            except ArtifactError:
                continue
            if child.id == link["id"] and child.id not in seen:
                seen.add(child.id)
                queue.append(child)
                yield name, child
