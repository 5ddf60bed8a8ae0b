"""One process in 16 bits: copies compute, fp32 parameters learn."""

import torch
from torch import Tensor, nn

from parallel.whole import Whole


class Tied(nn.Module):
    """A head that is the embedding, and a weight that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.fixed = nn.Linear(4, 4, bias=False).requires_grad_(False)

    def forward(self, tokens_L: Tensor) -> Tensor:
        return self.head(self.fixed(self.embedding(tokens_L))).float().sum()


def test_the_model_computes_on_copies_and_shared_parameters_have_one() -> None:
    model = Tied()
    placed = Whole(model, torch.bfloat16)
    assert list(placed.parameters) == ["embedding.weight", "fixed.weight"]
    assert {p.dtype for p in placed.parameters.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.head.weight is model.embedding.weight


def test_gradients_of_micro_batches_add_up_in_fp32() -> None:
    placed = Whole(Tied(), torch.bfloat16)
    weight = placed.parameters["embedding.weight"]

    def gradient_of(*tokens: int) -> Tensor:
        weight.grad = None
        for token in tokens:
            placed.model(torch.tensor([token] * 7)).backward()
        assert weight.grad is not None
        assert weight.grad.dtype == torch.float32
        return weight.grad

    parts = [gradient_of(token) for token in range(3)]
    assert torch.equal(gradient_of(0, 1, 2), parts[0] + parts[1] + parts[2])
    assert placed.parameters["fixed.weight"].grad is None
    assert all(copy.grad is None for copy in placed.model.parameters())


def test_copies_follow_when_parameters_change() -> None:
    placed = Whole(Tied(), torch.bfloat16)
    for parameter in placed.parameters.values():
        parameter.data.fill_(1.5)
    placed.changed()
    assert all((copy == 1.5).all() for copy in placed.model.parameters())


def test_fp32_computes_on_the_parameters_themselves() -> None:
    model = Tied()
    before = list(model.parameters())
    placed = Whole(model, torch.float32)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    placed.changed()
    assert placed.copies == {}
