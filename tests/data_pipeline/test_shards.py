"""A shard is used whole and with its own tokenizer, or not at all."""

import json
import shutil
import struct

import numpy as np
import pytest

from data_pipeline import shards
from data_pipeline.artifact import ArtifactError
from data_pipeline.shards import HEADER, MAGIC, Shard, ShardError, ShardWriter, merge, open_shard
from data_pipeline.tokenizer import Tokenizer
from tests.data import tiny_corpus, tiny_tokenizer, write_shard

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 0]]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def corpus(made, tmp_path):
    """A copy to damage."""
    return shutil.copytree(made, tmp_path / "corpus")


@pytest.fixture
def tokenizer(made):
    return Tokenizer.load(made / "tokenizer")


@pytest.mark.parametrize("vocabulary", [512, 100_000])
def test_documents_come_back_as_they_were_written(tmp_path, vocabulary):
    shard = write_shard(tmp_path / "x", DOCUMENTS, vocabulary)
    assert shard.tokens_T.dtype == (np.uint16 if vocabulary == 512 else np.int32)
    assert [shard.document(i).tolist() for i in range(shard.documents)] == DOCUMENTS


@pytest.mark.parametrize("chunk", [2, 2**24])
def test_merging_keeps_all_documents_in_order(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(shards, "CHUNK", chunk)
    parts = [DOCUMENTS, [], DOCUMENTS[:1]]
    pieces = [write_shard(tmp_path / str(i), documents).stem for i, documents in enumerate(parts)]
    merge(pieces, tmp_path / "all")
    merged = Shard(tmp_path / "all")
    assert [merged.document(i).tolist() for i in range(merged.documents)] == DOCUMENTS + DOCUMENTS[:1]
    assert not list(tmp_path.glob("*.part"))


def test_merging_one_shard_gives_the_bytes_that_datatrove_wrote(tmp_path):
    piece = write_shard(tmp_path / "one", DOCUMENTS)
    merge([piece.stem], tmp_path / "same")
    for ending in ("bin", "idx"):
        assert (tmp_path / f"same.{ending}").read_bytes() == (tmp_path / f"one.{ending}").read_bytes()


@pytest.mark.parametrize("vocabulary", [512, 100_000])
def test_our_writer_gives_the_bytes_that_datatrove_writes(tmp_path, vocabulary):
    theirs = write_shard(tmp_path / "theirs", DOCUMENTS, vocabulary)
    ours = ShardWriter(tmp_path / "ours", theirs.dtype)
    for batch in (DOCUMENTS[:2], [], DOCUMENTS[2:]):
        ours.write([np.array(document) for document in batch])
    ours.close()
    for ending in ("bin", "idx"):
        assert (tmp_path / f"ours.{ending}").read_bytes() == (tmp_path / f"theirs.{ending}").read_bytes()


def test_megatron_reads_what_is_written(tmp_path):
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    writer = ShardWriter(tmp_path / "x", np.uint16)
    writer.write([np.array(document) for document in DOCUMENTS])
    writer.close()
    read = indexed_dataset.IndexedDataset(str(tmp_path / "x"))
    assert [document.tolist() for document in read] == DOCUMENTS
    assert read.document_indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_a_missing_file_is_named(corpus, tokenizer, ending):
    (corpus / f"shards/train.{ending}").unlink()
    with pytest.raises(ShardError, match=rf"train\.{ending} is missing"):
        open_shard(corpus, "train", tokenizer)
    with pytest.raises(ShardError, match=rf"train\.{ending} missing"):
        Shard(corpus / "shards/train")


@pytest.mark.parametrize("ending", ["bin", "idx"])
@pytest.mark.parametrize("left", [0, 20, -2])
def test_a_truncated_file_is_refused(corpus, tokenizer, ending, left):
    file = corpus / f"shards/train.{ending}"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(ShardError, match="cut short or replaced"):
        open_shard(corpus, "train", tokenizer)
    with pytest.raises(ShardError, match="cut"):
        Shard(corpus / "shards/train")


def test_a_flipped_bit_is_found(corpus, tokenizer):
    file = corpus / "shards/train.bin"
    content = bytearray(file.read_bytes())
    content[1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ShardError, match="checksum"):
        open_shard(corpus, "train", tokenizer)


def test_a_file_that_is_no_megatron_index_is_refused(tmp_path):
    shard = write_shard(tmp_path / "x", DOCUMENTS)
    index = shard.stem.with_suffix(".idx")
    content = index.read_bytes()
    index.write_bytes(b"GARBAGE!!" + content[9:])
    with pytest.raises(ShardError, match="no Megatron index"):
        Shard(shard.stem)
    index.write_bytes(HEADER.pack(MAGIC, 1, 7, 3, 4) + content[HEADER.size :])
    with pytest.raises(ShardError, match="dtype code 7"):
        Shard(shard.stem)


def test_an_index_that_contradicts_itself_is_refused(tmp_path):
    shard = write_shard(tmp_path / "x", DOCUMENTS)
    index = shard.stem.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    struct.pack_into("<i", content, HEADER.size, 3)
    index.write_bytes(content)
    with pytest.raises(ShardError, match="contradict"):
        Shard(shard.stem)


def test_a_shard_of_another_corpus_is_refused(corpus, tokenizer):
    shutil.copy(corpus / "shards/test.bin", corpus / "shards/train.bin")
    with pytest.raises(ShardError, match="replaced"):
        open_shard(corpus, "train", tokenizer)


def test_a_shard_that_the_manifest_does_not_list_is_refused(corpus, tokenizer):
    manifest = json.loads((corpus / "manifest.json").read_text())
    del manifest["files"]["shards/train.bin"]
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="not in the manifest"):
        open_shard(corpus, "train", tokenizer)


def test_another_tokenizer_is_refused(corpus):
    with pytest.raises(ShardError, match=r"\(512 ids\).*\(400 ids\)"):
        open_shard(corpus, "train", tiny_tokenizer(400))


def test_a_vocabulary_that_is_too_small_is_refused(corpus, tokenizer):
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["metrics"]["splits"]["train"]["largest_token"] = 512
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="holds token 512, the vocabulary ends at 511"):
        open_shard(corpus, "train", tokenizer)


def test_what_is_no_corpus_or_no_split_is_refused(corpus, tokenizer, tmp_path):
    with pytest.raises(ShardError, match=r"no split 'dev'.*test, train, validation"):
        open_shard(corpus, "dev", tokenizer)
    with pytest.raises(ArtifactError, match="not a finished artifact"):
        open_shard(tmp_path, "train", tokenizer)
