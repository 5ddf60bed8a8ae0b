"""engine=megatron: the run of engine=native, on Megatron's layers, and refusals by name of what it cannot do."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from parallel import distributed
from parallel.distributed import World
from parallel.engine import LossTerms, Outputs, Settings
from parallel.engines.megatron import Megatron, layout_problems
from parallel.engines.megatron_model import Norm, model_problems
from parallel.engines.megatron_names import pieces
from parallel.engines.native import EngineError, Native
from parallel.layout import Layout
from tests.ranks import run_ranks
from tools.parity import (
    ADAMW,
    BF16,
    MODEL,
    MUON,
    VOCABULARY,
    Cell,
    Training,
    Trajectory,
    batch_of,
    difference,
    shares,
    train,
)
from train.models.transformer import initialise
from train.objectives.clm import CausalLM

SMALL = Training(model=replace(MODEL, layers=2), steps=3)
DEEP = Training(model=replace(MODEL, layers=5), steps=3)
UNTIED = Training(model=replace(MODEL, layers=2, tied=False, qkv_bias=True, qk_norm=True), steps=3, ema=0.9)
BIASED = Training(model=replace(MODEL, layers=2, qkv_bias=True, output_bias=True, mlp_bias=True), steps=3)
INTERLEAVED = {"virtual_stages": 2, "schedule": "interleaved_1f1b"}


def make(engine: Any, layout: Layout, training: Training, world: World, seed: int = 0) -> Any:
    with torch.device("meta"):
        model = training.model.build(VOCABULARY)
    return engine.build(
        model,
        layout,
        training.optim.build,
        world=world,
        settings=Settings(precision=training.precision, clip=training.clip, ema=training.ema),
        initialise=lambda placed: initialise(placed, seed),
    )


def megatron(layout: Layout, training: Training = SMALL, seed: int = 0) -> Any:
    return make(Megatron(cpu=True), layout, training, distributed.start(), seed)


def train_each(engine: Any, cells: Sequence[Cell], sabotage: Any = None) -> list[Trajectory]:
    if sabotage:
        sabotage()
    world = distributed.start()
    found = []
    for cell in cells:
        made = make(engine, cell.layout, cell.training, world)
        found.append(train(made, cell.layout, cell.training, range(cell.training.steps)))
    return found


def red(cells: Sequence[Cell], sabotage: Any = None, timeout_s: float = 250) -> str:
    """The cells that are over their gate, each held against one process of the native engine."""
    alone = [replace(cell, layout=Layout(), training=replace(cell.training, precision="fp32")) for cell in cells]
    [expected] = run_ranks(1, train_each, Native(), alone, timeout_s=timeout_s)
    found = run_ranks(cells[0].layout.world_size, train_each, Megatron(cpu=True), cells, sabotage, timeout_s=timeout_s)[
        0
    ]
    rows = [difference(*three) for three in zip(cells, found, expected, strict=True)]
    return "\n".join(str(row) for row in rows if not row.passed)


def test_two_ranks_train_the_run_of_one_native_process() -> None:
    two = {"micro_batches": 2}
    assert not red(
        [
            Cell("tp2-untied-ema", Layout(tp=2, **two), UNTIED),
            Cell("pp2-interleaved-uneven", Layout(pp=2, **INTERLEAVED, **two), DEEP),
            Cell("cp2", Layout(cp=2, **two), SMALL),
            Cell("distributed-optimizer-ema", Layout(dp_shard=2, zero=1, **two), UNTIED),
        ]
    )


@pytest.mark.slow
def test_two_ranks_train_the_run_of_one_native_process_over_20_steps() -> None:
    two = {"micro_batches": 2}
    half = replace(SMALL, precision="bf16", steps=20)
    steps = replace(SMALL, steps=20)
    assert not red(
        [
            Cell("tp2-biased-recomputed", Layout(tp=2, recompute="selective", **two), replace(BIASED, steps=20)),
            Cell("tp2-bf16", Layout(tp=2, **two), half, gate=BF16),
            Cell("pp2-recomputed", Layout(pp=2, recompute="full", micro_batches=4), steps),
            Cell("cp2-ring", Layout(cp=2, ring=True), steps),
            Cell("dp2", Layout(dp_shard=2, **two), steps),
            Cell("distributed-optimizer-bf16", Layout(dp_shard=2, zero=1), half, gate=BF16),
        ]
    )


@pytest.mark.slow
def test_four_ranks_train_the_run_of_one_native_process_over_20_steps() -> None:
    two = {"micro_batches": 2}
    assert not red(
        [
            Cell("tp4", Layout(tp=4, **two), replace(SMALL, model=replace(SMALL.model, kv_heads=4), steps=20)),
            Cell("tp2-pp2", Layout(tp=2, pp=2, **two), replace(SMALL, steps=20)),
            Cell("tp2-pp2-interleaved", Layout(tp=2, pp=2, **INTERLEAVED, **two), replace(DEEP, steps=20)),
            Cell("tp2-dp2-zero1", Layout(tp=2, dp_shard=2, zero=1, **two), replace(UNTIED, steps=20)),
            Cell("tp2-cp2", Layout(tp=2, cp=2, **two), replace(SMALL, steps=20)),
            Cell("cp2-dp2-zero1", Layout(dp_shard=2, cp=2, zero=1, **two), replace(SMALL, steps=20)),
            Cell("pp2-dp2-zero1", Layout(pp=2, dp_shard=2, zero=1, **two), replace(SMALL, steps=20)),
            Cell("pp2-dp2-half-recomputed", Layout(pp=2, dp_shard=2, recompute="0.5", **two), replace(DEEP, steps=20)),
        ]
    )


@pytest.mark.slow
def test_eight_ranks_train_the_run_of_one_native_process_over_20_steps() -> None:
    layout = Layout(tp=2, pp=2, dp_shard=2, micro_batches=2)
    steps = replace(SMALL, steps=20)
    assert not red([Cell("zero0", layout, steps), Cell("zero1", replace(layout, zero=1), steps)])


def norms_that_nobody_adds_up() -> None:
    """As torch's own norm is: each tensor-parallel rank has the gradient of its part of the sequence."""
    make_norm = Norm.__init__

    def silent(self: Norm, config: Any, *args: Any, **kwargs: Any) -> None:
        make_norm(self, config, *args, **kwargs)
        self.weight.sequence_parallel = False  # type: ignore[attr-defined]

    Norm.__init__ = silent  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_norm_whose_gradient_is_not_added_up_is_seen() -> None:
    assert "RED" in red([Cell("tp2", Layout(tp=2), SMALL)], norms_that_nobody_adds_up)


def bits(layouts: Sequence[Layout]) -> list[tuple[list[float], dict[str, float]]]:
    runs = train_each(Megatron(cpu=True), [Cell("again", layout, UNTIED) for layout in layouts])
    return [(run.losses, {name: w.double().sum().item() for name, w in run.weights.items()}) for run in runs]


@pytest.mark.slow
def test_the_same_layout_gives_the_same_bits() -> None:
    layouts = [
        Layout(tp=2, micro_batches=2),
        Layout(dp_shard=2, zero=1, micro_batches=2),
        Layout(pp=2, micro_batches=2),
    ]
    assert run_ranks(2, bits, layouts, timeout_s=250) == run_ranks(2, bits, layouts, timeout_s=250)


def part_of_a_run(
    engine: Any, layout: Layout, training: Training, steps: range, loaded: Path | None, saved: Path | None
) -> Trajectory:
    made = make(engine, layout, training, distributed.start(), seed=steps.start)
    if loaded:
        dcp.load(made.state(), checkpoint_id=loaded)
        made.loaded()
    found = train(made, layout, training, steps)
    if saved:
        dcp.save(made.state(), checkpoint_id=saved)
    return found


@pytest.mark.slow
def test_a_run_stops_on_one_engine_and_goes_on_with_the_other_and_back(tmp_path: Path) -> None:
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    parts = [
        (Native(), Layout(dp_shard=2, zero=3), range(2), None, first),
        (Megatron(cpu=True), Layout(dp_shard=2, zero=1), range(2, 4), first, second),
        (Megatron(cpu=True), Layout(pp=2), range(4, 6), second, third),
        (Native(), Layout(), range(6, 8), third, None),
    ]
    [whole] = run_ranks(1, part_of_a_run, Native(), Layout(), UNTIED, range(8), None, None)
    found = [run_ranks(p[1].world_size, part_of_a_run, p[0], p[1], UNTIED, *p[2:], timeout_s=250)[0] for p in parts]
    losses, norms = ([value for part in found for value in getattr(part, key)] for key in ("losses", "grad_norms"))
    cell = Cell("native-megatron-native", Layout(), UNTIED)
    row = difference(cell, Trajectory(losses, norms, found[-1].weights), whole)
    assert row.passed, str(row)


def answers(engine: Any, layouts: Sequence[Layout]) -> list[Any]:
    """What each engine says of three micro-batches of uneven length, before any step and without changing anything."""
    world = distributed.start()
    found = []
    for layout in layouts:
        made = make(engine, layout, replace(DEEP, ema=0.5), world)
        parts = shares(batch_of(0), made.dp_rank, made.dp_size, 4)[: 3 if layout.dp == 1 else 1]
        parts = [cut(part, 32 - number) for number, part in enumerate(parts)]
        before = made.evaluate(parts, CausalLM(), ema=True).loss.item()
        bidirectional = made.evaluate(parts, Bidirectional()).loss.item()
        found.append((before, bidirectional, made.logprobs(parts[-1])))
    return found


def cut(part: Any, length: int) -> Any:
    names = ("tokens_BL", "labels_BL", "positions_BL", "documents_BL")
    return replace(part, **{name: getattr(part, name)[:, :length].contiguous() for name in names})


@dataclass(frozen=True)
class Bidirectional(CausalLM):
    """Cross-entropy under a model that looks both ways."""

    causal = False


def test_evaluation_and_logprobs_are_the_native_ones_in_both_directions_at_any_length() -> None:
    layouts = [Layout(), Layout(tp=2), Layout(cp=2), Layout(pp=2), Layout(pp=2, micro_batches=2, **INTERLEAVED)]
    [[native]] = run_ranks(1, answers, Native(), layouts[:1])
    for rank in run_ranks(2, answers, Megatron(cpu=True), layouts[1:], timeout_s=250):
        for loss, bidirectional, logprobs_BL in rank:
            assert loss == pytest.approx(native[0], abs=5e-6)
            assert bidirectional == pytest.approx(native[1], abs=5e-6)
            torch.testing.assert_close(logprobs_BL, native[2], atol=5e-6, rtol=0)


@dataclass(frozen=True)
class Broken(CausalLM):
    """Causal language modelling, but for one sample, which is rank 0's."""

    def loss(self, outputs: Outputs, micro_batch: Any) -> LossTerms:
        terms = super().loss(outputs, micro_batch)
        return replace(terms, total=terms.total * (torch.nan if 3 in micro_batch.samples_B else 1.0))


def looked_at(layouts: Sequence[Layout]) -> list[tuple[list[str], dict[str, tuple[int, ...]], bool, bool]]:
    untouched = torch.cuda.current_device
    found = []
    for layout in layouts:
        engine = megatron(layout, UNTIED)
        parts = shares(batch_of(0), engine.dp_rank, engine.dp_size, 2)
        engine.train_step(parts, CausalLM(), 1.0)
        before = copies(engine)
        skipped = engine.train_step(parts, Broken(), 1.0).skipped.item()
        after = copies(engine)
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        other = megatron(layout, UNTIED, seed=1)
        here, there = engine.state(), other.state()
        for name, tensor in there.items():
            tensor.copy_(here[name])
        other.loaded()
        same = bool(engine.evaluate(parts, CausalLM()).loss == other.evaluate(parts, CausalLM()).loss)
        shapes = {name: tuple(tensor.shape) for name, tensor in here.items()}
        found.append((changed, shapes, skipped == 1.0, same))
    assert torch.cuda.current_device is untouched, "what the CPU mode replaces is put back"
    return found


def copies(engine: Any) -> dict[str, Tensor]:
    state = engine.state()
    return {name: (t.to_local() if hasattr(t, "to_local") else t).clone() for name, t in state.items()}


def native_names() -> dict[str, tuple[int, ...]]:
    state = make(Native(), Layout(), UNTIED, distributed.start()).state()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def test_the_state_is_the_native_one_survives_a_loss_that_is_not_finite_and_can_be_loaded() -> None:
    [native] = run_ranks(1, native_names)
    ranks = run_ranks(2, looked_at, [Layout(tp=2), Layout(dp_shard=2, zero=1), Layout(pp=2)], timeout_s=250)
    for of_layout in zip(*ranks, strict=True):
        for changed, shapes, skipped, same in of_layout:
            assert changed == ["engine.steps"]
            assert all(native[name] == shape for name, shape in shapes.items())
            assert skipped
            assert same
        assert set().union(*(shapes for _, shapes, *_ in of_layout)) == set(native)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_fused_projections_hold_each_canonical_element_once(name: str) -> None:
    architecture = replace(MODEL, heads=4, kv_heads=2, head_dim=4, hidden=8, intermediate=6)
    columns = (8,) if name == "weight" else ()
    for fused, rows in (("self_attention.linear_qkv", 32), ("mlp.linear_fc1", 12)):
        whole = torch.arange(rows * 8 if columns else rows).view(rows, *columns)
        parts = pieces(f"decoder.layers.1.{fused}.{name}", 3, architecture, 0)
        found = torch.cat([piece.select(whole).flatten() for piece in parts])
        assert torch.equal(found.sort().values, whole.flatten())
        assert all(piece.name.startswith("model.layers.4.") and piece.dimension == 0 for piece in parts)
    query, key, value = pieces("decoder.layers.0.self_attention.linear_qkv.bias", 0, architecture, 0)
    fused = torch.arange(32)  # per key/value head: two query heads of 4 features, then key and value
    assert query.select(fused).flatten().tolist() == [*range(8), *range(16, 24)]
    assert key.select(fused).flatten().tolist() == [*range(8, 12), *range(24, 28)]
    assert value.select(fused).flatten().tolist() == [*range(12, 16), *range(28, 32)]


@pytest.mark.parametrize(
    ("layout", "key", "text"),
    [
        (Layout(dp_shard=2, ep=2), "parallel.ep", "dense decoders only"),
        (Layout(dp_shard=2, zero=2), "parallel.zero", "distributed optimizer"),
        (Layout(dp_replicate=2, dp_shard=2, zero=1), "parallel.dp_replicate", "dp_shard=4"),
        (Layout(pp=2, schedule="zbv"), "parallel.schedule", "1f1b only"),
        (Layout(pp=2, virtual_stages=2, micro_batches=2), "parallel.schedule", "interleaved_1f1b only"),
        (Layout(pp=2, micro_batches=3, **INTERLEAVED), "parallel.micro_batches", "2 or 4"),
        (Layout(offload="optimizer"), "parallel.offload", "offloads nothing"),
        (Layout(tp=2, async_tp=True), "parallel.async_tp", "engine=native"),
    ],
)
def test_a_layout_that_megatron_does_not_have_is_refused_by_name(layout: Layout, key: str, text: str) -> None:
    assert any(problem.key == key and text in problem.fix for problem in layout_problems(layout))


@pytest.mark.parametrize(
    ("changes", "layout", "key"),
    [
        ({"dropout": 0.1}, Layout(), "model.dropout"),
        ({"output_bias": True}, Layout(), "model.output_bias"),
        ({"mlp_bias": True, "output_bias": True}, Layout(), "model.mlp_bias"),
        ({}, Layout(tp=4), "model.kv_heads"),
        ({"intermediate": 129}, Layout(tp=2), "model.intermediate"),
        ({"layers": 3}, Layout(pp=2, virtual_stages=2), "model.layers"),
    ],
)
def test_a_model_that_megatron_does_not_have_is_refused_by_name(changes: Any, layout: Layout, key: str) -> None:
    assert [problem.key for problem in model_problems(replace(MODEL, **changes), layout)] == [key]


def config_of(**changes: Any) -> Any:
    """As much of a run's configuration as the engine looks at."""
    settings = Settings(**changes.pop("settings", {}))
    stage = SimpleNamespace(settings=lambda seed, guard: settings)
    plain = {"stage": stage, "model": MODEL, "parallel": Layout(), "optim": ADAMW, "seed": 0, "guard": None}
    plain |= {"dry_run": False, "init_from": ""}
    return SimpleNamespace(**{**plain, **changes})


def keys(engine: Megatron, config: Any) -> list[str]:
    return [problem.key for problem in engine.problems(config, 1)]


def test_a_run_that_megatron_cannot_do_is_refused_with_all_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keys(Megatron(cpu=True), config_of()) == []
    refused = config_of(optim=MUON, settings={"precision": "fp8", "compile": True}, parallel=Layout(zero=2))
    assert keys(Megatron(cpu=True), refused) == ["parallel.zero", "optim", "stage.precision", "stage.compile"]
    assert keys(Megatron(), config_of()) == ["engine.cpu"]
    given = {"init_from": "runs/base", "parallel": Layout(pp=1, tp=8)}  # whose sizes are those of another model
    assert keys(Megatron(cpu=True), config_of(**given)) == []
    assert keys(Megatron(cpu=True), config_of(**given, model=replace(MODEL, dropout=0.1))) == ["model.dropout"]
    assert keys(Megatron(cpu=True, transformer_engine=True), config_of()) == ["engine.transformer_engine"]
    assert keys(Megatron(), config_of(dry_run=True)) == []
    assert keys(Megatron(), config_of(stage=SimpleNamespace(), parallel=Layout(zero=3))) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [problem] = Megatron(cpu=True).problems(config_of(), 1)
    assert "pip install 'longrun[megatron]'" in problem.fix
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert keys(Megatron(cpu=True), config_of()) == ["engine", "engine.cpu"]


def test_building_what_megatron_cannot_do_names_all_reasons() -> None:
    world = distributed.start()
    try:
        with pytest.raises(EngineError, match=r"(?s)engine\.cpu.*parallel\.zero.*model\.dropout"):
            make(Megatron(), Layout(zero=2), Training(model=replace(MODEL, dropout=0.1)), world)
        with pytest.raises(EngineError, match="initialise="), torch.device("meta"):
            Megatron(cpu=True).build(MODEL.build(VOCABULARY), Layout(), ADAMW.build, world=world)
    finally:
        distributed.stop()


def test_configurations_are_checked_without_importing_megatron() -> None:
    code = """
import sys
sys.modules["megatron"] = None
import train.config
from parallel.engines.megatron import Megatron, layout_problems
from parallel.layout import Layout
assert layout_problems(Layout(zero=3))
assert Megatron
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
