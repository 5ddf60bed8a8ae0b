"""Log-probabilities fused with the head."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from parallel import distributed
from tests.ranks import run_ranks
from train.models import logprobs as module
from train.models.logprobs import VocabularyShard, logprobs


def problem(rows: int = 37, width: int = 16, vocabulary: int = 53, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden_BLN = torch.randn(1, rows, width, generator=generator).to(dtype).requires_grad_()
    head_VN = torch.randn(vocabulary, width, generator=generator).to(dtype).requires_grad_()
    labels_BL = torch.randint(0, vocabulary, (1, rows), generator=generator)
    return hidden_BLN, head_VN, labels_BL


def reference(hidden_BLN: Tensor, head_VN: Tensor, labels_BL: Tensor) -> Tensor:
    logprobs_BLV = (hidden_BLN @ head_VN.T).log_softmax(-1)
    return logprobs_BLV.gather(-1, labels_BL.clamp(min=0)[..., None])[..., 0].masked_fill(labels_BL == -100, 0)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(module, "_chunks", lambda rows, *_: (slice(s, min(s + 5, rows)) for s in range(0, rows, 5)))


@pytest.mark.parametrize("masked", ["none", "some", "all"])
@pytest.mark.parametrize("selects", [True, False])
def test_values_and_gradients_are_those_of_log_softmax(small_chunks, monkeypatch, masked, selects):
    monkeypatch.setattr(module, "_host_may_look", lambda _: selects)
    hidden_BLN, head_VN, labels_BL = problem()
    if masked != "none":
        labels_BL[:, 3 if masked == "some" else 0 :: 2 if masked == "some" else 1] = -100
    weight_BL = torch.randn(labels_BL.shape, generator=torch.Generator().manual_seed(1))
    ours_BL, theirs_BL = (f(hidden_BLN, head_VN, labels_BL) for f in (logprobs, reference))
    torch.testing.assert_close(ours_BL, theirs_BL, rtol=0, atol=1e-5)
    ours, theirs = (torch.autograd.grad((v * weight_BL).sum(), (hidden_BLN, head_VN)) for v in (ours_BL, theirs_BL))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_gradient_passes_gradcheck(small_chunks):
    hidden_BLN, head_VN, labels_BL = problem(7, 4, 9, torch.float64)
    labels_BL[0, 2] = -100
    torch.autograd.gradcheck(lambda h, w: logprobs(h, w, labels_BL), (hidden_BLN, head_VN))


@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_bf16_is_as_near_to_fp32_as_rounding_allows(small_chunks, monkeypatch, kept_bytes):
    monkeypatch.setattr(module, "KEPT_BYTES", kept_bytes)
    hidden_BLN, head_VN, labels_BL = problem(dtype=torch.bfloat16)
    labels_BL[0, :5] = -100
    exact = [t.detach().float().requires_grad_() for t in (hidden_BLN, head_VN)]
    ours_BL, theirs_BL = logprobs(hidden_BLN, head_VN, labels_BL), reference(*exact, labels_BL)
    assert ours_BL.dtype == torch.float32
    torch.testing.assert_close(ours_BL, theirs_BL, rtol=0.01, atol=0.05)  # the logits themselves are rounded
    ours = torch.autograd.grad(ours_BL.sum(), (hidden_BLN, head_VN))
    theirs = torch.autograd.grad(theirs_BL.sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b).norm() / b.norm() < 0.01


def test_a_label_of_vanishing_probability_has_a_finite_log():
    hidden_BLN = torch.tensor([[[1.0]]])
    head_VN = torch.tensor([[500.0], [-500.0], [500.0]])
    found = logprobs(hidden_BLN, head_VN, torch.tensor([[1]]))
    assert found.item() == pytest.approx(-1000 - torch.tensor(2.0).log().item())


class Largest(TorchDispatchMode):
    """The most elements of any fp32 tensor, and the rows of every product with the head."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.elements, self.rows = vocabulary, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.elements = max(self.elements, result.numel())
        if function == torch.ops.aten.mm.default and result.shape[-1] == self.vocabulary:
            self.rows.append(result.shape[0])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_wide_fp32_tensor_exists(small_chunks, dtype):
    hidden_BLN, head_VN, labels_BL = problem(rows=400, dtype=dtype)
    with Largest(53) as seen:
        logprobs(hidden_BLN, head_VN, labels_BL).sum().backward()
    assert seen.elements <= max(400 * 16, 53 * 16)  # that of the hidden states; B x L x V has 21,200


@pytest.mark.parametrize("labelled", [130, 200])
def test_rows_without_a_label_are_not_computed_but_to_round_up(labelled):
    """Different numbers of labels meet the same kernels."""
    hidden_BLN, head_VN, labels_BL = problem(rows=1000, dtype=torch.bfloat16)
    labels_BL[:, labelled:] = -100
    with Largest(53) as seen:
        logprobs(hidden_BLN, head_VN, labels_BL).sum().backward()
    assert seen.rows == [256]


def test_nothing_is_kept_without_gradients():
    hidden_BLN, head_VN, labels_BL = problem(dtype=torch.bfloat16)
    with torch.no_grad():
        assert not logprobs(hidden_BLN, head_VN, labels_BL).requires_grad
    assert logprobs(hidden_BLN, head_VN, labels_BL).grad_fn is not None


BOUNDS = {2: [(0, 49), (49, 97)], 3: [(0, 0), (0, 90), (90, 97)]}
"""Which of 97 rows each rank has; one has none."""
SCALE = 6.0
"""Of the head: some labels become all but certain, some all but impossible."""


def sharded_problem(dtype: torch.dtype):
    hidden_BLN, head_VN, labels_BL = problem(rows=300, vocabulary=97, dtype=dtype)
    with torch.no_grad():
        head_VN *= SCALE
        sure_BL = (hidden_BLN @ head_VN.T).argmax(-1)
    labels_BL[:, ::3] = sure_BL[:, ::3]
    labels_BL[:, 5::7] = -100
    return hidden_BLN, head_VN, labels_BL, torch.randn(labels_BL.shape, generator=torch.Generator().manual_seed(1))


class Exchanged(TorchDispatchMode):
    """The elements that each collective sends."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.elements.append(args[1].numel())
        return function(*args, **(kwargs or {}))


def of_a_shard(dtype: torch.dtype, kept_bytes: int, selects: bool, breaks: str | None = None) -> tuple:
    """values, this rank's part of the hidden states' gradient, its rows' gradient, elements of each collective."""
    world = distributed.start()
    module._chunks = lambda rows, vocabulary, _: (
        slice(s, min(s + 64, rows)) for s in range(0, rows if vocabulary else 0, 64)
    )
    module.KEPT_BYTES = kept_bytes
    module._host_may_look = lambda _: selects
    if breaks is not None:
        setattr(module, breaks, {"_rescale": lambda *_: None, "_over_ranks": lambda a, b, _: (a, b)}[breaks])
    hidden_BLN, head_VN, labels_BL, weight_BL = sharded_problem(dtype)
    first, end = BOUNDS[world.size][world.rank]
    rows_VN = head_VN.detach()[first:end].requires_grad_()
    with Exchanged() as exchanged:
        found_BL = logprobs(hidden_BLN, rows_VN, labels_BL, VocabularyShard(first, dist.group.WORLD))
        grads = torch.autograd.grad((found_BL * weight_BL).sum(), (hidden_BLN, rows_VN))
    return found_BL.detach(), *grads, exchanged.elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ranks", "kept_bytes", "selects"), [(2, 2**30, True), (3, 2**30, False), (3, 0, True)])
def test_a_head_whose_rows_are_shared_answers_as_the_whole(ranks, kept_bytes, selects, dtype):
    hidden_BLN, head_VN, labels_BL, weight_BL = sharded_problem(dtype)
    whole_BL = logprobs(hidden_BLN, head_VN, labels_BL)
    expected = torch.autograd.grad((whole_BL * weight_BL).sum(), (hidden_BLN, head_VN))
    values, hidden, head, exchanged = zip(*run_ranks(ranks, of_a_shard, dtype, kept_bytes, selects), strict=True)
    for found_BL in values:
        assert torch.equal(found_BL, values[0])
        torch.testing.assert_close(found_BL, whole_BL, rtol=0, atol=1e-4)  # of logits up to a hundred
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for found, grad in ((sum(h.float() for h in hidden), expected[0]), (torch.cat(head), expected[1])):
        assert (found - grad.float()).norm() / grad.float().norm() < tolerance
    # Two numbers per row that is computed, whatever the vocabulary, and nothing in the backward pass.
    assert exchanged == ([2 * 300],) * ranks


@pytest.mark.parametrize("breaks", ["_rescale", "_over_ranks"])
def test_a_break_between_the_shares_is_seen(breaks):
    hidden_BLN, head_VN, labels_BL, weight_BL = sharded_problem(torch.float32)
    whole_BL = logprobs(hidden_BLN, head_VN, labels_BL)
    [expected_BLN] = torch.autograd.grad((whole_BL * weight_BL).sum(), hidden_BLN)
    ranks = run_ranks(2, of_a_shard, torch.float32, 0, True, breaks)
    found_BLN = sum(rank[1] for rank in ranks)
    assert (found_BLN - expected_BLN).norm() / expected_BLN.norm() > 0.01


def test_a_label_outside_the_whole_vocabulary_is_not_answered():
    hidden_BLN, head_VN, labels_BL = problem()
    labels_BL[0, 0] = 53
    with pytest.raises((RuntimeError, IndexError)):
        logprobs(hidden_BLN, head_VN, labels_BL)
