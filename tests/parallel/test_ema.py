"""The average of the weights is the one of its formula."""

import pytest
import torch

from parallel.ema import Average

TAKEN, SKIPPED = torch.tensor(0.0), torch.tensor(1.0)


def history(debias: bool, skipped: tuple[int, ...] = ()) -> tuple[Average, list[torch.Tensor]]:
    weight = torch.zeros(3)
    average = Average({"w": weight}, decay=0.9, debias=debias)
    seen = []
    for step in range(5):
        weight.copy_(torch.arange(3.0) + step**2)
        average.update(SKIPPED if step in skipped else TAKEN)
        if step not in skipped:
            seen.append(weight.clone())
    return average, seen


def test_a_debiased_average_is_the_weighted_mean_of_the_weights_seen() -> None:
    average, seen = history(debias=True)
    shares = [0.9 ** (len(seen) - 1 - i) for i in range(len(seen))]
    expected = sum(s * w for s, w in zip(shares, seen, strict=True)) / sum(shares)
    torch.testing.assert_close(average.tensors["w"], expected)


def test_an_average_without_debiasing_starts_at_the_initial_weights() -> None:
    average, seen = history(debias=False)
    expected = torch.zeros(3)
    for weight in seen:
        expected = 0.9 * expected + 0.1 * weight
    torch.testing.assert_close(average.tensors["w"], expected)


@pytest.mark.parametrize("debias", [True, False])
def test_a_skipped_step_does_not_count(debias: bool) -> None:
    some, _ = history(debias, skipped=(2, 3))
    assert some.updates.item() == 3
    weight = torch.zeros(3)
    fewer = Average({"w": weight}, decay=0.9, debias=debias)
    for step in (0, 1, 4):
        weight.copy_(torch.arange(3.0) + step**2)
        fewer.update(TAKEN)
    assert torch.equal(some.tensors["w"], fewer.tensors["w"])


def test_swapping_twice_changes_nothing() -> None:
    average, _ = history(debias=True)
    weight, mean = average.parameters["w"].clone(), average.tensors["w"].clone()
    average.swap()
    assert torch.equal(average.parameters["w"], mean)
    assert torch.equal(average.tensors["w"], weight)
    average.swap()
    assert torch.equal(average.parameters["w"], weight)
    assert torch.equal(average.tensors["w"], mean)
