"""Preferences: two answers to one prompt, of which one was chosen.

Shape suffixes: B sequences, P pairs (B = 2P, chosen first), L tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from conf.errors import Problem
from conf.registry import register
from data_pipeline.artifact import fingerprint, sha256_of
from data_pipeline.batch import IGNORED, PreferenceBatch, Span
from data_pipeline.chat import Conversation, declared_faults, encode, record_problems
from data_pipeline.records import EmptySetError, message_faults, read_records, without_assistant
from data_pipeline.templates import with_template
from data_pipeline.tool_calls import exchange_faults

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer

log = logging.getLogger(__name__)

ROUND_UP = 32
"""Sequences are padded to a multiple of this many tokens, so that kernels meet few shapes."""


def preference_faults(record: Any) -> list[str]:
    """What keeps a record from being {"prompt", "chosen", "rejected"}, each a list of messages."""
    if not isinstance(record, dict):
        return [
            f'a {type(record).__name__}; expected an object {{"prompt": [...], "chosen": [...], "rejected": [...]}}'
        ]
    faults = [fault for field in ("prompt", "chosen", "rejected") for fault in message_faults(record.get(field), field)]
    faults += declared_faults(record)
    if not faults:
        for field in ("chosen", "rejected"):
            if without_assistant(record[field]):
                faults.append(f"{field} has no assistant turn; expected the answer to the prompt")
            whole = record["prompt"] + record[field]
            faults += [f"prompt and {field}: {fault}" for fault in exchange_faults(whole, record.get("tools"))]
        if record["chosen"] == record["rejected"]:
            faults.append("chosen and rejected are equal; expected two different answers")
    return faults


@register("data", "preference")
@dataclass(frozen=True)
class PreferenceData:
    """Preference pairs; a sample is a pair.

    Args:
        path: directory with preferences_{train,validation,test}.jsonl of {"prompt", "chosen", "rejected"}, each a list
            of {"role", "content"}.
        sequence_length: most tokens of prompt and answer together.
        overlong: what happens to a pair that is longer: "truncate" cuts the end, "drop" leaves the pair out.
        chat_template: one of ours (chatml, llama3, plain, qwen), kept with the model from then on; empty for the
            tokenizer's own.
    """

    path: str = ""
    sequence_length: int = 512
    overlong: str = "drop"
    chat_template: str = ""

    def problems(self, config: Any, world_size: int) -> list[Problem]:
        return record_problems(self.path, self.sequence_length, self.overlong, self.chat_template)

    def open(self, split: str, tokenizer: "Tokenizer", seed: int) -> "PreferencePairs":
        """Read, check and encode one split. `seed` is not used: a pair is a sample, and the loader orders samples.

        Raises:
            RecordError: lists every record of a wrong shape.
            EmptySetError: no pair is left.
            TemplateError: see `data_pipeline.chat.encode`.
        """
        stem = f"preferences_{split}"
        tokenizer = with_template(tokenizer, self.chat_template)
        records = read_records(self.path, stem, preference_faults)
        pairs = [
            tuple(
                encode(tokenizer, record["prompt"] + record[side], len(record["prompt"]), record.get("tools"))
                for side in ("chosen", "rejected")
            )
            for record in records
        ]
        source = Path(self.path) / f"{stem}.jsonl"
        silent = [i + 1 for i, pair in enumerate(pairs) if not all(any(side.learned) for side in pair)]
        if silent:
            raise EmptySetError(
                f"{source}: {len(silent)} pairs have an answer with no token to learn, the first in line {silent[0]}: "
                "the chat template renders nothing of it. Mend its {% generation %} marks."
            )
        made_with = [tokenizer.fingerprint, tokenizer.chat_template]
        name = fingerprint(["preference", sha256_of(source), *made_with, self.sequence_length, self.overlong])
        return PreferencePairs(pairs, self.sequence_length, self.overlong, tokenizer.pad, str(source), name)


class PreferencePairs:
    """Pairs of conversations that differ in their answer.

    Args:
        pairs: (chosen, rejected).
        sequence_length: most tokens of a sequence.
        overlong: see `PreferenceData`.
        pad: id that fills a sequence up.
        source: where the pairs come from, for messages.
        fingerprint: names this set of samples.

    Raises:
        EmptySetError: no pair is left with something to compare.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Conversation, ...]],
        sequence_length: int,
        overlong: str,
        pad: int,
        source: str,
        fingerprint: str,
    ):
        self.pad = pad
        self.fingerprint = fingerprint
        self.counts = {"pairs": 0, "truncated": 0, "dropped": 0}
        self._source = source
        self._records: list[int] = []
        self._pairs: list[list[tuple[list[int], list[int]]]] = []
        for number, pair in enumerate(pairs):
            sides = [side.inputs_and_labels(len(side.tokens)) for side in pair]
            if any(len(labels) > sequence_length for _, labels in sides):
                limit = sequence_length if overlong == "truncate" else 0
                sides = [side.inputs_and_labels(limit) for side in pair]
                # Cut before they differ, the answers are no preference.
                usable = all(labels for _, labels in sides) and sides[0] != sides[1]
                self.counts["truncated" if usable else "dropped"] += 1
            else:
                usable = all(labels for _, labels in sides)
                self.counts["dropped"] += not usable
            if usable:
                self._pairs.append(sides)
                self._records.append(number)
        self.counts["pairs"] = len(self._pairs)
        if not self._pairs:
            raise EmptySetError(
                f"{source}: none of {len(pairs)} pairs fits data.sequence_length={sequence_length} with answers that "
                "differ; make it larger."
            )
        if self.counts["truncated"] or self.counts["dropped"]:
            log.warning(
                "%s: of %d pairs %d were cut to data.sequence_length=%d and %d dropped",
                source,
                len(pairs),
                self.counts["truncated"],
                sequence_length,
                self.counts["dropped"],
            )

    def __len__(self) -> int:
        return len(self._pairs)

    def spans(self, index: int) -> list[Span]:
        """The record of a pair; both answers are read from their beginning."""
        longest = max(len(labels) for _, labels in self._pairs[index])
        return [Span(self._source, self._records[index], 0, longest)]

    def micro_batch(self, indices: Sequence[int]) -> PreferenceBatch:
        """Reference log-probabilities are nan until the objective has set the samples up."""
        sequences = [self._pairs[i][side] for side in (0, 1) for i in indices]
        longest = max(len(labels) for _, labels in sequences)
        shape = (len(sequences), -(-longest // ROUND_UP) * ROUND_UP)
        tokens_BL, labels_BL = torch.full(shape, self.pad), torch.full(shape, IGNORED)
        positions_BL, documents_BL = torch.zeros(shape, dtype=torch.int64), torch.full(shape, -1)
        for row, (tokens, labels) in enumerate(sequences):
            tokens_BL[row, : len(tokens)] = torch.tensor(tokens)
            labels_BL[row, : len(labels)] = torch.tensor(labels)
            positions_BL[row, : len(tokens)] = torch.arange(len(tokens))
            documents_BL[row, : len(tokens)] = 0
        return PreferenceBatch(
            tokens_BL=tokens_BL,
            labels_BL=labels_BL,
            positions_BL=positions_BL,
            documents_BL=documents_BL,
            samples_B=torch.tensor([*indices, *indices], dtype=torch.int64),
            reference_logprobs_B=torch.full((len(sequences),), float("nan")),
        )
