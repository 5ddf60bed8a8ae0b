"""Perplexity and bits per byte of held-out text.

The text is read back from a corpus and encoded with the model's own tokenizer, so that models with different tokenizers
are compared over the same bytes.

Shape suffixes: B windows, L tokens.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.batch import IGNORED
from data_pipeline.order import Order
from data_pipeline.packing import Packed
from data_pipeline.shards import open_shard
from data_pipeline.tokenizer import Tokenizer
from train.evaluate.errors import EvaluationError
from train.evaluate.load import Subject

SEED = 0
"""Of the choice of documents: the same for every model and every evaluation."""


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts text.

    Args:
        perplexity: exp of the mean loss in nats per predicted token; comparable between equal tokenizers only.
        bits_per_byte: mean loss per token, times tokens per byte, in bits; comparable between all.
        documents: how many were read.
        bytes: their size in UTF-8.
        tokens: their tokens, end-of-text included.
    """

    perplexity: float
    bits_per_byte: float
    documents: int
    bytes: int
    tokens: int


def held_out(corpus: str | Path, split: str, limit: int) -> list[str]:
    """Documents of a split, in a fixed random order, until they have `limit` bytes; all of them if it is 0.

    Raises:
        ArtifactError: `corpus` is no finished corpus.
        ShardError: the split is missing or damaged.
        EvaluationError: there is no text in it.
    """
    tokenizer = Tokenizer.load(Path(corpus) / "tokenizer")
    shard, _ = open_shard(corpus, split, tokenizer)
    texts, size = [], 0
    order = Order(shard.documents, SEED)
    for k in range(shard.documents):
        if limit and size >= limit:
            break
        if text := tokenizer.decode(shard.document(int(order[k])).tolist()):
            texts.append(text)
            size += len(text.encode())
    if not texts:
        raise EvaluationError(
            f"{corpus} has no text in its {split} split; give this split a larger share of the corpus."
        )
    return texts


def score_text(subject: Subject, texts: list[str], sequence_length: int, batch: int) -> TextScore:
    """Score whole documents; each is read in pieces of at most `sequence_length` tokens, every token but a document's
    first being predicted once.

    Raises:
        EvaluationError: every document is a single token.
    """
    tokenizer = subject.tokenizer
    documents = [[*tokens, tokenizer.eos] for tokens in tokenizer.encode_documents(texts)]
    pieces = [
        (tokens[begin : begin + sequence_length][: len(labels)], labels)
        for tokens in documents
        for begin in range(0, len(tokens) - 1, sequence_length)
        if (labels := tokens[begin + 1 : begin + sequence_length + 1])
    ]
    if not pieces:
        raise EvaluationError("The held-out documents have one token each: nothing follows that could be predicted.")
    windows = Packed(pieces, sequence_length, SEED, tokenizer.pad, "")
    nats, predicted = 0.0, 0
    for indices in torch.arange(len(windows)).split(batch):
        micro_batch = windows.micro_batch(indices.tolist())
        nats -= subject.logprobs(micro_batch).double().sum().item()
        predicted += int((micro_batch.labels_BL != IGNORED).sum())
    size, tokens_read = sum(len(text.encode()) for text in texts), sum(map(len, documents))
    loss = nats / predicted
    return TextScore(
        perplexity=math.exp(min(loss, 700.0)),  # e^700 is about the largest number there is
        bits_per_byte=loss * tokens_read / size / math.log(2),
        documents=len(texts),
        bytes=size,
        tokens=tokens_read,
    )
