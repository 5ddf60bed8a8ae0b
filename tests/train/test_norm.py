"""RMSNorm in 16 bits on a CPU."""

import torch
import torch.nn.functional as F

from train.models.norm import RMSNorm, _NarrowRMSNorm


def test_the_narrow_gradient_passes_gradcheck():
    x_BLN = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight_N = torch.linspace(0.5, 2, 8, dtype=torch.float64).requires_grad_()
    torch.autograd.gradcheck(lambda x, w: _NarrowRMSNorm.apply(x, w, 1e-5), (x_BLN, weight_N))


def test_bf16_is_as_near_to_fp32_as_torch_is():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(4, 64, 256, generator=generator).requires_grad_()
    grad = torch.randn(4, 64, 256, generator=generator)
    norm = RMSNorm(256, 1e-5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2, generator=generator)
    expected = [norm(exact), *torch.autograd.grad(norm(exact), (exact, norm.weight), grad)]
    norm.bfloat16()
    x_BLN = exact.detach().bfloat16().requires_grad_()
    outputs = (norm(x_BLN), F.rms_norm(x_BLN, (256,), norm.weight, 1e-5))
    ours, theirs = ([o, *torch.autograd.grad(o, (x_BLN, norm.weight), grad.bfloat16())] for o in outputs)
    for a, b, e in zip(ours, theirs, expected, strict=True):
        assert (a.float() - e).norm() < 1.5 * (b.float() - e).norm()
