"""Pipelines: stages, schedules that end, micro-batches of any length, and what is held twice."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from parallel import distributed
from parallel.layout import SCHEDULES, V_SCHEDULES, Layout
from parallel.mesh import Mesh
from parallel.pipeline import Action, actions, cut, rank_of
from tests.ranks import run_ranks
from tools.parity import MODEL, Training, batch_of, build
from train.objectives.clm import CausalLM

ONE_STAGE = ("gpipe", "1f1b")


def layout_of(schedule: str, pp: int, micro_batches: int) -> Layout:
    stages = 1 if schedule in ONE_STAGE else 2
    return Layout(pp=pp, schedule=schedule, virtual_stages=stages, micro_batches=micro_batches)


@pytest.mark.parametrize(("layers", "stages"), [(4, 2), (5, 2), (7, 4), (4, 4)])
def test_every_layer_is_in_one_stage_and_no_stage_has_two_more_than_another(layers: int, stages: int) -> None:
    parts = cut(layers, stages)
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert list(map(len, parts)) == sorted(map(len, parts), reverse=True)


def test_stages_go_round_or_there_and_back() -> None:
    assert [rank_of(stage, layout_of("interleaved_1f1b", 3, 6)) for stage in range(6)] == [0, 1, 2, 0, 1, 2]
    for schedule in V_SCHEDULES:
        assert [rank_of(stage, layout_of(schedule, 3, 6)) for stage in range(6)] == [0, 1, 2, 2, 1, 0]


def all_orders(layouts: list[Layout]) -> list[list[list[Action]]]:
    world = distributed.start()
    group = Mesh(layouts[0], world.device).axes["pp"].get_group()
    return [actions(layout, layout.micro_batches, group) for layout in layouts]


@pytest.mark.parametrize("pp", [2, 4])
def test_every_schedule_does_everything_once_and_waits_for_nothing_that_never_comes(pp: int) -> None:
    layouts = [layout_of(schedule, pp, 2 * pp) for schedule in SCHEDULES]
    for layout, order in zip(layouts, run_ranks(pp, all_orders, layouts)[0], strict=True):
        stages, number = layout.pp * layout.virtual_stages, layout.micro_batches
        counts = Counter("B" if kind == "I" else kind for own in order for kind, _, _ in own)
        assert counts["F"] == counts["B"] == stages * number
        assert counts["W"] == sum(kind == "I" for own in order for kind, _, _ in own)
        run(order, layout, stages)


def run(order: list[list[Action]], layout: Layout, stages: int) -> None:
    """Each rank does its next action once its inputs are there."""
    done: set[tuple[str, int, int]] = set()
    waiting = [list(own) for own in order]
    while any(waiting):
        ready = [own for own in waiting if own and inputs(own[0], stages) <= done]
        assert ready, f"{layout.schedule}: all ranks wait"
        for own in ready:
            kind, stage, micro_batch = own.pop(0)
            assert kind == "W" or (kind, stage, micro_batch) not in done
            done.add(("B" if kind == "I" else kind, stage, micro_batch))


def inputs(action: Action, stages: int) -> set[tuple[str, int, int]]:
    kind, stage, micro_batch = action
    if kind == "F":
        return {("F", stage - 1, micro_batch)} if stage else set()
    if kind == "W":
        return {("B", stage, micro_batch)}
    return {("F", stage, micro_batch)} | ({("B", stage + 1, micro_batch)} if stage < stages - 1 else set())


def losses_of_lengths(layout: Layout) -> list[float]:
    engine = build(layout, Training(model=replace(MODEL, layers=2)), distributed.start())
    found = []
    for step in range(3):
        batch = batch_of(step)
        short = replace(
            batch,
            **{n: getattr(batch, n)[:, :20] for n in ("tokens_BL", "labels_BL", "positions_BL", "documents_BL")},
        )
        found.append(engine.train_step([batch, short], CausalLM(), 1.0).loss.item())
    return found


def test_micro_batches_may_differ_in_length() -> None:
    [expected] = run_ranks(1, losses_of_lengths, Layout(micro_batches=2))
    for found in run_ranks(2, losses_of_lengths, Layout(pp=2, micro_batches=2)):
        assert found == pytest.approx(expected, abs=5e-6)


def held_twice(layout: Layout) -> tuple[list[str], bool]:
    engine = build(layout, Training(model=replace(MODEL, layers=4)), distributed.start())
    for step in range(2):
        engine.train_step(list(_quarters(step)), CausalLM(), 1.0)
    twins = list(engine.placement._twins())
    moments = [engine.optimizer.state[tensor]["exp_avg"] for pair in twins for tensor in pair]
    alike = all(torch.equal(*pair) for pair in twins) and (not moments or torch.equal(*moments))
    holds_both = layout.schedule in V_SCHEDULES and engine.mesh.pp_rank == 0
    return sorted(engine.state()), alike and bool(twins) == holds_both


def _quarters(step: int):
    batch = batch_of(step)
    for quarter in range(4):
        rows = slice(2 * quarter, 2 * quarter + 2)
        yield replace(batch, **{name: getattr(batch, name)[rows] for name in vars(batch)})


@pytest.mark.parametrize("schedule", ["zbv", "interleaved_1f1b"])
def test_a_tied_embedding_is_the_same_in_the_first_stage_and_the_last(schedule: str) -> None:
    (names, alike), (others, also) = run_ranks(2, held_twice, layout_of(schedule, 2, 4))
    assert alike
    assert also
    assert "model.model.embed_tokens.weight" in names
    assert ("model.model.embed_tokens.weight" in others) == (schedule not in V_SCHEDULES)
    everything = set(names) | set(others)
    [(alone, _)] = run_ranks(1, held_twice, Layout(micro_batches=4))
    assert everything == set(alone)
