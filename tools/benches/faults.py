"""Which flipped bits are found, by whom and how late: an injection campaign; and what looking for them costs.

Each injection starts from the same state after some steps, flips one random bit of one random element on one random
rank, and trains on until something is found, or for so many steps; then the state is put back. Everything is looked
for in every step (guard.every=1, guard.spike_strength=6). A bit that changes nothing in the
end, compared bit by bit with a run that was left alone, had no effect.

    weights, moments     at rest, while gradients are computed
    gradients            at rest, whole, before the update
    activations          the output of a block in the forward pass
    backward             the gradient that enters a block in the backward pass
"""

import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conf.registry import register
from data_pipeline.batch import MicroBatch
from parallel import distributed
from parallel.checksums import Checksums
from parallel.engine import Settings, StepResult
from parallel.engines.native import Native, NativeEngine
from parallel.layout import Layout
from parallel.reduce import local_of
from tools.parity.layouts import parse
from tools.parity.training import ADAMW, MODEL, VOCABULARY, shares
from tools.ranks import run_ranks
from train.guard import FaultError, Guard, Patrol, kind_of
from train.models.transformer import DecoderConfig, initialise
from train.objectives.clm import CausalLM

BITS = {
    "sign": range(31, 32),
    "exponent, high": range(27, 31),
    "exponent, low": range(23, 27),
    "mantissa, high": range(12, 23),
    "mantissa, low": range(12),
}
"""Of fp32."""
TARGETS = ("weights", "moments", "gradients", "activations", "backward")
GUARD = Guard(spike_strength=6.0, spike_window=32, every=1)


@dataclass(frozen=True)
class Injection:
    """One flipped bit.

    Args:
        target: one of TARGETS.
        bits: one of BITS.
        rank: where.
        seed: chooses the bit, the element and the moment.
    """

    target: str
    bits: str
    rank: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of it.

    Args:
        found: kind of fault -> steps after the one that it befell.
        effect: relative difference of the loss at the end from that of an undisturbed run; of those not found.
        none: whether the state at the end has the same bits as without it; of those not found.
    """

    found: dict[str, int]
    effect: float = 0.0
    none: bool = False


def batch_of(step: int, tokens: int = 32) -> MicroBatch:
    """Eight sequences of so many random tokens, all of them labelled: no activation is without effect."""
    generator = torch.Generator().manual_seed(step)
    tokens_BL = torch.randint(0, VOCABULARY, (8, tokens + 1), generator=generator)
    return MicroBatch(
        tokens_BL=tokens_BL[:, :-1].contiguous(),
        labels_BL=tokens_BL[:, 1:].contiguous(),
        positions_BL=torch.arange(tokens).expand(8, tokens).contiguous(),
        documents_BL=torch.zeros(8, tokens, dtype=torch.int64),
        samples_B=torch.arange(8) + 8 * step,
    )


def flip(tensor: Tensor, element: int, bit: int) -> None:
    """One bit of one element of this rank's part of an fp32 tensor, in place."""
    words = local_of(tensor.detach()).view(torch.int32).view(-1)
    words[element] ^= 1 << bit if bit < 31 else -(1 << 31)


class Campaign:
    """One rank's part of the injections on one layout.

    Args:
        layout: where the small model of tools.parity is.
        warm_up: steps before the state that injections start from.
        horizon: steps in which a fault may be found.
        repeat_every: see Guard.
    """

    def __init__(self, layout: Layout, warm_up: int, horizon: int, repeat_every: int):
        self.rank = distributed.start().rank
        self.layout, self.warm_up, self.horizon = layout, warm_up, horizon
        self.engine = self._engine(repeat_every)
        self.patrol = Patrol(self.engine, GUARD.every)
        self._before_update = self.engine.before_update
        self.engine.before_update = self._at_rest
        self._armed: Injection | None = None
        self._calls = 0
        for part in self.engine.parts:
            for block in part.model.blocks:  # type: ignore[union-attr]
                block.register_forward_hook(self._in_block)
        self.alarms = sum(bool(self._step(step)[1]) for step in range(warm_up))
        self.start = {name: local_of(tensor).clone() for name, tensor in self.engine.state().items()}
        self.calls = self._calls // warm_up
        """Of blocks, in a step."""
        self.losses, self.end_T = self._undisturbed()

    def _engine(self, repeat_every: int) -> NativeEngine:
        model = replace(MODEL, layers=2).build(VOCABULARY)
        initialise(model, 0)
        settings = Settings(
            precision="fp32",
            deterministic=True,
            ema=0.9,
            skip_spikes=GUARD.spike_strength,
            spike_window=GUARD.spike_window,
            repeat_every=repeat_every,
        )
        return Native().build(model, self.layout, ADAMW.build, world=distributed.start(), settings=settings)

    def _undisturbed(self) -> tuple[list[float], Tensor]:
        losses, found = zip(*(self._step(self.warm_up + step) for step in range(self.horizon)), strict=True)
        self.alarms += sum(map(bool, found))
        return list(losses), self._bits()

    def _bits(self) -> Tensor:
        return Checksums(self.engine.device).of(self.engine.state().values())

    def _step(self, step: int) -> tuple[float, set[str]]:
        """The loss, and what was found."""
        share = shares(batch_of(step), self.engine.dp_rank, self.engine.dp_size, self.layout.micro_batches)
        result: StepResult = self.engine.train_step(share, CausalLM(), 1.0)
        figures = {"loss": float(result.loss), "grad_norm": float(result.grad_norm)}
        found = (
            {kind_of(figures | {"differing": float(result.metrics.get("differing", 0))})} if result.skipped else set()
        )
        for _ in range(2):  # memory is told first; replicas are looked at again
            try:
                self.patrol.check(step + 1, wait=True)
                break
            except FaultError as fault:
                found.add(fault.kind)
        return figures["loss"], found

    def inject(self, injection: Injection) -> Outcome:
        """Put the state back, flip the bit, and look what comes of it."""
        for name, tensor in self.engine.state().items():
            local_of(tensor).copy_(self.start[name])
        self.engine.loaded()
        self.patrol.check(self.warm_up, wait=True)
        dice = random.Random(injection.seed)
        self._calls, self._call = 0, dice.randrange(self.calls)
        self._bit, self._element = dice.choice(BITS[injection.bits]), dice.random()
        self._armed = injection if injection.rank == self.rank else None
        if injection.target in ("weights", "moments"):
            self._strike(injection.target, self._resting(injection.target))
        found: dict[str, int] = {}
        loss = 0.0
        for step in range(self.horizon):
            if found and step > max(found.values()) + 1:
                return Outcome(found)
            loss, kinds = self._step(self.warm_up + step)
            found |= {kind: step for kind in kinds if kind not in found}
        if found:
            return Outcome(found)
        same = torch.tensor(float(torch.equal(self._bits(), self.end_T)))
        dist.all_reduce(same, op=dist.ReduceOp.MIN)
        return Outcome({}, abs(loss / self.losses[-1] - 1), bool(same))

    def _resting(self, target: str) -> list[Tensor]:
        if target == "gradients":
            return [parameter.grad for parameter in self.engine.parameters.values() if parameter.grad is not None]
        prefix, endings = ("model.", ("",)) if target == "weights" else ("optimizer.", (".exp_avg", ".exp_avg_sq"))
        state = self.engine.state().items()
        return [tensor for name, tensor in state if name.startswith(prefix) and name.endswith(endings)]

    def _strike(self, target: str, tensors: Sequence[Tensor]) -> None:
        """Flip the bit of the chosen element, counted over all of these, if this rank is to and it is not done yet."""
        if self._armed is None or self._armed.target != target:
            return
        self._armed = None
        sizes = list(itertools.accumulate(local_of(tensor).numel() for tensor in tensors))
        element = int(self._element * sizes[-1])
        number = next(number for number, size in enumerate(sizes) if element < size)
        flip(tensors[number], element - (sizes[number - 1] if number else 0), self._bit)

    def _at_rest(self) -> None:
        self._before_update()
        self._strike("gradients", self._resting("gradients"))

    def _in_block(self, _block: Any, _arguments: Any, output: Tensor) -> Tensor | None:
        self._calls += 1
        if self._armed is None or self._calls - 1 != self._call:
            return None
        output = output.clone()
        self._strike("activations", [output])
        if output.requires_grad:
            output.register_hook(self._backward)
        return output

    def _backward(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        self._strike("backward", [gradient])
        return gradient


def campaign(layout: Layout, injections: Sequence[Injection], *arguments: int) -> tuple[list[Outcome], int]:
    """What became of each, on this rank, and how often something was found where nothing was injected."""
    rank = Campaign(layout, *arguments)
    return [rank.inject(injection) for injection in injections], rank.alarms


@register("bench", "faults")
@dataclass(frozen=True)
class Faults:
    """Flip bits and count those that are found.

    Args:
        layouts: where; names as those of tools.parity.
        targets: what is hit.
        injections: of each target and kind of bits, on each layout.
        warm_up: undisturbed steps before them.
        horizon: steps in which a fault may be found.
        repeat_every: see Guard; 0 shows what is found of computations without computing twice.
        seed: of the choice.
        cost_steps: steps whose time is compared with that of the patrols; 0 measures no cost.
    """

    layouts: tuple[str, ...] = ("dp2", "dp2.zero1", "dp2.zero2", "dp2.zero3", "tp2")
    targets: tuple[str, ...] = TARGETS
    injections: int = 8
    warm_up: int = 24
    horizon: int = 6
    repeat_every: int = 1
    seed: int = 0
    cost_steps: int = 20

    def run(self) -> dict[str, float]:
        """Counts by layout, target and bits, as shares."""
        figures: dict[str, float] = {}
        for name in self.layouts:
            layout = parse(name)
            injections = self.chosen(layout.world_size)
            outcomes, alarms = self.outcomes(layout, injections)
            figures |= _shares(name, injections, outcomes)
            figures[f"{name}: alarms in {self.warm_up + self.horizon} undisturbed steps"] = alarms
        return figures | (_cost(self.cost_steps) if self.cost_steps else {})

    def chosen(self, ranks: int) -> list[Injection]:
        """The injections on so many ranks: the same for the same seed."""
        dice = random.Random(self.seed)
        kinds = itertools.product(self.targets, BITS, range(self.injections))
        return [Injection(target, bits, dice.randrange(ranks), dice.getrandbits(32)) for target, bits, _ in kinds]

    def outcomes(self, layout: Layout, injections: Sequence[Injection]) -> tuple[list[Outcome], int]:
        """What became of them, and false alarms; all ranks found the same."""
        arguments = (layout, injections, self.warm_up, self.horizon, self.repeat_every)
        told = run_ranks(layout.world_size, campaign, *arguments, timeout_s=60 + 10 * len(injections))
        assert all(outcomes == told[0][0] for outcomes, _ in told), "ranks that do not find the same"
        return told[0]


def _shares(layout: str, injections: Sequence[Injection], outcomes: Sequence[Outcome]) -> dict[str, float]:
    figures: dict[str, float] = {}
    pairs = list(zip(injections, outcomes, strict=True))
    for target in dict.fromkeys(injection.target for injection in injections):
        of_target = [(injection, outcome) for injection, outcome in pairs if injection.target == target]
        for bits in BITS:
            those = [outcome for injection, outcome in of_target if injection.bits == bits]
            figures[f"{layout}, {target}, {bits}: found"] = _share(bool(outcome.found) for outcome in those)
        those = [outcome for _, outcome in of_target]
        for kind, count in sorted(Counter(kind for outcome in those for kind in outcome.found).items()):
            figures[f"{layout}, {target}: found as {kind}"] = count / len(those)
        missed = [outcome for outcome in those if not outcome.found]
        figures[f"{layout}, {target}: without effect"] = sum(outcome.none for outcome in missed) / len(those)
        late = [min(outcome.found.values()) for outcome in those if outcome.found]
        figures[f"{layout}, {target}: steps late, at most"] = max(late, default=0)
        figures[f"{layout}, {target}: loss difference of those not found, at most"] = max(
            (outcome.effect for outcome in missed), default=0.0
        )
    return figures


def _share(those: Any) -> float:
    found = list(those)
    return sum(found) / max(len(found), 1)


def _cost(steps: int) -> dict[str, float]:
    """Seconds of patrols against those of steps, in turn; one process, 4,096 tokens a step."""
    model = DecoderConfig(layers=4, hidden=256, intermediate=704, heads=4, kv_heads=4, head_dim=64).build(1024)
    initialise(model, 0)
    built = Native().build(model, Layout(), ADAMW.build, world=distributed.start(), settings=Settings(precision="fp32"))
    batch = batch_of(0, tokens=512)
    checksums, took, looked = Checksums(built.device), [], []
    for _ in range(steps):
        start = time.perf_counter()
        built.train_step([batch], CausalLM(), 1.0)
        between = time.perf_counter()
        for _ in range(2):  # after the update, and before the next
            checksums.of(built.state().values()).tolist()
        took.append(between - start)
        looked.append(time.perf_counter() - between)
    share = statistics.median(looked) / statistics.median(took)
    return {
        "patrol / step": share,
        f"patrols / steps at guard.every={Guard().every}": share / Guard().every,
    }
