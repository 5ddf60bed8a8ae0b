"""What a window holds: no token twice, none missing that is not left out on purpose, and never two documents in one."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import windows
from data_pipeline.batch import IGNORED
from data_pipeline.shards import ShardError
from data_pipeline.text import TextData, TextWindows
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.windows import BestFit, Stream, Trimmed, counted, remembered
from tests.data import tiny_corpus, write_shard

EOS = 0
SHAPES = st.tuples(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 12))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(windows, "BLOCK", 4)


def documents_of(lengths):
    """Tokens that tell their document and place: no two are equal, as far as 16 bits go."""
    names = iter(range(1, 2**16))
    return [[*(next(names) for _ in range(n - 1)), EOS] for n in lengths]


def everything(made):
    samples = TextWindows(made, 2**16, 1, "x")
    return samples, samples.micro_batch(range(len(samples)))


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_a_stream_of_cut_documents_is_the_stream_of_what_is_left_of_them(tmp_path_factory, shape):
    lengths, length = shape
    directory, documents = tmp_path_factory.mktemp("w"), documents_of(lengths)
    shard = write_shard(directory / "all", documents)
    for long_documents, left in (
        ("cut", [document[: length + 1] for document in documents]),
        ("drop", [document for document in documents if len(document) <= length + 1]),
    ):
        expected = Stream(write_shard(directory / long_documents, left), length)
        found = Trimmed(shard, length, long_documents, counted)
        assert len(found) == len(expected)
        if len(found):
            (_, ours), (_, theirs) = everything(found), everything(expected)
            for name in ("tokens_BL", "labels_BL", "positions_BL", "documents_BL"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), (long_documents, name)


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from(["split", "cut", "drop"]))
def test_best_fit_predicts_what_is_kept_once_and_cuts_no_document_that_fits(tmp_path_factory, shape, long_documents):
    lengths, length = shape
    documents = documents_of(lengths)
    made = BestFit(write_shard(tmp_path_factory.mktemp("w") / "x", documents), length, long_documents, counted)
    kept = {"split": lambda d: d, "cut": lambda d: d[: length + 1], "drop": lambda d: d if len(d) <= length + 1 else []}
    expected = [kept[long_documents](document) for document in documents]
    predicted = Counter((d, i) for d, document in enumerate(expected) for i in range(1, len(document)))
    if not predicted:
        assert len(made) == 0
        return
    samples, batch = everything(made)
    found: Counter = Counter()
    for row in range(len(samples)):
        spans = samples.spans(row)
        assert sum(span.end - span.begin for span in spans) <= length
        begin = 0
        for number, span in enumerate(spans):
            place = slice(begin, begin := begin + span.end - span.begin)
            document = documents[span.document]
            assert batch.tokens_BL[row, place].tolist() == document[span.begin : span.end]
            assert batch.labels_BL[row, place].tolist() == document[span.begin + 1 : span.end + 1]
            assert batch.positions_BL[row, place].tolist() == list(range(span.end - span.begin))
            assert (batch.documents_BL[row, place] == number).all()
            assert len(document) > length + 1 or (span.begin, span.end) == (0, len(document) - 1)
            found.update((span.document, i) for i in range(span.begin + 1, span.end + 1))
        assert (batch.documents_BL[row, begin:] == -1).all()
        assert (batch.labels_BL[row, begin:] == IGNORED).all()
    assert found == predicted


def test_best_fit_leaves_little_padding(tmp_path, monkeypatch):
    monkeypatch.setattr(windows, "BLOCK", 2048)
    lengths = np.random.default_rng(0).lognormal(4, 1, 4000).astype(int) + 2
    made = BestFit(write_shard(tmp_path / "x", [[7] * (n - 1) + [EOS] for n in lengths]), 512, "split", counted)
    assert (lengths - 1).sum() / (len(made) * 512) > 0.98


def test_spans_name_the_place_in_the_document(tmp_path):
    shard = write_shard(tmp_path / "x", [[5, 6, EOS], [7, 8, 9, 10, EOS]])
    samples, _ = everything(Stream(shard, 4))
    spans = [[(span.document, span.begin, span.end) for span in samples.spans(i)] for i in range(len(samples))]
    assert spans == [[(0, 0, 3), (1, 0, 1)], [(1, 1, 4)]]
    assert samples.spans(0)[0].source == str(tmp_path / "x")


def test_empty_documents_hold_nothing(tmp_path):
    shard = write_shard(tmp_path / "x", [[], [5, 6, EOS], [], [], [7, EOS], []])
    _, batch = everything(Stream(shard, 3))
    assert batch.tokens_BL.tolist() == [[5, 6, 0], [7, 1, 1]]
    assert batch.labels_BL.tolist() == [[6, 0, -100], [0, -100, -100]]


def test_blocks_are_counted_once_and_counts_that_are_wrong_are_refused(tmp_path):
    shard = write_shard(tmp_path / "shards" / "x", documents_of([9, 3, 4, 5, 6, 30]))
    file = tmp_path / "windows" / "name.npy"
    made = BestFit(shard, 8, "split", remembered(file))
    assert np.load(file).sum() == len(made)
    assert len(BestFit(shard, 8, "split", lambda count, blocks: np.load(file))) == len(made)
    np.save(file, np.load(file) + 1)
    with pytest.raises(ShardError, match="Delete that directory"):
        BestFit(shard, 8, "split", remembered(file)).spans(0)


def as_npy(counts) -> bytes:
    np.save(stream := io.BytesIO(), np.array(counts))
    return stream.getvalue()


@pytest.mark.parametrize(
    "damaged",
    [b"", b"nothing of numpy's", as_npy([3, 4])[:-5], as_npy([3]), as_npy([[3, 4]]), as_npy([3.0, 4.0])],
    ids=["empty", "other", "short", "fewer", "shape", "type"],
)
def test_counts_that_are_damaged_are_made_again(tmp_path, damaged, caplog):
    shard = write_shard(tmp_path / "shards" / "x", documents_of([9, 3, 4, 5, 6, 30]))
    file = tmp_path / "windows" / "name.npy"
    first = BestFit(shard, 8, "split", remembered(file))
    whole = file.read_bytes()
    file.write_bytes(damaged)
    again = BestFit(shard, 8, "split", remembered(file))
    assert "counted again" in caplog.text and len(again) == len(first) and file.read_bytes() == whole


def test_a_corpus_that_cannot_be_written_to_is_counted_each_time(tmp_path, caplog):
    shard = write_shard(tmp_path / "x", documents_of([9, 3]))
    (tmp_path / "file").write_text("")
    assert len(BestFit(shard, 8, "split", remembered(tmp_path / "file" / "windows" / "name.npy"))) == 2
    assert "counted again" in caplog.text


def test_packed_text_opens_and_held_out_text_is_read_whole(tmp_path):
    path = tiny_corpus(tmp_path, documents=40)
    tokenizer = Tokenizer.load(path / "tokenizer")
    opened = {kind: TextData(str(path), 1500, "best_fit", kind) for kind in ("split", "cut", "drop")}
    train = {kind: data.open("train", tokenizer, 0) for kind, data in opened.items()}
    assert len({samples.fingerprint for samples in train.values()}) == 3
    assert len(train["split"]) >= len(train["cut"]) > len(train["drop"])
    held = {data.open("validation", tokenizer, 0).fingerprint for data in opened.values()}
    assert len(held) == 1
    bad = TextData(str(path), 64, "tight", "shorten").problems(None, 1)
    assert [problem.key for problem in bad] == ["data.packing", "data.long_documents"]
