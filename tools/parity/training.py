"""The small run that every layout must repeat: its model, its data, its steps.

Shape suffixes: B sequences, P pairs (B = 2P, chosen first), L tokens.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import parallel.engines
from conf.registry import OPTIONS, discover
from data_pipeline.batch import IGNORED, MicroBatch, PreferenceBatch
from parallel import distributed
from parallel.engine import Engine, Settings
from parallel.layout import Layout
from train.models.transformer import DecoderConfig, initialise
from train.objectives.clm import CausalLM
from train.objectives.dpo import DPO
from train.objectives.sft import SFT
from train.optim.adamw import AdamW
from train.optim.muon import Muon

discover(parallel.engines)

VOCABULARY, SEQUENCES, LENGTH = 97, 8, 32
"""97 rows split over no number of ranks evenly."""

MODEL = DecoderConfig(layers=4, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16)
ADAMW = AdamW(lr=1e-3, eps=1e-6)
MUON = Muon(precision="fp32", eps=1e-6)


@dataclass(frozen=True)
class Training:
    """What is trained: the same in a cell and in the single process that it is held against.

    Args:
        optim: an option of the group `optim`.
        model: shape of the decoder.
        objective: an option of the group `objective`; it also says how the labels lie: everywhere but for random
            holes, in spans (sft), or in pairs (dpo).
        ema: decay of the averaged weights; where above 0, they are compared instead of the last ones.
        precision: of forward and backward.
        compile: compile each block.
        clip: largest gradient norm; small enough to bite.
        steps: optimizer steps.
    """

    optim: Any = ADAMW
    model: DecoderConfig = MODEL
    objective: Any = field(default_factory=CausalLM)
    ema: float = 0.0
    precision: str = "fp32"
    compile: bool = False
    clip: float = 0.5
    steps: int = 20


@dataclass(frozen=True)
class Trajectory:
    """What a training leaves behind.

    Args:
        losses: one per step.
        grad_norms: one per step.
        weights: final full weights by name; the averaged ones where there are any.
    """

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


def build(layout: Layout, training: Training, world: distributed.World, seed: int = 0, engine: str = "native") -> Any:
    """An engine with a small decoder.

    Args:
        layout: where it runs.
        training: what it does.
        world: this process.
        seed: of the initial weights; dropout is keyed by 0 always.
        engine: an option of the group `engine`.
    """
    with torch.device("meta"):
        model = training.model.build(VOCABULARY)
    return new_engine(engine, world).build(
        model,
        layout,
        training.optim.build,
        world=world,
        settings=Settings(precision=training.precision, compile=training.compile, clip=training.clip, ema=training.ema),
        initialise=lambda placed: initialise(placed, seed),
    )


def new_engine(name: str, world: distributed.World) -> Any:
    """An option of the group `engine` as it runs here: one made for GPUs is told that there are none."""
    made = OPTIONS["engine", name]
    return made(cpu=True) if hasattr(made, "cpu") and world.device.type == "cpu" else made()


def train(engine: Engine, layout: Layout, training: Training, steps: range) -> Trajectory:
    """Train on this rank's share of the global batches of `steps`."""
    losses, norms = [], []
    for step in steps:
        batch = batch_of(step, training.objective)
        share = shares(batch, engine.dp_rank, engine.dp_size, layout.micro_batches)
        result = engine.train_step(share, training.objective, 1.0)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    return Trajectory(losses, norms, engine.weights(ema=training.ema > 0))


def batch_of(step: int, objective: Any = None) -> MicroBatch:
    """A global batch of random tokens, two documents in each sequence and padding after some of them. The first
    sequences are labelled almost everywhere, the last almost nowhere.

    Args:
        step: seeds it.
        objective: SFT labels one span of each document only; DPO gets pairs with reference log-probabilities.
    """
    generator = torch.Generator().manual_seed(step)
    tokens_BL = torch.randint(0, VOCABULARY, (SEQUENCES, LENGTH + 1), generator=generator)
    labels_BL = tokens_BL[:, 1:].clone()
    ignored_B = torch.linspace(0, 0.9, SEQUENCES)
    labels_BL[torch.rand(SEQUENCES, LENGTH, generator=generator) < ignored_B[:, None]] = IGNORED
    cut_B = torch.randint(LENGTH // 4, LENGTH, (SEQUENCES,), generator=generator)
    index_L = torch.arange(LENGTH)
    documents_BL = (index_L >= cut_B[:, None]).long()
    positions_BL = index_L - documents_BL * cut_B[:, None]
    if isinstance(objective, SFT):
        labels_BL = torch.where(positions_BL % 12 < 4, tokens_BL[:, 1:], IGNORED)  # questions are not learnt
    # Every third sequence is a short one.
    length_B = torch.where(torch.arange(SEQUENCES) % 3 == 2, LENGTH - LENGTH // 5, LENGTH)
    padding_BL = index_L >= length_B[:, None]
    batch = MicroBatch(
        tokens_BL=tokens_BL[:, :-1].contiguous(),
        labels_BL=labels_BL.masked_fill(padding_BL, IGNORED),
        positions_BL=positions_BL,
        documents_BL=documents_BL.masked_fill(padding_BL, -1),
        samples_B=torch.arange(SEQUENCES) + step * SEQUENCES,
    )
    if not isinstance(objective, DPO):
        return batch
    labels_B = (batch.labels_BL != IGNORED).sum(-1)
    return PreferenceBatch(
        **vars(batch), reference_logprobs_B=-4.6 * labels_B + torch.randn(SEQUENCES, generator=generator)
    )


def shares(batch: MicroBatch, dp_rank: int, dp_size: int, micro_batches: int) -> list[MicroBatch]:
    """One rank's part of a global batch, in micro-batches."""
    paired = isinstance(batch, PreferenceBatch)

    def part(values: Tensor, number: int) -> Tensor:
        halves = values.chunk(2) if paired else (values,)  # a pair stays together
        return torch.cat([half.chunk(dp_size)[dp_rank].chunk(micro_batches)[number] for half in halves])

    names = [f.name for f in dataclasses.fields(batch)]
    return [type(batch)(**{name: part(getattr(batch, name), i) for name in names}) for i in range(micro_batches)]
