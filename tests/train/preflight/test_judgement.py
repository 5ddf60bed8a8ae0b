"""From what thousands of ranks found to the machines that are slow or wrong, and to no others."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.layout import Layout
from train.preflight import clocks, compute, disk, inputs, links, memory, paths
from train.preflight.base import Finding, Record
from train.preflight.limits import Preflight, PreflightError
from train.preflight.table import table
from train.stages.training import Training

LIMITS = Preflight()
RANKS, PER_HOST = 4096, 8


def host_of(rank: int) -> str:
    return f"n{rank // PER_HOST}"


def cluster(check: str, value, ranks: int = RANKS) -> list[Record]:
    """What each rank found, as a function of its number; None is nothing."""
    records = [Record(rank, host_of(rank), {check: value(rank)}) for rank in range(ranks)]
    return [Record(r.rank, r.host, {k: v for k, v in r.found.items() if v is not None}) for r in records]


def stamps(offsets: list[float], delay_s: float, dice: random.Random) -> list[list[tuple[float, float]]]:
    """What ranks whose clocks are ahead by so much write down of rounds that nobody leaves before all have entered."""
    now, found = [dice.random() * delay_s for _ in offsets], [[] for _ in offsets]
    for _ in range(clocks.ROUNDS):
        entered = [at + dice.random() * delay_s for at in now]
        now = [max(entered) + dice.random() * delay_s for _ in offsets]
        for rank, offset in enumerate(offsets):
            found[rank].append((entered[rank] + offset, now[rank] + offset))
    return found


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6), st.floats(1e-5, 30), st.integers())
def test_the_bounds_hold_the_true_difference_of_the_clocks_however_slow_the_network(offsets, delay_s, seed):
    found = stamps(offsets, delay_s, random.Random(seed))
    records = [Record(rank, f"n{rank}", {"clocks": found[rank]}) for rank in range(len(offsets))]
    for rank, (low, high) in enumerate(clocks.bounds(records).values()):
        assert low - 1e-6 <= offsets[rank] - offsets[0] <= high + 1e-6


def test_of_128_machines_the_one_whose_clock_is_wrong_is_named_with_the_difference():
    dice = random.Random(0)
    offset_of = [dice.gauss(0, 0.002) for _ in range(128)]
    offset_of[77] = -2.5
    found = stamps([offset_of[rank // PER_HOST] for rank in range(1024)], 0.001, dice)
    [finding] = clocks.judge(cluster("clocks", lambda rank: found[rank], 1024), LIMITS)
    assert finding.ranks == list(range(616, 624)) and not finding.slow
    assert "n77 (rank 616-623): its clock is 2.5" in finding.text and "behind the median's" in finding.text


def test_a_first_machine_with_a_wrong_clock_does_not_blame_all_others():
    found = stamps([9.0 if rank < PER_HOST else 0.0 for rank in range(64)], 0.001, random.Random(1))
    [finding] = clocks.judge(cluster("clocks", lambda rank: found[rank], 64), LIMITS)
    assert finding.ranks == list(range(PER_HOST)) and "9.0" in finding.text and "ahead of" in finding.text


def test_a_slow_network_accuses_no_clock():
    found = stamps([0.0] * 64, 20.0, random.Random(2))
    assert clocks.judge(cluster("clocks", lambda rank: found[rank], 64), LIMITS) == []


def test_the_machine_that_multiplies_slowly_is_named_with_its_rate_and_the_median():
    dice = random.Random(0)
    rates = [6e14 * dice.uniform(0.95, 1.05) for _ in range(RANKS)]
    rates[1234] = 2e14
    records = cluster("compute", lambda rank: {"flops": rates[rank], "wrong": 0})
    [finding] = compute.judge(records, LIMITS)
    assert finding.ranks == [1234] and finding.slow
    assert "n154 (rank 1234): multiplies matrices at 200,000 GFLOP/s, 33% of the median" in finding.text


def test_a_machine_that_computes_wrongly_is_never_borne():
    [finding] = compute.judge(cluster("compute", lambda rank: {"flops": 1.0, "wrong": 3 * (rank == 9)}, 16), LIMITS)
    assert finding.ranks == [9] and not finding.slow and "n1 (rank 9): computes wrongly: 3 rows" in finding.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_bit_in_a_product_shows(dtype):
    generator = torch.Generator().manual_seed(0)
    a_NN, b_NN = (compute._signs(256, generator).to(dtype) for _ in range(2))
    c_NN = a_NN @ b_NN
    assert compute.wrong_rows(a_NN, b_NN, c_NN) == 0
    c_NN.view(torch.int16)[17, 5] ^= 1 << 6
    assert compute.wrong_rows(a_NN, b_NN, c_NN) == 1


def test_products_are_exact_at_the_sizes_that_are_used():
    """bf16 holds whole numbers up to 256."""
    for size in {*compute.SIZES.values(), *compute.QUICK_SIZES.values()}:
        deviation = (size * compute.DENSITY**2) ** 0.5
        assert 7 * deviation < 256, "one in 10^12 elements, at most, is not exact"


def ring(ranks: int, rates) -> list[Record]:
    """One group of all ranks along dp_shard; the rate of a pair is that of its slower rank, or cable."""
    pairs: dict[int, dict[int, float]] = {rank: {} for rank in range(ranks)}
    for turn in links.phases(range(ranks)):
        for one, other in turn:
            pairs[one][other] = pairs[other][one] = rates(one, other)
    return cluster("links", lambda rank: {"dp_shard": {"collective": 1.0, "pairs": pairs[rank]}}, ranks)


def test_of_a_ring_only_the_rank_with_two_slow_links_is_named():
    dice = random.Random(0)
    records = ring(512, lambda one, other: dice.uniform(9, 10) if 100 not in (one, other) else 1.0)
    [finding] = links.judge(records, LIMITS)
    assert finding.ranks == [100] and finding.slow
    assert "n12 (rank 100): its links along parallel.dp_shard carry 1.00 GB/s, 10% of the median" in finding.text


def test_one_slow_cable_accuses_nobody_who_has_a_good_one():
    assert links.judge(ring(16, lambda one, other: 1.0 if {one, other} == {4, 5} else 10.0), LIMITS) == []


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8, 9])
def test_in_each_turn_a_rank_talks_to_one_neighbour_and_to_each_once(size):
    turns = links.phases(range(size))
    for turn in turns:
        ranks = [rank for pair in turn for rank in pair]
        assert len(ranks) == len(set(ranks))
    pairs = {frozenset(pair) for turn in turns for pair in turn}
    assert pairs == {frozenset((rank, (rank + 1) % size)) for rank in range(size)}
    assert len(pairs) == sum(map(len, turns))


def test_groups_are_the_mesh_s():
    layout = Layout(pp=2, dp_replicate=2, dp_shard=4, cp=2, tp=2, ep=4, zero=1)
    sizes = (2, 2, 4, 2, 2)
    ranks = torch.arange(layout.world_size).reshape(sizes)
    found = links.groups(layout)
    for place, axis in enumerate(("pp", "dp_replicate", "dp_shard", "cp", "tp")):
        assert sorted(found[axis]) == sorted(ranks.movedim(place, -1).reshape(-1, sizes[place]).tolist())
    experts = ranks.reshape(2, 2, 2, 4, 2)  # pp, ep_replicate, ep_shard, ep, tp
    assert sorted(found["ep"]) == sorted(experts.movedim(3, -1).reshape(-1, 4).tolist())
    assert links.groups(Layout()) == {}


def test_a_disk_without_room_for_what_will_be_kept_is_told_with_both_figures():
    [finding] = disk.judge([Record(0, "n0", {"disk": {"free": 5e9, "needed": 6e9, "mb_s": 100.0}})], LIMITS)
    assert "5,000 MB are free" in finding.text and "6,000 MB x 1 are needed" in finding.text and not finding.slow


@pytest.mark.parametrize(
    ("every", "step", "more"), [(0, 0, 1), (100, 0, 1), (30, 0, 4), (50, 0, 2), (30, 60, 2), (50, 100, 0), (3, 99, 1)]
)
def test_room_is_asked_for_no_more_checkpoints_than_are_to_come(every, step, more):
    assert disk.to_come(Training(steps=100, checkpoint_every=every), step) == more


def test_a_machine_that_writes_more_slowly_than_the_others_is_named():
    records = cluster("disk", lambda rank: {"mb_s": 10.0 if rank == 40 else 800.0} if rank % PER_HOST == 0 else None)
    [finding] = disk.judge(records, LIMITS)
    assert finding.ranks == [40] and "n5 (rank 40): writes 10.0 MB/s, the median 800.0" in finding.text


def test_a_machine_whose_ranks_together_need_more_memory_than_it_has_is_named():
    records = cluster("memory", lambda rank: {"host_needed": 4e9, "host_free": 30e9 if rank // 8 == 3 else 64e9}, 64)
    [finding] = memory.judge(records, LIMITS)
    assert finding.ranks == list(range(24, 32)) and "need 32.00 GB of memory, 0.95 x 30.00 GB are free" in finding.text


def test_a_gpu_that_something_else_has_filled_is_named():
    def found(rank: int) -> dict[str, float]:
        free = 3e9 if rank == 5 else 79e9
        return {"device_needed": 40e9, "device_free": free, "host_needed": 0.0, "host_free": 1e11}

    [finding] = memory.judge(cluster("memory", found, 16), LIMITS)
    assert finding.ranks == [5] and "n0 (rank 5): weights, gradients and moments need 40.00 GB of GPU" in finding.text


def test_a_problem_of_many_machines_is_told_once_with_all_of_them():
    records = cluster("paths", lambda rank: ["/data cannot be written to (Read-only file system)"] if rank == 8 else [])
    [finding] = paths.judge(records, LIMITS)
    assert finding.text == "n1 (rank 8-15): /data cannot be written to (Read-only file system)."
    problem = {"problems": ["no shards"], "fingerprints": {}}
    [finding] = inputs.judge(cluster("inputs", lambda rank: problem if rank % PER_HOST == 0 else None, 32), LIMITS)
    assert finding.text == "n0, n1, n2, n3 (rank 0, 8, 16, 24): no shards"


def test_a_machine_that_sees_another_corpus_is_named():
    def found(rank: int) -> dict | None:
        return {"problems": [], "fingerprints": {"data": "old" if rank == 16 else "new"}} if rank % 8 == 0 else None

    [finding] = inputs.judge(cluster("inputs", found, 64), LIMITS)
    assert finding.ranks == [16] and "n2 (rank 16): its data is old, that of the others new" in finding.text


def test_a_machine_that_reads_no_inputs_is_named_once():
    nothing, all_well = {"problems": ["no corpus"], "fingerprints": {}}, {"problems": [], "fingerprints": {"data": "a"}}
    [finding] = inputs.judge(cluster("inputs", lambda rank: nothing if rank == 16 else all_well, 64), LIMITS)
    assert finding.text == "n2 (rank 16): no corpus"


def test_what_is_slow_is_borne_and_told_unless_all_was_measured_at_length(capsys):
    slow, wrong = Finding("compute", [3], "n0 is slow", slow=True), Finding("clocks", [4], "n1 is ahead")
    LIMITS.insist([slow])
    assert capsys.readouterr().out == "slow: n0 is slow\n"
    with pytest.raises(PreflightError, match=r"(?s)not fit for this run:\n  clocks: n1 is ahead\nMend"):
        LIMITS.insist([slow, wrong])
    with pytest.raises(PreflightError, match=r"(?s)compute: n0 is slow\n  clocks: n1 is ahead"):
        Preflight(level="full").insist([slow, wrong])


def test_a_table_has_a_line_for_each_machine_and_marks_the_unfit():
    found = {
        "disk": {"mb_s": 800.0},
        "compute": {"flops": 6e14, "wrong": 0},
        "memory": {"host_needed": 1e9, "host_free": 4e9},
        "links": {"tp": {"collective": 3.0, "pairs": {1: 2.0}}},
    }
    shown = table([Record(rank, host_of(rank), found) for rank in range(16)], wrong=[9]).splitlines()
    assert len(shown) == 4 and shown[0].split()[:2] == ["machine", "ranks"]
    assert "not fit" not in shown[1] and shown[2].endswith("not fit") and "8-15" in shown[2]
    assert "600,000" in shown[3] and "2.00, 3.00" in shown[3]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"level": "some"}, "preflight.level"),
        ({"share": 0.0}, "preflight.share"),
        ({"memory": 1.5}, "preflight.memory"),
        ({"compute_s": 0.0}, "preflight.compute_s"),
        ({"disk_room": -1.0}, "preflight.disk_room"),
    ],
)
def test_limits_out_of_range_are_refused(values, key):
    assert [problem.key for problem in Preflight(**values).problems(None, 1)] == [key]
