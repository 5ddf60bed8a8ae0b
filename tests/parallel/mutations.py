"""One break for each technique, to be made on every rank before a cell runs: what a mistake there would do."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import parallel.context
import parallel.engines.native
import parallel.place
import parallel.tensor
import train.models.logprobs
import train.models.transformer
import train.optim.muon
from parallel import linear
from parallel.ema import Average
from parallel.engine import LossTerms
from parallel.engines.native import NativeEngine
from parallel.expert import Exchange
from parallel.mesh import Mesh
from parallel.pipeline import Message, _Run
from parallel.place import Placement
from parallel.plan import chosen
from parallel.recompute import recomputing
from parallel.reduce import Sums, local_of
from parallel.tensor import Tensors, _Column, _Row
from parallel.zero import Sharded
from train.objectives.clm import CausalLM


def mean_of_means() -> None:
    """What most trainers do: each micro-batch's mean, averaged."""
    sum_of = CausalLM.loss

    def mean(self: CausalLM, *arguments: Any) -> LossTerms:
        terms = sum_of(self, *arguments)
        return LossTerms(terms.total / terms.weight, 1)

    CausalLM.loss = mean  # type: ignore[method-assign]


def own_weight() -> None:
    """Gradients are divided by the labels of the rank, not of the step."""
    over_ranks = Sums.over_ranks

    def local_weight(self: Sums, **more: Tensor) -> dict[str, Tensor]:
        own = self.terms["weight"].clone()
        return over_ranks(self, **more) | {"weight": own}

    Sums.over_ranks = local_weight  # type: ignore[method-assign]


def skipped_all_reduce() -> None:
    """Gradients stay those of the rank. The figures, in fp64, are still added."""
    all_reduce = dist.all_reduce

    def only_figures(tensor: Tensor, *arguments: Any, **named: Any) -> Any:
        return all_reduce(tensor, *arguments, **named) if tensor.dtype == torch.float64 else None

    dist.all_reduce = only_figures


def replicas_not_added() -> None:
    """HSDP's replicas never meet."""
    FSDPModule.set_requires_all_reduce = lambda self, required, **_: None  # type: ignore[method-assign, assignment]
    accumulate = Sharded.accumulate

    def apart(self: Sharded, last: bool) -> None:
        accumulate(self, last)
        for unit in self.units:
            unit._get_fsdp_state()._fsdp_param_group.all_reduce_grads = False

    Sharded.accumulate = apart  # type: ignore[method-assign]


def clipping_per_rank() -> None:
    """Each rank clips by the norm of its own shards."""
    over_ranks = Sums.over_ranks

    def local_squares(self: Sums, **more: Tensor) -> dict[str, Tensor]:
        return over_ranks(self, **more) | more

    Sums.over_ranks = local_squares  # type: ignore[method-assign]


def copies_counted_apart() -> None:
    """The norm of what several ranks hold, added up as if they were shards."""
    Placement.copies = lambda self, name: 1  # type: ignore[method-assign]


def twins_counted_twice() -> None:
    """The norm of a tied embedding, added up over both ends of the pipeline."""
    Placement.counted_elsewhere = property(lambda self: set())  # type: ignore[method-assign, assignment]


def random_by_rank() -> None:
    """Dropout is keyed by the rank, too."""
    keys_of = parallel.engines.native.dropout_keys
    parallel.engines.native.dropout_keys = lambda seed, *rest: keys_of(seed + dist.get_rank(), *rest)


def stale_shards() -> None:
    """Gathered parameters outlive the update."""
    accumulate = Sharded.accumulate

    def keeping(self: Sharded, last: bool) -> None:
        accumulate(self, last)
        self.units[0].set_reshard_after_backward(False)

    Sharded.accumulate = keeping  # type: ignore[method-assign]
    Sharded.changed = lambda self: None  # type: ignore[method-assign]


def stale_average() -> None:
    """The average of the weights stays where it began."""
    Average.update = lambda self, skipped: None  # type: ignore[method-assign]


def matrices_in_parts() -> None:
    """Muon orthogonalises each rank's rows by themselves."""
    train.optim.muon.map_whole = lambda function, matrices: [function(local_of(matrix)) for matrix in matrices]


def moments_forgotten() -> None:
    """A checkpoint without moments."""
    state = NativeEngine.state
    NativeEngine.state = lambda self: {  # type: ignore[method-assign]
        name: tensor for name, tensor in state(self).items() if not name.startswith("optimizer.")
    }


def twins_left_behind() -> None:
    """After loading, the last stage's copy of the embedding is what it was."""
    Placement.copy_twins = lambda self: None  # type: ignore[method-assign]


def replicated_gradients_not_added() -> None:
    """Of norms, each tensor-parallel rank has the gradient of its own tokens."""
    Tensors.add_up = lambda self, gradients: None  # type: ignore[method-assign]


def first_slice_everywhere() -> None:
    """Every tensor-parallel rank believes to hold the first tokens of the sequence."""
    Tensors.slice_sequence = lambda self, index_L: index_L.chunk(self.ranks)[0]  # type: ignore[method-assign]


def slices_in_reverse() -> None:
    """Leaving a region, each rank takes the tokens of another."""
    scatter = parallel.tensor._reduce_scatter

    def reversed_slices(x_BLN: Tensor, group: Any, *rest: Any) -> Tensor:
        return scatter(torch.cat(x_BLN.chunk(group.size(), dim=1)[::-1], dim=1), group, *rest)

    parallel.tensor._reduce_scatter = reversed_slices


def own_rows_are_the_vocabulary() -> None:
    """Softmax over a rank's own part of the vocabulary."""
    train.models.logprobs._over_ranks = lambda logit_T, logsumexp_T, group: (logit_T, logsumexp_T)


def bias_of_every_rank() -> None:
    """The bias of a row-parallel layer, added once by each rank."""
    call = _Row.__call__

    def biased(self: _Row, x_BLN: Tensor) -> Tensor:
        self.first = True
        return call(self, x_BLN)

    _Row.__call__ = biased  # type: ignore[method-assign]


def first_head_everywhere() -> None:
    """With fewer key heads than ranks, all compute the first one."""
    mine = _Column._mine
    narrow = (2, 4)  # heads, ranks

    def first(self: _Column, rows: Tensor) -> Tensor:
        self.number = 0 if self.parts == narrow[0] else self.number
        return mine(self, rows)

    _Column._mine = first  # type: ignore[method-assign]


def keys_in_order_of_ranks() -> None:
    """Gathered keys are not put into the order of the sequence."""
    gathered = parallel.context._gathered

    def unsorted(values_Bl: Tensor, group: Any) -> Tensor:
        values_BS = gathered(values_Bl, group)
        return torch.cat([parallel.context.take(values_BS, group.size(), rank) for rank in range(group.size())], dim=1)

    parallel.context._gathered = unsorted


def own_keys_gradients_only() -> None:
    """The gradients that other ranks' queries give to this rank's keys are lost."""
    parallel.context._GatherSummed = parallel.context._GatherOwn  # type: ignore[misc]


def ring_stands_still() -> None:
    """Keys and values are not passed on."""
    parallel.context._send_on = lambda tensor, group: (tensor.clone(), [])


def loss_counted_by_every_rank() -> None:
    """All ranks that share a sequence count it."""
    add = Sums.add
    Sums.add = lambda self, terms, counts=True: add(self, terms, counts=True)  # type: ignore[method-assign]


def gradient_of_another_micro_batch() -> None:
    """Each micro-batch's gradient reaches the stage before one turn late."""
    give = _Run.give

    def late(self: _Run, message: Message, value: Tensor) -> None:
        if message.kind == "B":
            before = vars(self).setdefault("before", {})
            value, before[message.stage] = before.get(message.stage, torch.zeros_like(value)), value
        give(self, message, value)

    _Run.give = late  # type: ignore[method-assign]


def tied_gradients_not_added() -> None:
    """The first stage's embedding and the last stage's go their own ways."""
    make = Placement.__init__

    def untied(self: Placement, *arguments: Any, **named: Any) -> None:
        make(self, *arguments, **named)
        self.tied = set()

    Placement.__init__ = untied  # type: ignore[method-assign]


def weight_gradients_dropped() -> None:
    """The second half of a zero-bubble backward pass is left out."""

    def nothing(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        x_N, grad_M = ctx.held
        ctx.held.clear()
        return x_N.new_zeros(grad_M.shape[-1], x_N.shape[-1]), None

    linear._Ticket.backward = staticmethod(nothing)  # type: ignore[assignment]


def rows_out_of_order() -> None:
    """Experts answer, and their answers come back to other tokens."""
    call = Exchange.__call__
    Exchange.__call__ = lambda self, *arguments: call(self, *arguments).flip(0)  # type: ignore[method-assign]


def balance_counted_by_every_rank() -> None:
    """Tensor-parallel ranks, which route the same tokens, each add the whole loss of the router."""
    share = parallel.place.share_experts

    def whole(model: Any, plan: Any, *rest: Any) -> None:
        share(model, plan, *rest)
        for _, router in chosen(model, plan.routers):
            router.share = 1.0  # type: ignore[assignment]

    parallel.place.share_experts = whole


def biases_by_own_counts() -> None:
    """Each rank moves the biases of the experts by the load that it has seen."""
    Mesh.over_data = lambda self, totals: totals  # type: ignore[method-assign]


def fresh_dropout_when_recomputed() -> None:
    """Activations that are computed again drop other features."""
    drop = train.models.transformer.dropout

    def fresh(x_BLN: Tensor, probability: float, keys_B: Tensor | None, *rest: Any, **named: Any) -> Tensor:
        keys_B = keys_B + 1 if keys_B is not None and recomputing() else keys_B
        return drop(x_BLN, probability, keys_B, *rest, **named)

    train.models.transformer.dropout = fresh
