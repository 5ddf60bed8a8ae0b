"""What a step sends and holds is what the ZeRO paper says (Rajbhandari et al. 2019, arXiv:1910.02054)."""

import math

import pytest

from parallel.layout import Layout
from tools.benches.communication import Communication, Measured
from tools.parity.layouts import parse
from tools.traffic import axis_of

SMALL = Communication(layers=3, hidden=64, vocabulary=512, sequence_length=32)
PARAMETERS = SMALL.model(0).parameter_count(SMALL.vocabulary)
ROOT = (SMALL.vocabulary + 1) * SMALL.hidden
"""Parameters of the unit that the backward pass begins with, which is not gathered twice: embedding and last norm."""
FIGURES = 100
"""More bytes than the all-reduce of a step's figures sends."""


@pytest.fixture(scope="module")
def stages() -> list[Measured]:
    """Rank 0 of two, at each stage, with one micro-batch."""
    return [SMALL.measure(Layout(dp_shard=2, zero=zero))[0] for zero in range(4)]


def sent(measured: Measured) -> int:
    return sum(measured.sent.values())


def test_stages_1_and_2_send_what_plain_data_parallelism_sends(stages: list[Measured]) -> None:
    expected = 2 * PARAMETERS * 4 * (2 - 1) / 2
    for stage in stages[:3]:
        assert sent(stage) == pytest.approx(expected, abs=FIGURES)


def test_stage_3_sends_half_as_much_again(stages: list[Measured]) -> None:
    assert sent(stages[3]) / sent(stages[0]) == pytest.approx((3 - ROOT / PARAMETERS) / 2, rel=1e-3)


def test_each_stage_shares_one_more_kind_of_state() -> None:
    held = [SMALL.measure(Layout(dp_shard=2, zero=zero, micro_batches=2))[0].held for zero in range(4)]
    whole = PARAMETERS * 4
    counters = 200  # fp32 step counts among the moments
    assert [h.parameters for h in held] == [whole, whole // 2, whole // 2, whole // 2]
    assert [h.moments for h in held] == [pytest.approx(2 * whole / n, abs=counters) for n in (1, 2, 2, 2)]
    assert [h.gradients for h in held] == [whole, whole, whole // 2, whole // 2]
    assert held[1].gathered == held[2].gathered == whole
    assert held[3].gathered == ROOT * 4


def test_tensor_parallel_ranks_exchange_the_stream_four_times_a_layer_each_way() -> None:
    [rank, _] = SMALL.measure(parse("tp2"))
    stream = SMALL.sequences * SMALL.sequence_length * SMALL.hidden * 4
    passes = 4 * SMALL.layers + 2  # and the embedding and the head
    assert rank.sent["tp", "reduce-scatter"] == passes * stream // 2
    assert rank.sent["tp", "all-gather"] == pytest.approx(passes * stream / 2, rel=0.05)  # and the log-probabilities


def test_a_pipeline_sends_hidden_states_and_their_gradients() -> None:
    first, last = SMALL.measure(parse("pp2.mb4"))
    stream = SMALL.sequences * SMALL.sequence_length * SMALL.hidden * 4
    tied = SMALL.vocabulary * SMALL.hidden * 4
    assert first.sent["pp", "send"] == last.sent["pp", "send"] == stream + tied


@pytest.mark.parametrize(
    ("ranks", "axis"),
    [([0, 1], "tp"), ([0, 2], "dp_shard"), ([0, 4], "pp"), ([0, 2, 4, 6], "pp+dp_shard"), ([1, 3], "dp_shard")],
)
def test_a_group_is_named_by_the_axes_along_which_its_ranks_differ(ranks: list[int], axis: str) -> None:
    layout = Layout(pp=2, dp_shard=2, tp=2)
    assert layout.world_size == math.prod([2, 2, 2])
    assert axis_of(ranks, layout) == axis
