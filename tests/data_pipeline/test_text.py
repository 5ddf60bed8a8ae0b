"""Windows tell documents apart and lose no token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import IGNORED
from data_pipeline.shards import ShardError
from data_pipeline.text import TextData, TextWindows
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.windows import Stream
from tests.data import standard_library, tiny_corpus, write_shard

EOS, PAD = 0, 1


def windows(directory, documents, length):
    return TextWindows(Stream(write_shard(directory / "x", documents), length), 512, PAD, "x")


def test_a_window_over_three_documents(tmp_path):
    batch = windows(tmp_path, [[5, 6, EOS], [7, EOS], [8, 9, 10, EOS]], 6).micro_batch([0, 1])
    assert batch.tokens_BL.tolist() == [[5, 6, 0, 7, 0, 8], [9, 10, 1, 1, 1, 1]]
    assert batch.labels_BL.tolist() == [[6, 0, -100, 0, -100, 9], [10, 0, -100, -100, -100, -100]]
    assert batch.positions_BL.tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]]
    assert batch.documents_BL.tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, -1, -1, -1, -1]]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=12), length=st.integers(1, 9))
def test_every_token_but_the_first_of_a_document_is_predicted_once(tmp_path_factory, lengths, length):
    documents = [[*range(2 + i, 2 + i + n - 1), EOS] for i, n in enumerate(lengths)]
    samples = windows(tmp_path_factory.mktemp("w"), documents, length)
    batch = samples.micro_batch(range(len(samples)))
    labels = batch.labels_BL.flatten().tolist()
    assert [label for label in labels if label != IGNORED] == [token for d in documents for token in d[1:]]
    tokens, seen = batch.tokens_BL[batch.documents_BL >= 0].tolist(), [token for d in documents for token in d]
    assert tokens == seen[:-1]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=2, max_size=12), length=st.integers(1, 9))
def test_positions_restart_with_each_document_and_count_up_within(tmp_path_factory, lengths, length):
    documents = [[7] * (n - 1) + [EOS] for n in lengths]
    samples = windows(tmp_path_factory.mktemp("w"), documents, length)
    batch = samples.micro_batch(range(len(samples)))
    for row in range(len(samples)):
        names, positions = batch.documents_BL[row].numpy(), batch.positions_BL[row].numpy()
        for name in set(names[names >= 0].tolist()):
            assert np.array_equal(positions[names == name], np.arange((names == name).sum()))


def test_the_last_window_may_end_exactly_with_the_split(tmp_path):
    samples = windows(tmp_path, [[5, 6, 7, 8, EOS]], 4)
    assert len(samples) == 1
    assert samples.micro_batch([0]).labels_BL.tolist() == [[6, 7, 8, 0]]


def test_a_corpus_opens_as_samples(tmp_path):
    path = tiny_corpus(tmp_path)
    tokenizer = Tokenizer.load(path / "tokenizer")
    train, validation = (TextData(str(path), 64).open(split, tokenizer, seed=0) for split in ("train", "validation"))
    assert train.fingerprint != validation.fingerprint
    assert train.fingerprint != TextData(str(path), 32).open("train", tokenizer, seed=0).fingerprint
    assert tokenizer.decode(train.micro_batch([0]).tokens_BL[0].tolist()) in standard_library(1)[0]


def test_an_empty_split_is_refused(tmp_path):
    with pytest.raises(ShardError, match="0 documents with 0 tokens"):
        windows(tmp_path, [], 8)


def test_an_id_outside_the_vocabulary_never_reaches_the_model(tmp_path):
    samples = windows(tmp_path, [[5, 600, 7, EOS]], 4)
    with pytest.raises(ShardError, match="vocabulary ends at 511"):
        samples.micro_batch([0])


def test_a_sequence_needs_a_length():
    assert [problem.key for problem in TextData("x", 0).problems(None, 1)] == ["data.sequence_length"]
