"""The native engine beyond parity: skipped steps, state, averages, precision, and what it refuses."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parallel import distributed
from parallel.engine import LossTerms, Outputs, Settings
from parallel.engines.native import EngineError, Native, NativeEngine
from parallel.layout import Layout
from parallel.precision import PrecisionError, compute_dtype, has_native_bf16
from tests.ranks import run_ranks
from tools.parity import ADAMW, MODEL, MUON, VOCABULARY, Training, batch_of, build, shares, train
from train.models.transformer import initialise
from train.objectives.clm import CausalLM

SMALL = Training(model=replace(MODEL, layers=1))
EVERYTHING = replace(SMALL, ema=0.9, optim=MUON)


@pytest.fixture
def world() -> Iterator[distributed.World]:
    yield distributed.start()
    distributed.stop()


@dataclass(frozen=True)
class Broken(CausalLM):
    """Causal language modelling, but for one sample."""

    value: float = math.nan

    def loss(self, outputs: Outputs, micro_batch: Any) -> LossTerms:
        terms = super().loss(outputs, micro_batch)
        return replace(terms, total=terms.total * (self.value if 3 in micro_batch.samples_B else 1.0))


def copies(engine: NativeEngine) -> dict[str, Tensor]:
    """This rank's part of the state."""
    state = engine.state()
    return {name: (t.to_local() if hasattr(t, "to_local") else t).clone() for name, t in state.items()}


def step(engine: NativeEngine, number: int, objective: CausalLM, factor: float = 1.0) -> Any:
    return engine.train_step(shares(batch_of(number), engine.dp_rank, engine.dp_size, 2), objective, factor)


def skip_a_step(layout: Layout) -> tuple[float, float, list[str], float]:
    engine = build(layout, EVERYTHING, distributed.start())
    step(engine, 1, CausalLM())
    before = copies(engine)
    skipped = step(engine, 0, Broken()).skipped.item()  # sample 3 belongs to rank 0
    after = copies(engine)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    return skipped, step(engine, 2, CausalLM()).skipped.item(), changed, engine.steps.item()


@pytest.mark.parametrize("layout", [Layout(dp_shard=2, zero=3), Layout(dp_shard=2, zero=0)])
def test_a_loss_that_is_not_finite_on_one_rank_changes_nothing_on_any(layout: Layout) -> None:
    for skipped, next_skipped, changed, steps in run_ranks(2, skip_a_step, layout):
        assert (skipped, next_skipped, steps) == (1.0, 0.0, 3)
        assert changed == ["engine.steps"]


def test_an_infinite_gradient_norm_skips_the_step(world: distributed.World) -> None:
    engine = build(Layout(), SMALL, world)
    result = step(engine, 0, Broken(value=1e30))
    assert (result.loss.isfinite().item(), result.skipped.item()) == (True, 1.0)


def test_a_batch_without_a_label_is_skipped(world: distributed.World) -> None:
    engine = build(Layout(), SMALL, world)
    batch = batch_of(0)
    before = engine.weights()
    result = engine.train_step([replace(batch, labels_BL=torch.full_like(batch.labels_BL, -100))], CausalLM(), 1.0)
    assert (result.weight.item(), result.skipped.item()) == (0.0, 1.0)
    assert all(torch.equal(before[name], weight) for name, weight in engine.weights().items())


def test_moments_exist_and_are_zero_before_the_first_step(world: distributed.World) -> None:
    state = build(Layout(), EVERYTHING, world).state()
    names = {name.removeprefix("model.") for name in state if name.startswith("model.")}
    moments = {name: tensor for name, tensor in state.items() if name.startswith("optimizer.")}
    assert all(not tensor.any() for tensor in moments.values())
    assert {name.removeprefix("optimizer.").rpartition(".")[0] for name in moments} == names
    assert "optimizer.model.layers.0.mlp.up_proj.weight.momentum_buffer" in moments
    assert {"exp_avg", "exp_avg_sq", "step"} == {n.rpartition(".")[2] for n in moments if "norm" in n}
    assert {name.removeprefix("ema.") for name in state if name.startswith("ema.")} == names


def test_a_tied_embedding_appears_once(world: distributed.World) -> None:
    engine = build(Layout(), SMALL, world)
    of_vocabulary = [name for name, tensor in engine.state().items() if VOCABULARY in tensor.shape]
    assert of_vocabulary == [
        "model.model.embed_tokens.weight",
        "optimizer.model.embed_tokens.weight.exp_avg",
        "optimizer.model.embed_tokens.weight.exp_avg_sq",
    ]
    assert "lm_head.weight" not in engine.weights()


def weights_and_names(layout: Layout) -> tuple[dict[str, Tensor], set[str]]:
    engine = build(layout, SMALL, distributed.start())
    return engine.weights(), set(engine.state())


def test_state_names_do_not_depend_on_the_layout_and_weights_are_whole_on_rank_0_only() -> None:
    [(alone, names)] = run_ranks(1, weights_and_names, Layout())
    (first, first_names), (second, second_names) = run_ranks(2, weights_and_names, Layout(dp_shard=2, zero=3))
    assert names == first_names == second_names
    assert all(torch.equal(alone[name], first[name]) for name in alone)
    assert first["model.embed_tokens.weight"].shape == (VOCABULARY, MODEL.hidden)
    assert second == {}


def evaluate_between(layout: Layout) -> tuple[list[float], list[float], bool]:
    world = distributed.start()
    plain, disturbed = (build(layout, replace(SMALL, ema=0.5), world) for _ in range(2))
    expected, found, checks = [], [], []
    for number in range(3):
        expected.append(step(plain, number, CausalLM()).loss.item())
        batch = shares(batch_of(100), disturbed.dp_rank, disturbed.dp_size, 1)
        before = disturbed.evaluate(batch, CausalLM()).loss.item()
        averaged = disturbed.evaluate(batch, CausalLM(), ema=True).loss.item()
        disturbed.logprobs(batch[0])
        found.append(step(disturbed, number, CausalLM()).loss.item())
        after = disturbed.evaluate(batch, CausalLM()).loss.item()
        # Debiased, the average is the weights themselves until the second step.
        checks.append(before != after and (averaged != before) == (number == 2))
    return expected, found, all(checks)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_evaluation_between_steps_sees_new_weights_and_leaves_training_as_it_was(zero: int) -> None:
    expected, found, seen = run_ranks(2, evaluate_between, Layout(dp_shard=2, zero=zero, micro_batches=2))[0]
    assert found == expected
    assert seen


def test_weights_loaded_after_an_evaluation_are_used(world: distributed.World) -> None:
    engine = build(Layout(), SMALL, world)
    other = build(Layout(), SMALL, world, seed=1)
    batch = [batch_of(0)]
    first = engine.evaluate(batch, CausalLM()).loss
    for name, tensor in engine.state().items():
        tensor.copy_(other.state()[name])
    engine.loaded()
    assert engine.evaluate(batch, CausalLM()).loss == other.evaluate(batch, CausalLM()).loss != first


def test_the_schedule_factor_multiplies_the_base_rate(world: distributed.World) -> None:
    half = build(Layout(), replace(SMALL, optim=replace(ADAMW, lr=2e-3)), world)
    whole = build(Layout(), SMALL, world)
    for number in range(2):
        step(half, number, CausalLM(), factor=0.5)
        step(whole, number, CausalLM(), factor=1.0)
    assert all(torch.equal(w, half.weights()[name]) for name, w in whole.weights().items())


def test_metrics_are_means_over_all_terms(world: distributed.World) -> None:
    @dataclass(frozen=True)
    class Counted(CausalLM):
        def loss(self, outputs: Outputs, micro_batch: Any) -> LossTerms:
            terms = super().loss(outputs, micro_batch)
            return replace(terms, metrics={"twice": 2 * terms.total, "one": terms.weight})

    result = step(build(Layout(), SMALL, world), 0, Counted())
    assert result.metrics["twice"].item() == pytest.approx(2 * result.loss.item())
    assert result.metrics["one"].item() == 1.0


def test_no_clipping_leaves_large_gradients(world: distributed.World) -> None:
    sgd = replace(SMALL, optim=replace(ADAMW, beta1=0.0, beta2=0.0, eps=1.0))  # the step grows with the gradient
    moved = []
    for clip in (0.0, 0.1):
        engine = build(Layout(), replace(sgd, clip=clip), world)
        before = engine.weights()
        norm = step(engine, 0, CausalLM()).grad_norm.item()
        moved.append(max(float((w - before[name]).abs().max()) for name, w in engine.weights().items()))
    assert norm > 0.1  # as it was before clipping
    assert moved[0] > 2 * moved[1]


def _initialised() -> nn.Module:
    model = replace(MODEL, layers=1, dropout=0.1).build(VOCABULARY)
    initialise(model, 0)
    return model


def test_a_compiled_block_is_asked_for_by_the_switch(world: distributed.World, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda module: compiled.append(module))
    model = _initialised()
    Native().build(model, Layout(), ADAMW.build, world=world, settings=Settings(compile=True))
    assert compiled == list(model.blocks)


def compiled_losses(layout: Layout) -> tuple[list[float], list[float]]:
    world = distributed.start()
    losses = []
    for compile in (False, True):
        settings = Settings(precision="fp32", compile=compile)
        engine = Native().build(_initialised(), layout, ADAMW.build, world=world, settings=settings)
        losses.append(train(engine, layout, SMALL, range(2)).losses)
    return losses[0], losses[1]


@pytest.mark.slow
def test_compiled_and_eager_blocks_train_the_same_run() -> None:
    eager, compiled = run_ranks(2, compiled_losses, Layout(dp_shard=2, zero=2, micro_batches=2), timeout_s=280)[0]
    assert compiled == pytest.approx(eager, abs=5e-6)


def test_precision_auto_follows_the_device(world: distributed.World) -> None:
    expected = torch.bfloat16 if has_native_bf16(world.device) else torch.float32
    assert compute_dtype("auto", world.device) == expected
    assert compute_dtype("bf16", world.device) == torch.bfloat16
    assert has_native_bf16(torch.device("meta")) is False
    with pytest.raises(PrecisionError, match=r"fp16.*one of auto, bf16, fp32"):
        compute_dtype("fp16", world.device)


def test_bf16_keeps_masters_moments_and_averages_in_fp32(world: distributed.World) -> None:
    engine = build(Layout(), replace(EVERYTHING, precision="bf16"), world)
    step(engine, 0, CausalLM())
    assert {t.dtype for name, t in engine.state().items() if not name.startswith("engine.")} == {torch.float32}


def test_what_the_engine_cannot_run_is_refused(world: distributed.World) -> None:
    with pytest.raises(EngineError, match="SGD does not take grad_scale"):
        Native().build(_initialised(), Layout(), lambda m: torch.optim.SGD(m.parameters(), 0.1), world=world)
    with pytest.raises(EngineError, match="Linear has no ModuleList `blocks`"):
        Native().build(nn.Linear(2, 2), Layout(), ADAMW.build, world=world)
    with torch.device("meta"), pytest.raises(EngineError, match="initialise="):
        Native().build(MODEL.build(VOCABULARY), Layout(), ADAMW.build, world=world)
    engine = build(Layout(), SMALL, world)
    with pytest.raises(EngineError, match=r"stage\.ema"):
        engine.evaluate([batch_of(0)], CausalLM(), ema=True)
    with pytest.raises(EngineError, match=r"stage\.ema"):
        engine.weights(ema=True)
