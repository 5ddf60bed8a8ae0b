"""The ZeRO stages move what the table in parallel/zero.py says, and nothing else."""

from collections import Counter
from dataclasses import replace

from torch.utils._python_dispatch import TorchDispatchMode

from parallel import distributed
from parallel.layout import Layout
from tests.ranks import run_ranks
from tools.parity import MODEL, Training, batch_of, build, shares
from train.objectives.clm import CausalLM

MICRO_BATCHES, BLOCKS = 2, 3
UNITS = BLOCKS + 1
"""Each block, and the embedding with the last norm."""


class Collectives(TorchDispatchMode):
    """Counts the collectives below it."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.counts[function._schema.name.removeprefix("c10d::")] += 1
        return function(*args, **(kwargs or {}))


def collectives_of_a_step(layouts: list[Layout]) -> list[dict[str, int]]:
    world = distributed.start()
    counted = []
    for layout in layouts:
        engine = build(layout, Training(model=replace(MODEL, layers=BLOCKS)), world)
        for step in range(2):  # the first makes streams and buffers
            share = shares(batch_of(step), engine.dp_rank, engine.dp_size, MICRO_BATCHES)
            with Collectives() as collectives:
                engine.train_step(share, CausalLM(), 1.0)
        counted.append(dict(collectives.counts))
    return counted


def expected(gathers: int, scatters: int, reductions: int) -> dict[str, int]:
    found = {"_allgather_base_": gathers, "_reduce_scatter_base_": scatters, "allreduce_": reductions + 1}
    return {name: count for name, count in found.items() if count}


def test_a_step_makes_the_collectives_of_its_stage() -> None:
    layouts = [Layout(dp_shard=2, zero=zero, micro_batches=MICRO_BATCHES) for zero in range(4)]
    counted = run_ranks(2, collectives_of_a_step, layouts)
    assert counted[0] == counted[1]
    assert counted[0] == [
        expected(0, 0, UNITS),
        expected(UNITS, UNITS, 0),
        expected(UNITS, MICRO_BATCHES * UNITS, 0),
        expected(MICRO_BATCHES * (2 * UNITS - 1), MICRO_BATCHES * UNITS, 0),
    ]


def test_replicas_of_shards_reduce_once_a_step() -> None:
    layouts = [Layout(dp_replicate=2, dp_shard=2, zero=zero, micro_batches=MICRO_BATCHES) for zero in (1, 2, 3)]
    counted = run_ranks(4, collectives_of_a_step, layouts)[0]
    assert counted == [
        expected(UNITS, UNITS, UNITS),
        expected(UNITS, MICRO_BATCHES * UNITS, UNITS),
        expected(MICRO_BATCHES * (2 * UNITS - 1), MICRO_BATCHES * UNITS, UNITS),
    ]


def test_one_process_moves_nothing_but_its_figures() -> None:
    layouts = [Layout(zero=zero, micro_batches=MICRO_BATCHES) for zero in (0, 3)]
    assert run_ranks(1, collectives_of_a_step, layouts) == [[expected(0, 0, 0)] * 2]
