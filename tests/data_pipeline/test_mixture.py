"""A mixture gives each corpus its part, says what each sample is, and refuses corpora that do not belong together."""

import json
from dataclasses import replace
from itertools import combinations, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.loader import Loader
from data_pipeline.mixture import MixtureData, MixtureSource, MixtureStage, WarmUp
from data_pipeline.order import AsNumbered
from data_pipeline.shards import Shard, ShardError
from data_pipeline.tokenizer import Tokenizer
from tests.data import corpus_of, standard_library, tiny_tokenizer

LENGTH = 32


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """Three corpora of one tokenizer; the third has no validation split."""
    directory, tokenizer = tmp_path_factory.mktemp("corpora"), tiny_tokenizer()
    texts = [text[:1500] for text in standard_library(90) if text]
    for name, part in (("a", texts[:40]), ("b", texts[40:60]), ("c", texts[60:68])):
        corpus_of(part, tokenizer, directory / name)
    return directory


@pytest.fixture
def tokenizer(corpora):
    return Tokenizer.load(corpora / "a" / "tokenizer")


def mixture(corpora, **settings):
    sources = {
        "a": MixtureSource(str(corpora / "a"), weight=0.6),
        "b": MixtureSource(str(corpora / "b"), weight=0.3, epochs=2, packing="best_fit"),
        "c": MixtureSource(str(corpora / "c"), weight=0.1, tokens=100 * LENGTH),
    }
    stages = [MixtureStage(1500 * LENGTH, {"a": 1.0, "b": 1.0, "c": 4.0})]
    return MixtureData(sources=sources, stages=stages, sequence_length=LENGTH, **settings)


def config(steps=10, global_batch=8, dry_run=False):
    return SimpleNamespace(stage=SimpleNamespace(steps=steps, global_batch=global_batch), dry_run=dry_run)


def test_each_source_gives_its_part_and_none_twice_before_all_once(corpora, tokenizer):
    samples = mixture(corpora).open("train", tokenizer, seed=3)
    origins = [samples.origin(k) for k in range(2500)]
    for name, source in zip("abc", samples.sources, strict=True):
        mine = [origin for origin in origins if origin.source == name]
        for begin in range(0, len(mine), len(source)):
            epoch = mine[begin : begin + len(source)]
            assert len({origin.sample for origin in epoch}) == len(epoch)
            assert {origin.epoch for origin in epoch} == {begin // len(source)}
        assert samples.given(2500)[name]["samples"] == len(mine)
        assert samples.given(2500)[name]["epochs"] == len(mine) / len(source)
    early = [origin.source for origin in origins[:1000]]
    assert early.count("a") / 1000 == pytest.approx(0.6, abs=0.06)
    assert sum(origin.source == "c" for origin in origins) == 100


def orders_of(corpora, tokenizer, seed, epochs=1):
    """Window of each sample of each source of a mixture, by epoch: two sources are of one corpus."""
    names = {"a": "a", "again": "a", "b": "b"}
    sources = {name: MixtureSource(str(corpora / path)) for name, path in names.items()}
    samples = MixtureData(sources=sources, sequence_length=8).open("train", tokenizer, seed)
    found = {}
    for place, (name, source) in enumerate(zip(samples.names, samples.sources, strict=True)):
        drawn, windows = samples.drawn(np.arange(3 * epochs * len(samples.sources[0]) + 2048))
        found[name] = windows[drawn == place][: epochs * len(source)].reshape(epochs, -1)
    return found


def test_every_epoch_seed_and_source_has_an_order_of_its_own(corpora, tokenizer):
    """Two random orders of n agree in about one place; ours must in fewer than 20."""
    mine, other = (orders_of(corpora, tokenizer, seed, epochs=3) for seed in (3, 4))
    assert mine["a"].shape == mine["again"].shape and mine["a"].shape[1] > 500
    for name, epochs_EK in mine.items():
        count = epochs_EK.shape[1]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs_EK.tolist())
        different = [np.arange(count), *epochs_EK, *other[name]]
        for first, second in combinations(different, 2):
            assert (first == second).sum() < 20, name
    for first, second in product(mine["a"], mine["again"]):
        assert (first == second).sum() < 20, "sources of one length"


def test_where_a_window_stands_in_the_order_says_nothing_of_which_it_is(corpora, tokenizer):
    """Chi-square of 8 parts of the epoch against 8 parts of the corpus, over 10 seeds."""
    table = np.zeros((8, 8))
    for seed in range(10):
        (order_K,) = orders_of(corpora, tokenizer, seed)["a"]
        parts_K = np.arange(len(order_K)) * 8 // len(order_K)
        np.add.at(table, (parts_K, parts_K[order_K]), 1)
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 85.4, "99.9% of random orders, 49 degrees of freedom"


def test_a_sample_holds_the_tokens_that_its_origin_names(corpora, tokenizer):
    samples = mixture(corpora).open("train", tokenizer, seed=3)
    batch = samples.micro_batch(range(300, 340))
    assert batch.samples_B.tolist() == list(range(300, 340))
    for row, k in enumerate(range(300, 340)):
        origin = samples.origin(k)
        held = [
            token
            for span in origin.spans
            for token in Shard(span.source).document(span.document)[span.begin : span.end]
        ]
        assert all(span.source == str(corpora / origin.source / "shards" / "train") for span in origin.spans)
        assert batch.tokens_BL[row, : len(held)].tolist() == held
        assert (batch.documents_BL[row, len(held) :] == -1).all()


def seen(samples, steps, dp_size, micro_batches):
    """Tokens of each step in global order: micro-batch, rank, row."""
    loaders = [
        Loader(samples, global_batch=24, micro_batches=micro_batches, dp_rank=rank, dp_size=dp_size, seed=1)
        for rank in range(dp_size)
    ]
    result = []
    for step in steps:
        ranks = [loader.batch(step) for loader in loaders]
        parts = [ranks[rank][m] for m in range(micro_batches) for rank in range(dp_size)]
        result.append(torch.cat([torch.cat([part.samples_B[:, None], part.tokens_BL], 1) for part in parts]))
    for loader in loaders:
        loader.close()
    return torch.stack(result)


@pytest.mark.parametrize(("dp_size", "micro_batches"), [(2, 3), (3, 2), (8, 1)])
def test_a_run_that_goes_on_at_another_size_sees_what_it_would_have_seen(corpora, tokenizer, dp_size, micro_batches):
    samples = mixture(corpora).open("train", tokenizer, seed=3)
    assert isinstance(samples.order, AsNumbered)
    whole = seen(samples, range(70), 1, 1)
    assert whole[:, :, 0].ravel().tolist() == list(range(70 * 24))
    again = mixture(corpora).open("train", tokenizer, seed=3)
    assert torch.equal(seen(again, range(40, 70), dp_size, micro_batches), whole[40:])


def test_another_seed_weight_cap_stage_or_warm_up_is_another_set_of_samples(corpora, tokenizer):
    base = mixture(corpora)
    others = [
        replace(base, stages=[]),
        replace(base, warm_up_from=8, warm_up_tokens=1e4),
        replace(base, sources={**base.sources, "a": MixtureSource(str(corpora / "a"), weight=0.5)}),
        replace(base, sources={**base.sources, "c": MixtureSource(str(corpora / "c"), weight=0.1)}),
    ]
    names = [data.open("train", tokenizer, 3).fingerprint for data in [base, *others]]
    names.append(base.open("train", tokenizer, 4).fingerprint)
    assert len(set(names)) == len(names)
    assert base.open("train", tokenizer, 3).fingerprint == names[0]


def test_held_out_windows_are_all_of_all_corpora_that_have_some(corpora, tokenizer):
    held = mixture(corpora).open("validation", tokenizer, 0)
    alone = [
        MixtureSource(str(corpora / name), packing=packing).text(LENGTH)
        for name, packing in (("a", "stream"), ("b", "best_fit"))
    ]
    parts = [data.open("validation", tokenizer, 0) for data in alone]
    assert len(held) == sum(map(len, parts))
    last = [len(parts[0]) - 1, len(parts[0])]
    expected = torch.cat([parts[0].micro_batch([len(parts[0]) - 1]).tokens_BL, parts[1].micro_batch([0]).tokens_BL])
    assert torch.equal(held.micro_batch(last).tokens_BL, expected)
    assert held.spans(last[1]) == parts[1].spans(0)
    only_c = replace(mixture(corpora), sources={"c": MixtureSource(str(corpora / "c"))}, stages=[])
    with pytest.raises(ShardError, match="None of the corpora"):
        only_c.open("validation", tokenizer, 0)


def test_documents_grow_during_the_warm_up_and_steps_keep_their_tokens(corpora, tokenizer):
    data = mixture(corpora, warm_up_from=8, warm_up_tokens=200 * LENGTH)
    warm, plain = (data.open("train", tokenizer, 0), mixture(corpora).open("train", tokenizer, 0))
    lengths = [warm.warm_up.length(k) for k in range(300)]
    assert lengths == [8] * 100 + [16] * 100 + [32] * 100
    ks = range(90, 210)
    cut, whole = warm.micro_batch(ks), plain.micro_batch(ks)
    assert torch.equal(cut.tokens_BL, whole.tokens_BL) and torch.equal(cut.labels_BL, whole.labels_BL)
    for row, k in enumerate(ks):
        longest, place = lengths[k], 0
        for span in warm.origin(k).spans:
            for begin in range(place, place + span.end - span.begin):
                same = begin > 0 and cut.documents_BL[row, begin] == cut.documents_BL[row, begin - 1]
                assert bool(same) == (begin > place and begin % longest > 0)
                assert cut.positions_BL[row, begin] == min(begin - place, begin % longest)
            place += span.end - span.begin
        assert torch.equal(cut.documents_BL[row, place:], whole.documents_BL[row, place:])
    assert torch.equal(cut.documents_BL[110:], whole.documents_BL[110:])


def test_a_length_lasts_as_long_as_the_others():
    warm_up = WarmUp(whole=1024, first=128, tokens=3e6)
    lengths = np.array([warm_up.length(k) for k in range(4000)])
    changes = (np.flatnonzero(np.diff(lengths)) + 1) * 1024
    assert lengths[0] == 128 and lengths[-1] == 1024
    assert changes == pytest.approx([1e6, 2e6, 3e6], abs=1024)


def test_every_problem_of_the_settings_is_told_at_once(corpora):
    sources = {
        "a": MixtureSource("", weight=-1.0),
        "b": MixtureSource("x", tokens=5.0, epochs=-2.0),
        "c": MixtureSource("x", weight=0.0, packing="tight"),
        "d": MixtureSource("x", weight=1e-9),
    }
    stages = [MixtureStage(1000.0, {"a": 1.0, "z": 1.0}), MixtureStage(1000.0, {"a": 0.0})]
    data = MixtureData(sources, stages, sequence_length=48, warm_up_from=5)
    assert [problem.key for problem in data.problems(config(), 1)] == [
        "data.warm_up_from",
        "data.warm_up_tokens",
        "data.sources.a.path",
        "data.sources.b.epochs",
        "data.sources.b.tokens",
        "data.sources.c.packing",
        "data.sources.a.weight",
        "data.stages[0].weights",
        "data.stages[1].begin",
        "data.stages[1].weights",
        "data.sources.c.weight",
    ]
    assert [p.key for p in MixtureData().problems(config(), 1)] == ["data.sources"]


def test_corpora_that_are_missing_or_unfit_are_told_before_anything_starts(corpora, tmp_path):
    corpus_of([text[:1000] for text in standard_library(30) if text], tiny_tokenizer(400), tmp_path / "other")
    manifest = corpora / "c" / "manifest.json"
    sources = {
        "a": MixtureSource(str(corpora / "a")),
        "gone": MixtureSource(str(tmp_path / "gone")),
        "other": MixtureSource(str(tmp_path / "other")),
        "little": MixtureSource(str(corpora / "c"), epochs=1e-6),
    }
    found = MixtureData(sources, sequence_length=LENGTH).problems(config(), 1)
    assert [problem.key for problem in found] == [
        "data.sources.gone.path",
        "data.sources.little.epochs",
        "data.sources",
    ]
    assert "not a finished artifact" in found[0].fix
    assert f"corpus.tokenizer={corpora / 'a'}/tokenizer" in found[2].fix
    assert MixtureData(sources, sequence_length=LENGTH).problems(config(dry_run=True), 1) == []
    content = json.loads(manifest.read_text())
    try:
        del (broken := json.loads(manifest.read_text()))["metrics"]["splits"]["train"]
        manifest.write_text(json.dumps(broken))
        (problem,) = replace(mixture(corpora), stages=[]).problems(config(), 1)
        assert problem.key == "data.sources.c.path" and "no split 'train'" in problem.fix
    finally:
        manifest.write_text(json.dumps(content))


def test_a_run_that_needs_more_than_the_caps_allow_is_refused(corpora):
    sources = {name: MixtureSource(str(corpora / name), tokens=100 * LENGTH) for name in "ab"}
    data = MixtureData(sources, sequence_length=LENGTH)
    assert data.problems(config(steps=25), 1) == []
    (problem,) = data.problems(config(steps=26), 1)
    assert (problem.key, problem.found) == ("stage.steps", 26)
    assert "needs 208 samples" in problem.fix and "allow 200: at most 25 steps" in problem.fix
    late = replace(data, stages=[MixtureStage(210 * LENGTH, {"a": 1.0})])
    shortage, problem = late.problems(config(steps=30), 1)
    assert shortage.key == "stage.steps"
    assert problem.key == "data.stages[0].begin" and "after 6,400 tokens" in problem.fix


def test_a_stage_that_begins_when_the_run_has_ended_is_refused(corpora):
    base = mixture(corpora)
    assert base.problems(config(steps=188), 1) == []
    (problem,) = base.problems(config(steps=187), 1)
    assert problem.key == "data.stages[0].begin" and "less than the 47,872 tokens of the run" in problem.fix
