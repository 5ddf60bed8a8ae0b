"""Mixture of experts in place of a block's feed-forward (Shazeer et al. 2017, arXiv:1701.06538): a router sends each
token to a few of many feed-forwards, whose results are added up with its weights.

No token is ever dropped: rows are sorted by expert and multiplied group by group (Gale et al. 2022, arXiv:2211.15841).

The router learns to spread its tokens by losses that are *attached*: handed to the backward pass as if they had been
added to the objective's sum. The balance loss (Fedus et al. 2021, arXiv:2101.03961, eq. 4) is taken per sequence, so
that it is the same however sequences are dealt out to micro-batches and ranks. Or experts are balanced without a loss,
by a bias on their selection (Wang et al. 2024, arXiv:2408.15664), which the counts of each whole step move.

Shape suffixes: B sequences, L tokens of each, T tokens of all, N model width, F width of an expert, E experts,
K experts of a token, R rows sent to experts (R = T K), I and O features before and after a product.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import Problem
from parallel.linear import here
from parallel.recompute import recomputing
from train.models.feed_forward import FeedForward

if TYPE_CHECKING:
    from train.models.transformer import Context

SCORINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits_BLE: logits_BLE.softmax(-1),
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True)
class MoE:
    """Experts in place of feed-forwards. The last three fields concern training only.

    Args:
        experts: routed experts of a layer; 0 is a dense model.
        active: experts that each token is sent to; in 1..experts.
        intermediate: width of each expert's feed-forward, in features.
        shared: width of a feed-forward that every token passes besides, in features; 0 has none.
        shared_gate: its result is scaled by a sigmoid of a projection of the token (Qwen2-MoE).
        scoring: from router logits to scores: "softmax" over the experts, or "sigmoid" of each.
        normalise: a token's weights are divided by their sum.
        scale: factor on the weights.
        first: layers before this one keep the dense feed-forward.
        every: of the others, each so-many-th has experts: those whose number, from 1, it divides.
        selection_bias: experts are selected by score plus a bias that no gradient reaches; weights are the scores'.
        bias_rate: how far each bias moves per step towards an even load, in units of the score.
        balance_loss: weight of the balance loss of each layer, in nats per unit; 1 unit is an even load. 0 adds none.
        z_loss: weight of the mean squared log-sum-exp of the router logits (Zoph et al. 2022, arXiv:2202.08906, eq. 5).
    """

    experts: int = 0
    active: int = 2
    intermediate: int = 128
    shared: int = 0
    shared_gate: bool = False
    scoring: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    first: int = 0
    every: int = 1
    selection_bias: bool = False
    bias_rate: float = 1e-3
    balance_loss: float = 0.01
    z_loss: float = 0.001

    def problems(self, layers: int) -> list[Problem]:
        """Everything that keeps these experts from being built in a model with so many layers."""
        if self.experts == 0:
            return []
        found = []
        if self.experts < 0:
            found.append(Problem("model.moe.experts", self.experts, "must be at least 1, or 0 for a dense model"))
        elif not 1 <= self.active <= self.experts:
            found.append(Problem("model.moe.active", self.active, f"in 1..{self.experts}, the number of experts"))
        for name in ("intermediate", "every"):
            if getattr(self, name) < 1:
                found.append(Problem(f"model.moe.{name}", getattr(self, name), "must be at least 1"))
        for name in ("shared", "bias_rate", "balance_loss", "z_loss"):
            if getattr(self, name) < 0:
                found.append(Problem(f"model.moe.{name}", getattr(self, name), "must be at least 0"))
        if self.shared_gate and not self.shared:
            found.append(Problem("model.moe.shared_gate", True, "needs a shared expert: set model.moe.shared"))
        if self.scoring not in SCORINGS:
            found.append(Problem("model.moe.scoring", self.scoring, f"one of {', '.join(SCORINGS)}"))
        if self.scale <= 0:
            found.append(Problem("model.moe.scale", self.scale, "must be above 0; 1 is usual"))
        if not 0 <= self.first < layers:
            found.append(Problem("model.moe.first", self.first, f"in 0..{layers - 1}: some layer must have experts"))
        elif self.every >= 1 and not any(self.sparse(layer) for layer in range(layers)):
            found.append(Problem("model.moe.every", self.every, f"leaves none of {layers} layers with experts"))
        return found

    def trained_as(self, other: "MoE") -> "MoE":
        """These experts, balanced as others are."""
        return replace(self, bias_rate=other.bias_rate, balance_loss=other.balance_loss, z_loss=other.z_loss)

    def sparse(self, layer: int) -> bool:
        """Whether a layer, numbered from 0, has experts."""
        return self.experts > 0 and layer >= self.first and (layer + 1) % self.every == 0

    def active_weights(self, hidden: int) -> int:
        """Weights of matrix products that one token meets in one layer, router included."""
        width = self.active * self.intermediate + self.shared
        return 3 * hidden * width + hidden * (self.experts + self.shared_gate)


class MixtureOfExperts(nn.Module):
    """The `mlp` of a block with experts.

    Args:
        config: of the experts.
        hidden: width of the residual stream, in features.
    """

    def __init__(self, config: MoE, hidden: int):
        super().__init__()
        self.gate = Router(config, hidden)
        self.experts = Experts(config.experts, hidden, config.intermediate)
        self.shared_expert = FeedForward(hidden, config.shared) if config.shared else None
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False) if config.shared_gate else None

    def forward(self, x_BLN: Tensor, context: "Context") -> Tensor:
        """Every token through its experts."""
        weights_BLK, chosen_BLK = self.gate(x_BLN, context.token_weights_BL)
        tokens, active = x_BLN.shape[0] * x_BLN.shape[1], chosen_BLK.shape[-1]
        expert_R, order_R = chosen_BLK.flatten().sort(stable=True)
        experts_E = torch.arange(self.gate.experts, device=x_BLN.device)
        ends_E = torch.searchsorted(expert_R, experts_E, right=True)
        rows_RN = x_BLN.flatten(0, 1).index_select(0, order_R // active)
        rows_RN = self.experts(rows_RN, ends_E.diff(prepend=ends_E.new_zeros(1)))
        rows_TKN = rows_RN.index_select(0, order_R.argsort()).view(tokens, active, -1)
        weights_TK = weights_BLK.flatten(0, 1).to(rows_TKN.dtype)
        out_BLN = (rows_TKN * weights_TK[..., None]).sum(1).view_as(x_BLN)
        if self.shared_expert is None:
            return out_BLN
        shared_BLN = self.shared_expert(x_BLN, context)
        if self.shared_expert_gate is not None:
            shared_BLN = shared_BLN * self.shared_expert_gate(x_BLN).sigmoid()
        return out_BLN + shared_BLN


class Router(nn.Module):
    """Which experts a token is sent to, with which weights; computed in fp32.

    Attributes:
        over_sequence: adds counts_BE to those of the processes that hold the rest of these sequences; here nobody does.
        share: part of the attached losses that this process attaches: 1 over the number of those that do alike.
    """

    e_score_correction_bias: Tensor | None
    seen: Tensor

    def __init__(self, config: MoE, hidden: int):
        super().__init__()
        self.config = config
        self.experts = config.experts
        self.weight = nn.Parameter(torch.empty(config.experts, hidden))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.experts) if config.selection_bias else None)
        self.register_buffer("seen", torch.zeros(config.experts + 3, dtype=torch.float64), persistent=False)
        self.over_sequence: Callable[[Tensor], Tensor] = lambda counts_BE: counts_BE
        self.share = 1.0

    def forward(self, x_BLN: Tensor, token_weights_BL: Tensor | None) -> tuple[Tensor, Tensor]:
        """(weights_BLK, chosen_BLK): the experts of each token, and the factors on their results, fp32.

        Args:
            x_BLN: the tokens.
            token_weights_BL: weight of each token in the attached losses, 0 for padding; None attaches and counts
                nothing.
        """
        logits_BLE = F.linear(x_BLN.float(), self.weight.float())
        scores_BLE = SCORINGS[self.config.scoring](logits_BLE)
        bias_E = self.e_score_correction_bias
        ranks_BLE = scores_BLE.detach() if bias_E is None else scores_BLE.detach() + bias_E
        chosen_BLK = ranks_BLE.topk(self.config.active, dim=-1).indices
        weights_BLK = scores_BLE.gather(-1, chosen_BLK)
        if self.config.normalise:
            weights_BLK = weights_BLK / weights_BLK.sum(-1, keepdim=True)
        weights_BLK = weights_BLK * self.config.scale
        if self.training and token_weights_BL is not None:
            weights_BLK = attached(weights_BLK, self._losses(logits_BLE, scores_BLE, chosen_BLK, token_weights_BL))
        return weights_BLK, chosen_BLK

    def _losses(self, logits_BLE: Tensor, scores_BLE: Tensor, chosen_BLK: Tensor, token_weights_BL: Tensor) -> Tensor:
        """The sum over the tokens of both losses, each with its weight; counts what is seen."""
        counted_BLK = (token_weights_BL > 0).to(scores_BLE.dtype)[..., None].expand_as(chosen_BLK)
        here_BE = torch.zeros_like(scores_BLE[:, 0]).scatter_add_(1, chosen_BLK.flatten(1), counted_BLK.flatten(1))
        counts_BE = self.over_sequence(here_BE)
        frequency_BE = self.experts * counts_BE / counts_BE.sum(-1, keepdim=True).clamp(min=1)
        probability_BLE = scores_BLE / scores_BLE.sum(-1, keepdim=True)
        balance = (frequency_BE[:, None] * probability_BLE).sum(-1).mul(token_weights_BL).sum()
        squares = logits_BLE.logsumexp(-1).square().mul(token_weights_BL).sum()
        sums = torch.stack([balance.detach(), squares.detach(), token_weights_BL.sum()])
        if not recomputing():
            self.seen += torch.cat([here_BE.sum(0), sums])
        return self.share * (self.config.balance_loss * balance + self.config.z_loss * squares)

    def statistics(self) -> Tensor:
        """Tokens per expert, and the sums of balance loss, squared log-sum-exp and weights, since the last call."""
        seen = self.seen.clone()
        self.seen.zero_()
        return seen

    @torch.no_grad()
    def settle(self, totals: Tensor, taken: Tensor) -> dict[str, Tensor]:
        """Move the biases, and say how even the load was.

        Args:
            totals: `statistics` of all processes of a step, added up.
            taken: 1, or 0 where the step was skipped.

        Returns:
            the largest and smallest load in units of the mean one, the standard deviation likewise, the balance loss
            (1 is even) and the mean squared log-sum-exp.
        """
        counts_E, (balance, squares, weight) = totals[:-3], totals[-3:]
        load_E = counts_E / counts_E.mean().clamp(min=1)
        if self.e_score_correction_bias is not None:
            self.e_score_correction_bias += taken * self.config.bias_rate * (1 - load_E).sign()
        return {
            "expert_load_max": load_E.max(),
            "expert_load_min": load_E.min(),
            "expert_load_cv": load_E.std(correction=0),
            "balance_loss": balance / weight,
            "router_z": squares / weight,
        }


class Experts(nn.Module):
    """The feed-forwards of a layer's experts, stacked.

    Args:
        experts: how many.
        hidden: width of the residual stream, in features.
        intermediate: width of each.
    """

    def __init__(self, experts: int, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, intermediate, hidden))
        self.up_proj = nn.Parameter(torch.empty(experts, intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))

    def forward(self, rows_RN: Tensor, counts_E: Tensor) -> Tensor:
        """Each row through its expert.

        Args:
            rows_RN: sorted by expert.
            counts_E: rows of each expert, int64.
        """
        gated_RF = F.silu(grouped_product(rows_RN, here(self.gate_proj), counts_E))
        up_RF = grouped_product(rows_RN, here(self.up_proj), counts_E)
        return grouped_product(gated_RF * up_RF, here(self.down_proj), counts_E)


def grouped_product(rows_RI: Tensor, weights_EOI: Tensor, counts_E: Tensor) -> Tensor:
    """rows_RO: each group of rows times the transpose of its own matrix. On CUDA in bf16 it is one kernel, which reads
    the counts on the device; elsewhere one product per group, an empty one too: every matrix has a gradient."""
    if rows_RI.is_cuda and rows_RI.dtype == torch.bfloat16 and rows_RI.shape[0] > 0:
        ends_E = counts_E.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(rows_RI, weights_EOI.transpose(1, 2), offs=ends_E)
    groups = zip(rows_RI.split(counts_E.tolist()), weights_EOI.unbind(), strict=True)
    return torch.cat([F.linear(rows, weight) for rows, weight in groups])


def token_weights(documents_BL: Tensor, whole_BS: Tensor, sequence_weights_B: Tensor) -> Tensor:
    """token_weights_BL: the weight of each sequence, shared out among its tokens; padding, of document -1, has none.

    Args:
        documents_BL: document of each token that is here.
        whole_BS: document of each token of the whole sequences.
        sequence_weights_B: see `Objective.sequence_weights`.
    """
    tokens_B = (whole_BS >= 0).sum(-1).clamp(min=1)
    return (documents_BL >= 0) * (sequence_weights_B / tokens_B)[:, None]


class _Attached(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, carrier: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.dtype
        return carrier.view_as(carrier)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones((), dtype=ctx.loss)


def attached(carrier: Tensor, loss: Tensor) -> Tensor:
    """`carrier` unchanged; where its gradient arrives, `loss`, a scalar, gets the gradient 1."""
    return _Attached.apply(carrier, loss)  # type: ignore[no-any-return, no-untyped-call]
