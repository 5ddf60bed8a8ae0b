"""Blocked attention against PyTorch's own, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.models import blocked
from train.models.blocked import blocked_attention


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked, "QUERIES", 4)


def inputs(length: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [
        torch.randn(2, length, h, 6, generator=generator).to(dtype).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    ]


def mask(length: int, causal: bool) -> Tensor:
    documents_BL = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, -1, -1], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])[:, :length]
    same_BLL = documents_BL[:, :, None] == documents_BL[:, None]
    return same_BLL.tril() if causal else same_BLL


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 4, 11])
def test_values_and_gradients_are_those_of_sdpa(length, causal, masked, kv_heads):
    tensors = inputs(length, kv_heads=kv_heads)
    mask_BLL = mask(length, causal) if masked else None
    ours = blocked_attention(*tensors, mask_BLL, causal)
    theirs = F.scaled_dot_product_attention(
        *tensors,
        attn_mask=None if mask_BLL is None else mask_BLL[:, None],
        is_causal=causal and not masked,
        enable_gqa=True,
    )
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [True, False])
def test_queries_may_be_some_of_the_tokens(causal):
    index_L = torch.tensor([1, 2, 3, 9, 10, 0])
    q_BHLD, k_BKSD, v_BKSD = inputs(11)
    mask_BLS, some_BHLD = mask(11, causal)[:, index_L], q_BHLD.detach()[:, :, index_L].requires_grad_()
    ours = blocked_attention(some_BHLD, k_BKSD, v_BKSD, mask_BLS, causal)
    theirs = F.scaled_dot_product_attention(some_BHLD, k_BKSD, v_BKSD, attn_mask=mask_BLS[:, None], enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    grad, tensors = torch.randn_like(ours), (some_BHLD, k_BKSD, v_BKSD)
    for a, b in zip(torch.autograd.grad(ours, tensors, grad), torch.autograd.grad(theirs, tensors, grad), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("batch", [1, 2])  # of one sequence, reshaping copies nothing and strides stay
def test_it_is_a_well_behaved_operator(batch):
    tensors = [t.detach()[:batch].requires_grad_() for t in inputs(11)]
    torch.library.opcheck(blocked_attention, (*tensors, mask(11, True)[:batch], True))
    strides = [g.stride() for g in blocked._backward(tensors[0], *tensors, None, True)]
    assert strides == [torch.empty(t.shape).stride() for t in tensors]


def test_bf16_is_no_farther_from_fp32_than_sdpa_is():
    exact = inputs(11, dtype=torch.float32)
    rounded = [t.detach().bfloat16().requires_grad_() for t in exact]
    reference = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    ours = blocked_attention(*rounded, None, True)
    theirs = F.scaled_dot_product_attention(*rounded, is_causal=True, enable_gqa=True)
    assert (ours.float() - reference).norm() < 1.5 * (theirs.float() - reference).norm()
