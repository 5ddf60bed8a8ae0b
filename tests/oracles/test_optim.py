"""Optimizers, schedules and the engine's step against PyTorch's and transformers' own."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from parallel import distributed
from parallel.layout import Layout
from tools.parity import ADAMW, MODEL, VOCABULARY, Training, batch_of, build, shares, train
from train.models.transformer import initialise
from train.optim.adam8bit import Adam8bit
from train.optim.muon import Muon
from train.optim.schedules import Constant, Cosine, Linear, Schedule


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_is_torchs_muon(scale: str, shape: tuple[int, int]) -> None:
    ours, theirs = (nn.Linear(shape[1], shape[0], bias=False) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    model = nn.Module()
    model.blocks = nn.ModuleList([ours])
    mine = Muon(lr=0.02, scale=scale, precision="bf16").build(model)
    reference = torch.optim.Muon(theirs.parameters(), lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn=scale)
    for _ in range(5):
        ours.weight.grad = torch.randn(shape)
        theirs.weight.grad = ours.weight.grad.clone()
        mine.step()
        reference.step()
    # In bf16 the order of two scalar multiplications shows: 2 units in the last of 8 bits of the last updates.
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0.02 * 0.02)


def test_adam8bit_is_torchaos() -> None:
    """Where the largest of each block is positive: torchao's scales have no sign."""
    adam = pytest.importorskip("torchao.optim.adam")
    quantised = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit
    ours = nn.Linear(64, 64, bias=False)
    weight = ours.weight.detach().clone()
    options = Adam8bit(lr=0.01)
    mine = options.build(ours)
    means, squares = quantised.zeros(weight.shape, signed=True), quantised.zeros(weight.shape, signed=False)
    for step in range(5):
        ours.weight.grad = torch.rand(weight.shape) - 0.1
        betas, gradient, count = (options.beta1, options.beta2), ours.weight.grad.clone(), torch.tensor(step + 1.0)
        mine.step()
        adam.single_param_adam(
            *(weight, gradient, count, means, squares, None, torch.tensor(options.lr), *betas),
            *(options.weight_decay, options.eps, True, False),
        )
    state = mine.state[ours.weight]
    assert torch.equal(state["exp_avg"], means.codes.flatten())
    assert torch.equal(state["exp_avg_sq"], squares.codes.flatten())
    torch.testing.assert_close(ours.weight, weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ours", "name"),
    [
        (Constant(warmup=3), "get_constant_schedule_with_warmup"),
        (Linear(warmup=3), "get_linear_schedule_with_warmup"),
        (Cosine(warmup=3, floor=0.0), "get_cosine_schedule_with_warmup"),
    ],
)
def test_after_the_warm_up_schedules_are_those_of_transformers(ours: Schedule, name: str) -> None:
    import transformers.optimization

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    total = {} if isinstance(ours, Constant) else {"num_training_steps": 20}
    theirs = getattr(transformers.optimization, name)(optimizer, num_warmup_steps=3, **total)
    for step in range(20):
        if step >= 3:
            assert ours.factor(step, 20) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_a_step_is_what_plain_pytorch_does_with_the_mean_over_all_tokens() -> None:
    training = Training(model=replace(MODEL, layers=2), optim=replace(ADAMW, weight_decay=0.1), clip=0.5)
    model = training.model.build(VOCABULARY)
    initialise(model, 0)
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=ADAMW.lr,
        betas=(ADAMW.beta1, ADAMW.beta2),
        eps=ADAMW.eps,
    )
    losses, norms = [], []
    for step in range(4):
        batch = batch_of(step)
        logits_BLV = model(batch.tokens_BL, batch.positions_BL, batch.documents_BL)
        loss = F.cross_entropy(logits_BLV.flatten(0, 1), batch.labels_BL.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), training.clip).item())
        optimizer.step()
        losses.append(loss.item())

    layout = Layout(micro_batches=4)
    world = distributed.start()
    engine = build(layout, training, world)
    assert len(shares(batch_of(0), 0, 1, 4)) == 4
    found = train(engine, layout, training, range(4))
    distributed.stop()
    assert found.losses == pytest.approx(losses, abs=5e-6)
    assert found.grad_norms == pytest.approx(norms, rel=1e-5)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(found.weights[name], weight.detach(), rtol=1e-5, atol=2e-6)
