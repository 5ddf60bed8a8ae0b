"""Pipeline parallelism: a model cut along its depth into stages, and micro-batches that flow through them.

A schedule is a list of actions for each rank, in its order: F (forward), B (backward), or B in two halves, I (of the
input, which the stage before waits for) and W (of the weights, which nobody waits for). The lists are torch's
(torch.distributed.pipelining); running them is ours, so that micro-batches may differ in length, every rank has its
micro-batches from its own loader, and only hidden states and their gradients travel.

Messages from a rank to another leave in the sender's order of actions, which the receiver knows, and are received in
that order, through a group of these two ranks in this direction. On NCCL the messages of a group wait for each other:
where a third rank's, or the other direction's, came between, ranks could wait for each other in a circle.

Shape suffixes: B sequences, L tokens, N features.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.layout import V_SCHEDULES, Layout
from parallel.linear import deferring


class Action(NamedTuple):
    """kind: F, B, I or W, of a micro-batch in a stage."""

    kind: str
    stage: int
    micro_batch: int


class Message(NamedTuple):
    """The input of an action that another rank computed."""

    kind: str
    stage: int
    micro_batch: int


class Placed(Protocol):
    """What `Sharded` and `Whole` have in common."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def parameters(self) -> dict[str, Tensor]: ...
    def accumulate(self, last: bool) -> None: ...
    def reduce(self) -> None: ...
    def release(self) -> None: ...
    def changed(self) -> None: ...


@dataclass(frozen=True)
class Part:
    """A stage that this rank has.

    Args:
        stage: its number, from the tokens' end.
        placed: its model.
    """

    stage: int
    placed: Placed

    @property
    def model(self) -> nn.Module:
        return self.placed.model


def rank_of(stage: int, layout: Layout) -> int:
    """The pipeline rank that has a stage: round and round, or there and back (V)."""
    turn, place = divmod(stage, layout.pp)
    return layout.pp - 1 - place if layout.schedule in V_SCHEDULES and turn % 2 else place


def cut(layers: int, stages: int) -> list[range]:
    """The layers of each stage; where they do not divide, the first ones have one more: the last has the head."""
    share, more = divmod(layers, stages)
    starts = [stage * share + min(stage, more) for stage in range(stages + 1)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def actions(layout: Layout, micro_batches: int, group: dist.ProcessGroup) -> list[list[Action]]:
    """What each rank of a pipeline does, in its order.

    Args:
        layout: schedule, ranks and stages.
        micro_batches: that flow through.
        group: the ranks of the pipeline.
    """
    if layout.schedule in ("gpipe", "1f1b") or layout.pp == 1:
        return [_one_stage(layout, micro_batches, rank) for rank in range(layout.pp)]
    from torch.distributed import pipelining

    kinds = {
        "interleaved_1f1b": pipelining.ScheduleInterleaved1F1B,
        "looped_bfs": pipelining.ScheduleLoopedBFS,
        "interleaved_zero_bubble": pipelining.ScheduleInterleavedZeroBubble,
        "zbv": pipelining.ScheduleZBVZeroBubble,
        "dual_pipe_v": pipelining.ScheduleDualPipeV,
    }
    count = layout.pp * layout.virtual_stages
    mine = [stage for stage in range(count) if rank_of(stage, layout) == group.rank()]
    placeholders = [
        pipelining.PipelineStage(nn.Identity(), stage, count, torch.device("cpu"), group=group) for stage in mine
    ]
    order = kinds[layout.schedule](placeholders, micro_batches).pipeline_order
    return [[action for entry in order[rank] for action in _flat(entry)] for rank in range(layout.pp)]


def _one_stage(layout: Layout, micro_batches: int, rank: int) -> list[Action]:
    ahead = micro_batches if layout.schedule == "gpipe" and layout.pp > 1 else layout.pp - 1 - rank
    forward = deque(Action("F", rank, number) for number in range(micro_batches))
    backward = deque(Action("B", rank, number) for number in range(micro_batches))
    order = [forward.popleft() for _ in range(min(ahead, micro_batches))]
    while backward:
        if forward:
            order.append(forward.popleft())
        order.append(backward.popleft())
    return order


def _flat(entry: object) -> list[Action]:
    """An action of torch's schedules as ours; two that may overlap, one after the other; gaps and the rest as none."""
    if entry is None:
        return []
    if parts := getattr(entry, "sub_actions", None):
        return [action for part in parts for action in _flat(part)]
    kind = entry.computation_type.value  # type: ignore[attr-defined]
    return [Action(kind, entry.stage_index, entry.microbatch_index)] if kind in "FBIW" else []  # type: ignore[attr-defined]


class Pipeline:
    """The stages of this rank, and the ranks before and after it.

    Args:
        parts: this rank's stages, in order.
        layout: sizes, schedule.
        group: the ranks of this pipeline.
        device: of this rank.
    """

    def __init__(self, parts: Sequence[Part], layout: Layout, group: dist.ProcessGroup, device: torch.device):
        self.parts = {part.stage: part for part in parts}
        self.layout, self.group, self.device = layout, group, device
        self.rank = group.rank()
        self.stages = layout.pp * layout.virtual_stages
        self.channels = _channels(group, layout.pp)
        self._orders: dict[int, list[list[Action]]] = {}

    @property
    def last(self) -> int:
        """The rank that has the last stage."""
        return rank_of(self.stages - 1, self.layout)

    def train(self, number: int, forward: "Forward", shape: "Shape", dtype: torch.dtype) -> None:
        """Forward and backward of a step's micro-batches, by the schedule. Gradients arrive at the parts' parameters.

        Args:
            number: of micro-batches.
            forward: `forward(part, micro-batch, hidden_BLN)`: the part's hidden states, or its loss, a sum, where it is
                the last one.
            shape: `shape(micro-batch)`: of the hidden states between stages.
            dtype: theirs.
        """
        if number not in self._orders:
            self._orders[number] = actions(self.layout, number, self.group)
        run = _Run(self, self._orders[number], shape, dtype)
        left = {stage: number for stage in self.parts}
        split = {stage: any(a.kind == "I" and a.stage == stage for a in run.order) for stage in self.parts}
        for action in run.order:
            part = self.parts[action.stage]
            run.expect_next()
            if action.kind == "F":
                self._forward(run, action, part, forward, split[action.stage])
                continue
            if action.kind in "BI":
                left[action.stage] -= 1
                part.placed.accumulate(last=left[action.stage] == 0 and not split[action.stage])
                self._backward(run, action)
            if action.kind in "BW":
                torch.autograd.backward(run.tickets.pop(action[1:]) or [])
        for stage, part in self.parts.items():
            if split[stage]:
                part.placed.reduce()
        run.finish()

    def infer(self, number: int, forward: "Forward", shape: "Shape", dtype: torch.dtype) -> None:
        """Forward only: `forward` of the last stage keeps what it finds."""
        order = [
            [Action("F", s, m) for m in range(number) for s in range(self.stages) if rank_of(s, self.layout) == rank]
            for rank in range(self.layout.pp)
        ]
        run = _Run(self, order, shape, dtype)
        for action in run.order:
            run.expect_next()
            self._forward(run, action, self.parts[action.stage], forward, split=False)
        run.finish()

    def _forward(self, run: "_Run", action: Action, part: Part, forward: "Forward", split: bool) -> None:
        _, stage, micro_batch = action
        hidden_BLN = run.take(Message("F", stage, micro_batch)) if stage > 0 else None
        if hidden_BLN is not None and torch.is_grad_enabled():
            hidden_BLN.requires_grad_()
        if split:
            with deferring() as tickets:
                out = forward(part, micro_batch, hidden_BLN)
        else:
            tickets, out = [], forward(part, micro_batch, hidden_BLN)
        if stage < self.stages - 1:
            run.give(Message("F", stage + 1, micro_batch), out.detach())
        if torch.is_grad_enabled():
            run.graphs[stage, micro_batch] = (hidden_BLN, out)
            run.tickets[stage, micro_batch] = tickets

    def _backward(self, run: "_Run", action: Action) -> None:
        _, stage, micro_batch = action
        hidden_BLN, out = run.graphs.pop((stage, micro_batch))
        grad = run.take(Message("B", stage, micro_batch)) if stage < self.stages - 1 else None
        torch.autograd.backward(out, grad)
        if hidden_BLN is not None:
            assert hidden_BLN.grad is not None
            run.give(Message("B", stage - 1, micro_batch), hidden_BLN.grad)

    def from_last(self, values: Tensor) -> Tensor:
        """The last stage's values on every rank of the pipeline."""
        if self.layout.pp > 1:
            dist.broadcast(values, group=self.group, group_src=self.last)
        return values


Forward = Callable[[Part, int, Tensor | None], Tensor]
Shape = Callable[[int], tuple[int, ...]]


class _Run:
    """The messages and graphs of one step."""

    def __init__(self, pipeline: Pipeline, order: list[list[Action]], shape: Shape, dtype: torch.dtype):
        self.pipeline, self.shape, self.dtype = pipeline, shape, dtype
        self.order = order[pipeline.rank]
        self.graphs: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.tickets: dict[tuple[int, int], list[Tensor]] = {}
        self._here: dict[Message, Tensor] = {}
        self._incoming = _incoming(order, pipeline)
        self._receiving: dict[Message, tuple[Tensor, dist.Work]] = {}
        self._sending: list[tuple[Tensor, dist.Work]] = []
        self._wanted = deque(w for action in self.order if (w := self._remote_input(action)) is not None)

    def _remote_input(self, action: Action) -> Message | None:
        needed = _input_of(action, self.pipeline.stages)
        return needed if needed is not None and self._source(needed) != self.pipeline.rank else None

    def _source(self, message: Message) -> int:
        before = message.stage + (-1 if message.kind == "F" else 1)
        return rank_of(before, self.pipeline.layout)

    def expect_next(self) -> None:
        """Have the next message from elsewhere under way before computing."""
        if self._wanted:
            self._expect(self._wanted[0])

    def _expect(self, message: Message) -> None:
        source = self._source(message)
        queue = self._incoming[source]
        while message not in self._receiving:
            coming = queue.popleft()
            buffer = torch.empty(self.shape(coming.micro_batch), dtype=self.dtype, device=self.pipeline.device)
            group = self.pipeline.channels[source, self.pipeline.rank]
            sender = dist.get_global_rank(self.pipeline.group, source)
            work = dist.irecv(buffer, sender, group=group, tag=self._tag(coming))
            assert work is not None
            self._receiving[coming] = (buffer, work)

    def _tag(self, message: Message) -> int:
        return (message.micro_batch * self.pipeline.stages + message.stage) * 2 + (message.kind == "B")

    def take(self, message: Message) -> Tensor:
        """Wait for a message."""
        if self._source(message) == self.pipeline.rank:
            return self._here.pop(message)
        self._wanted.popleft()
        self._expect(message)
        buffer, work = self._receiving.pop(message)
        work.wait()
        return buffer

    def give(self, message: Message, value: Tensor) -> None:
        """Send a message, without waiting; what has arrived is let go."""
        self._sending = [(sent, work) for sent, work in self._sending if not work.is_completed()]
        target = rank_of(message.stage, self.pipeline.layout)
        if target == self.pipeline.rank:
            self._here[message] = value
            return
        value = value.contiguous()
        group = self.pipeline.channels[self.pipeline.rank, target]
        receiver = dist.get_global_rank(self.pipeline.group, target)
        work = dist.isend(value, receiver, group=group, tag=self._tag(message))
        assert work is not None
        self._sending.append((value, work))

    def finish(self) -> None:
        assert not self.graphs and not self.tickets, "a schedule left gradients out"
        for _, work in self._sending:
            work.wait()


def _input_of(action: Action, stages: int) -> Message | None:
    if action.kind == "F":
        return Message("F", action.stage, action.micro_batch) if action.stage > 0 else None
    if action.kind in "BI":
        return Message("B", action.stage, action.micro_batch) if action.stage < stages - 1 else None
    return None


def _incoming(order: list[list[Action]], pipeline: Pipeline) -> dict[int, deque[Message]]:
    """What each other rank sends to this one, in the order in which it leaves."""
    incoming: dict[int, deque[Message]] = {source: deque() for source in range(len(order))}
    for source, actions_of_source in enumerate(order):
        for kind, stage, micro_batch in actions_of_source:
            if kind == "F" and stage < pipeline.stages - 1:
                message = Message("F", stage + 1, micro_batch)
            elif kind in "BI" and stage > 0:
                message = Message("B", stage - 1, micro_batch)
            else:
                continue
            if source != pipeline.rank and rank_of(message.stage, pipeline.layout) == pipeline.rank:
                incoming[source].append(message)
    return incoming


def _channels(group: dist.ProcessGroup, pp: int) -> dict[tuple[int, int], dist.ProcessGroup]:
    """The group of each pair of neighbours, (from, to), that this rank is one of; the last rank's next is the first.
    All ranks of all pipelines make theirs together."""
    channels: dict[tuple[int, int], dist.ProcessGroup] = {}
    if pp == 1:
        return channels
    columns: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(columns, dist.get_process_group_ranks(group))
    pipelines = sorted({tuple(ranks) for ranks in columns})
    for source in range(pp):
        for target in sorted({(source + 1) % pp, (source - 1) % pp}):
            pairs = [sorted((ranks[source], ranks[target])) for ranks in pipelines]
            own, _ = dist.new_subgroups_by_enumeration(pairs)
            if own is not None and group.rank() in (source, target):
                channels[source, target] = own
    return channels
