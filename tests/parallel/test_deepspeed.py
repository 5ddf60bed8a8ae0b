"""The DeepSpeed engine beyond parity: state under names that any engine reads, skipped steps, averages, and what it
refuses. Several claims share a launch: importing DeepSpeed takes seconds."""

import importlib.util
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from parallel import distributed
from parallel.engine import LossTerms, Outputs, Settings
from parallel.engines.deepspeed import DeepSpeed, DeepSpeedError
from parallel.engines.native import Native
from parallel.layout import Layout
from tests.data import tiny_corpus
from tests.ranks import run_ranks
from tests.train.runs import begin, complete, until
from tools.parity import ADAMW, MODEL, MUON, VOCABULARY, Training, batch_of, shares
from train.checkpoint.committed import steps
from train.metrics.jsonl import read
from train.models.moe import MoE
from train.models.transformer import initialise
from train.objectives.clm import CausalLM
from train.stages.base import STOPPED_EARLY

pytestmark = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")

SMALL = Training(model=replace(MODEL, layers=1, dropout=0.1), ema=0.5)
TWO = [Layout(dp_shard=2, zero=zero, micro_batches=2) for zero in range(4)]


def build(option: Any, layout: Layout, training: Training = SMALL, seed: int = 0, **more: Any) -> Any:
    """An engine with a small decoder; `seed` is of its initial weights, `more` are settings."""
    with torch.device("meta"):
        model = training.model.build(VOCABULARY)
    return option.build(
        model,
        layout,
        training.optim.build,
        world=distributed.start(),
        settings=Settings(precision=training.precision, clip=training.clip, ema=training.ema, **more),
        initialise=lambda placed: initialise(placed, seed),
    )


@dataclass(frozen=True)
class Broken(CausalLM):
    """Causal language modelling, but for one sample."""

    value: float = 1.0

    def loss(self, outputs: Outputs, micro_batch: Any) -> LossTerms:
        terms = super().loss(outputs, micro_batch)
        return replace(terms, total=terms.total * (self.value if 3 in micro_batch.samples_B else 1.0))


@dataclass(frozen=True)
class Raised(CausalLM):
    """Its gradients are finite, its loss is not."""

    def loss(self, outputs: Outputs, micro_batch: Any) -> LossTerms:
        terms = super().loss(outputs, micro_batch)
        return replace(terms, total=terms.total + torch.inf)


def step(engine: Any, number: int, objective: CausalLM = CausalLM(), factor: float = 1.0) -> Any:
    return engine.train_step(shares(batch_of(number), engine.dp_rank, engine.dp_size, 2), objective, factor)


def whole(engine: Any) -> dict[str, Tensor]:
    """The state as one process would have it."""
    state = engine.state()
    return {name: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for name, t in state.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same but for rounding."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6)]


def skipping(layout: Layout, training: Training) -> tuple[Any, ...]:
    engine = build(DeepSpeed(), layout, training)
    step(engine, 1)
    before = whole(engine)
    broken = [Broken(torch.nan), Broken(torch.inf), Raised()]  # sample 3 belongs to rank 0
    results = [step(engine, 0, objective) for objective in broken]
    share = shares(batch_of(0), engine.dp_rank, engine.dp_size, 2)
    unlabelled = [replace(part, labels_BL=torch.full_like(part.labels_BL, -100)) for part in share]
    results.append(engine.train_step(unlabelled, CausalLM(), 1.0))
    changed = differing(before, whole(engine))
    return [r.skipped.item() for r in results], changed, step(engine, 2).skipped.item(), engine.steps.item()


def against_native(layout: Layout, directory: str) -> dict[str, Any]:
    """Two steps on either engine, then each goes on from what the other has saved."""
    engines = [build(option, layout) for option in (Native(), DeepSpeed())]
    fresh = [whole(engine) for engine in engines]
    batch = shares(batch_of(100), engines[0].dp_rank, engines[0].dp_size, 1)
    seen = []
    for engine in engines:
        seen.append([step(engine, number, factor=0.5).loss.item() for number in range(2)])
        evaluated = [engine.evaluate(batch, CausalLM(), ema).loss.item() for ema in (False, True)]
        seen[-1] += [*evaluated, engine.logprobs(batch[0]).sum().item(), step(engine, 2).loss.item()]
    trained = [whole(engine) for engine in engines]
    names = ("native", "deepspeed")
    for name, engine in zip(names, engines, strict=True):
        dcp.save(engine.state(), checkpoint_id=f"{directory}/{name}")
    swapped = [build(option, layout, seed=1) for option in (DeepSpeed(), Native())]
    for name, engine in zip(names, swapped, strict=True):
        dcp.load(engine.state(), checkpoint_id=f"{directory}/{name}")
        engine.loaded()
    return {
        "fresh": differing(*fresh),
        "moved": len(differing(fresh[0], trained[0])),
        "seen": seen,
        "trained": differing(*trained),
        "saved": [differing(one, whole(other)) for one, other in zip(trained, swapped, strict=True)],
        "next": [step(engine, 3).loss.item() for engine in (*engines, *swapped)],
        "weights": {name: tensor.shape for name, tensor in engines[1].weights(ema=True).items()},
        "names": {name: tensor.shape for name, tensor in engines[0].weights(ema=True).items()},
        "dtypes": {tensor.dtype for name, tensor in trained[1].items() if not name.startswith("engine.")},
    }


def spiking(layout: Layout) -> list[list[float]]:
    """Which steps either engine leaves out when every loss of the sixth is 50 times too large."""
    spikes = {"skip_spikes": 6.0, "spike_window": 4}
    engines = [build(option, layout, **spikes) for option in (Native(), DeepSpeed())]
    objectives = [CausalLM()] * 5 + [Broken(50.0)] + [CausalLM()]
    return [[step(e, 0, objective).skipped.item() for objective in objectives] for e in engines]


def twice(layout: Layout) -> bool:
    """Whether the same two steps give the same bits."""
    one, other = (build(DeepSpeed(), layout) for _ in range(2))
    for engine in (one, other):
        for number in range(2):
            step(engine, number)
    first, second = whole(one), whole(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def on_two_ranks(directory: str) -> tuple[dict[int, Any], dict[int, Any]]:
    skipped = {layout.zero: (*skipping(layout, SMALL), spiking(layout), twice(layout)) for layout in TWO}
    return skipped, {layout.zero: against_native(layout, f"{directory}/zero{layout.zero}") for layout in TWO}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(2, on_two_ranks, str(tmp_path_factory.mktemp("deepspeed")), timeout_s=200)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(two_ranks: list[Any], zero: int) -> None:
    for skipped, _ in two_ranks:
        assert skipped[zero][:4] == ([1.0] * 4, ["engine.steps"], 0.0, 6)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_spikes_are_left_out_as_the_native_engine_does(two_ranks: list[Any], zero: int) -> None:
    for skipped, _ in two_ranks:
        assert skipped[zero][4] == [[0.0] * 5 + [1.0, 0.0]] * 2


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_the_same_steps_give_the_same_bits(two_ranks: list[Any], zero: int) -> None:
    assert [skipped[zero][5] for skipped, _ in two_ranks] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_either_engine_goes_on_from_what_the_other_has_saved(two_ranks: list[Any], zero: int) -> None:
    for _, against in two_ranks:
        found = against[zero]
        assert (found["fresh"], found["trained"], found["saved"]) == ([], [], [[], []])
        assert found["moved"] > 20
        assert found["dtypes"] == {torch.float32}
        assert found["next"] == pytest.approx([found["next"][0]] * 4, abs=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("zero", range(4))
def test_evaluations_between_steps_are_the_native_engines(two_ranks: list[Any], zero: int) -> None:
    for _, against in two_ranks:
        native, found = against[zero]["seen"]
        assert found == pytest.approx(native, abs=5e-6, rel=1e-6)
        assert found[2] != found[3]  # the average is of other weights


@pytest.mark.slow
def test_weights_are_whole_on_rank_0_only(two_ranks: list[Any]) -> None:
    (_, first), (_, second) = two_ranks
    assert first[3]["weights"] == first[3]["names"] != {}
    assert second[3]["weights"] == {}


def in_half_precision(directory: str) -> list[Any]:
    training = replace(SMALL, precision="bf16")
    found = []
    for layout in TWO[1:]:
        alone = whole(build(Native(), layout, replace(training, precision="fp32")))
        engine = build(DeepSpeed(), layout, training)
        masters = differing(alone, whole(engine))
        step(engine, 0)
        dtypes = {tensor.dtype for name, tensor in engine.state().items() if not name.startswith("engine.")}
        found.append((masters, dtypes, skipping(layout, training)))
    return found


@pytest.mark.slow
def test_bf16_keeps_masters_moments_and_averages_in_fp32_from_the_first_step(tmp_path: Path) -> None:
    for masters, dtypes, skipped in run_ranks(2, in_half_precision, str(tmp_path), timeout_s=200)[0]:
        assert masters == []  # DeepSpeed alone would begin with rounded ones
        assert dtypes == {torch.float32}
        assert skipped == ([1.0] * 4, ["engine.steps"], 0.0, 6)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_stopped_on_one_engine_goes_on_with_the_other(tmp_path: Path) -> None:
    corpus = tiny_corpus(tmp_path / "corpus", documents=60)
    settings = ("stage.steps=12", "stage.checkpoint_every=3", "stage.ema=0.9", "model.dropout=0.1")
    complete(corpus, tmp_path / "native", *settings)
    mixed = tmp_path / "mixed"
    ways = (("deepspeed", "zero3", 3), ("native", "zero1", 6), ("deepspeed", "zero2", 0))
    for engine, layout, stop_at in ways:
        running = begin(corpus, mixed, *settings, f"engine={engine}", f"parallel={layout}", ranks=2)
        if stop_at:
            until(lambda step=stop_at: max(steps(mixed / "checkpoints"), default=0) >= step, running, 120)
            running.signal(signal.SIGTERM)
        assert running.wait(200) == [STOPPED_EARLY if stop_at else 0] * 2, running.output()
    expected, found = (
        [line["loss"] for line in read(tmp_path / run / "metrics.jsonl") if "loss" in line]
        for run in ("native", "mixed")
    )
    assert found == pytest.approx(expected, abs=5e-6)


def config(layout: Layout, **values: Any) -> Any:
    """As much of a run's configuration as the engine looks at."""
    values = {"precision": "fp32", "optim": ADAMW, "model": MODEL} | values
    stage = SimpleNamespace(precision=values["precision"])
    rest = {"model": values["model"], "optim": values["optim"], "init_from": "", "dry_run": False}
    return SimpleNamespace(parallel=layout, stage=stage, **rest)


@pytest.mark.parametrize(
    ("layout", "values", "key", "fix"),
    [
        (Layout(pp=2), {}, "parallel.pp", "pipeline parallelism here: use 1, or engine=native"),
        (Layout(cp=2), {}, "parallel.cp", "context parallelism here"),
        (Layout(ep=2), {}, "parallel.ep", "expert parallelism here"),
        (Layout(virtual_stages=2), {}, "parallel.virtual_stages", "use 1"),
        (Layout(dp_replicate=2, dp_shard=2, zero=3), {}, "parallel.dp_replicate", "use dp_shard=4 dp_replicate=1"),
        (Layout(offload="optimizer"), {}, "parallel.offload", "parallel.zero=1 or more"),
        (Layout(zero=2, offload="parameters"), {}, "parallel.offload", "needs parallel.zero=3"),
        (Layout(async_tp=True), {}, "parallel.async_tp", "use false"),
        (Layout(ring=True), {}, "parallel.ring", "use false"),
        (Layout(tp=4), {}, "parallel.tp", "of which there are 2: use tp in [1, 2]"),
        (Layout(), {"model": replace(MODEL, moe=MoE(experts=4))}, "model.moe.experts", "use 0"),
        (Layout(), {"optim": MUON}, "optim", "optim=adamw only"),
        (Layout(), {"precision": "bf16"}, "stage.precision", "without ZeRO drifts"),
        (Layout(), {"precision": "fp8"}, "stage.precision", "use bf16 or fp32"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_by_name(layout: Layout, values: Any, key: str, fix: str) -> None:
    [problem] = DeepSpeed().problems(config(layout, **values), layout.world_size)
    assert problem.key == key
    assert fix in problem.fix


def test_what_deepspeed_can_do_is_not_refused() -> None:
    for zero in range(4):
        assert DeepSpeed().problems(config(Layout(dp_shard=4, tp=2, zero=zero)), 8) == []
    assert DeepSpeed().problems(config(Layout(dp_replicate=2, dp_shard=2)), 4) == []


def test_a_missing_package_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [problem] = DeepSpeed().problems(config(Layout()), 1)
    assert str(problem) == "engine=deepspeed: the package is not installed: pip install 'longrun[deepspeed]'"
    elsewhere = SimpleNamespace(**{**vars(config(Layout())), "dry_run": True})
    assert DeepSpeed().problems(elsewhere, 1) == []
    with distributed.joined() as world, pytest.raises(DeepSpeedError, match=r"pip install 'longrun\[deepspeed\]'"):
        DeepSpeed().build(MODEL.build(VOCABULARY), Layout(), SMALL.optim.build, world=world)
