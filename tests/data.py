"""Tiny real corpora for everybody's tests."""

import sys
import sysconfig
from pathlib import Path

from data_pipeline.artifact import Draft
from data_pipeline.chat import CHATML
from data_pipeline.shards import Shard
from data_pipeline.tokenizer import Tokenizer, train_bpe


def standard_library(count: int) -> list[str]:
    """Source files of the running Python, the same ones every time."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files[:count]]


def write_shard(stem: Path, documents: list[list[int]], vocabulary: int = 512) -> Shard:
    """A shard by datatrove's own writer."""
    from datatrove.pipeline.tokens.megatron_tokenizer import MegatronTokenizedFile

    stem.parent.mkdir(parents=True, exist_ok=True)
    writer = MegatronTokenizedFile(str(stem.parent), stem.name, token_size=2 if vocabulary <= 2**16 else 4)
    for document in documents:
        writer.write(document)
    writer.close()
    return Shard(stem)


def tiny_tokenizer(vocabulary: int = 512) -> Tokenizer:
    return train_bpe(standard_library(20), vocabulary, chat_template=CHATML)


def tiny_corpus(directory: Path, vocabulary: int = 512, documents: int = 200) -> Path:
    """A corpus artifact of files of the standard library, cut to a few thousand characters each.

    Args:
        directory: an empty directory; the corpus becomes its subdirectory `corpus`.
        vocabulary: of its byte-level BPE.
        documents: over all splits: 80% train, 10% validation, 10% test.

    Returns:
        The artifact's directory.
    """
    texts = [text[:4000] for text in standard_library(documents) if text]
    tokenizer = train_bpe(texts[:100], vocabulary, chat_template=CHATML)
    return corpus_of(texts, tokenizer, Path(directory) / "corpus")


def corpus_of(texts: list[str], tokenizer: Tokenizer, path: Path) -> Path:
    """A corpus artifact of these documents: 80% train, 10% validation, 10% test."""
    tokenizer.save(path / "tokenizer")
    cuts = {"train": (0, 8), "validation": (8, 9), "test": (9, 10)}
    splits = {}
    for split, (begin, end) in cuts.items():
        chosen = [text for number, text in enumerate(texts) if begin <= number % 10 < end]
        ids = [[*tokens, tokenizer.eos] for tokens in tokenizer.encode_documents(chosen)]
        shard = write_shard(path / "shards" / split, ids, tokenizer.vocabulary)
        splits[split] = {
            "documents": len(chosen),
            "tokens": len(shard.tokens_T),
            "bytes": sum(len(text.encode()) for text in chosen),
            "largest_token": int(shard.tokens_T.max()) if chosen else -1,
        }
    draft = Draft(path, "corpus", {"vocabulary": tokenizer.vocabulary, "documents": len(texts)}, {})
    draft.metrics = {"sources": [{"name": "stdlib", "version": sys.version.split()[0]}], "steps": [], "splits": splits}
    draft.facts = {"tokenizer": {"fingerprint": tokenizer.fingerprint, "vocabulary": tokenizer.vocabulary}}
    draft.publish("tokenizer/*", "shards/*")
    return path
