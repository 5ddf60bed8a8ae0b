"""The matrix: which layouts are compared, doing what, and how far off they may be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from parallel.layout import Layout
from tools.parity.layouts import parse
from tools.parity.training import MODEL, MUON, Training
from train.objectives.dpo import DPO
from train.objectives.sft import SFT
from train.optim.adam8bit import Adam8bit


@dataclass(frozen=True)
class Gate:
    """The largest differences that a correct layout may show.

    Args:
        loss: absolute, in nats per token, at any step.
        grad_norm: relative, at any step.
        weights: relative, |difference| / |weights| of any final tensor.
    """

    loss: float = 5e-6
    grad_norm: float = 1e-5
    weights: float = 1e-5


FP32 = Gate()
BF16 = Gate(loss=2e-3, grad_norm=5e-2, weights=5e-2)
"""What rounding activations or moments to 8 bits costs, and no more."""


PLAIN = Training()


@dataclass(frozen=True)
class Cell:
    """One comparison.

    Args:
        name: how it is called and chosen.
        layout: where it runs.
        training: what it does there.
        resumed: layout of the second half of the steps, from a checkpoint of the first; None trains in one go.
        gate: when it is red.
        engine: an option of the group `engine`.
        resumed_engine: that of the second half; "" for the same.
        family: what it is listed under.
    """

    name: str
    layout: Layout
    training: Training = PLAIN
    resumed: Layout | None = None
    gate: Gate = FP32
    engine: str = "native"
    resumed_engine: str = ""
    family: str = "given"


EIGHT_BIT = Training(optim=Adam8bit(lr=1e-3, eps=1e-6))
DEEP = Training(model=replace(MODEL, layers=8))
UNEVEN = Training(model=replace(MODEL, layers=5))
UNTIED = Training(model=replace(MODEL, tied=False, qkv_bias=True, qk_norm=True))
DROPPED = Training(model=replace(MODEL, dropout=0.1))
MUONS = Training(optim=MUON)
AVERAGED = Training(ema=0.9)
EVERYTHING = Training(optim=MUON, model=DROPPED.model, ema=0.9)
HALF = Training(precision="bf16")
FINE_TUNED = Training(objective=SFT())
PREFERRED = Training(objective=DPO())

TABLE: dict[str, list[tuple[Any, ...]]] = {
    "accumulation": [
        ("accumulation-2", "mb2"),
        ("accumulation-4", "mb4"),
    ],
    "data parallel": [
        ("zero0", "dp2.mb2"),
        ("zero1", "dp2.zero1.mb2"),
        ("zero2", "dp2.zero2.mb2"),
        ("zero3", "dp2.zero3.mb2"),
        ("zero0-accumulation-1", "dp2"),
        ("zero1-accumulation-1", "dp2.zero1"),
        ("zero2-accumulation-1", "dp2.zero2"),
        ("zero3-accumulation-1", "dp2.zero3"),
        ("zero3-4-ranks", "dp4.zero3.mb2"),
        ("hsdp-zero0", "dp_replicate2.dp2.mb2"),
        ("hsdp-zero1", "dp_replicate2.dp2.zero1.mb2"),
        ("hsdp-zero2", "dp_replicate2.dp2.zero2.mb2"),
        ("hsdp-zero3", "dp_replicate2.dp2.zero3.mb2"),
        ("untied-zero1", "dp2.zero1.mb2", UNTIED),
        ("untied-zero3", "dp2.zero3.mb2", UNTIED),
        ("dropout-zero0", "dp2.mb2", DROPPED),
        ("dropout-zero3", "dp2.zero3.mb2", DROPPED),
        ("ema-zero0", "dp2.mb2", AVERAGED),
        ("ema-zero3", "dp2.zero3.mb2", AVERAGED),
    ],
    "objectives": [
        ("sft-zero2", "dp2.zero2.mb2", FINE_TUNED),
        ("dpo-zero3", "dp2.zero3.mb2", PREFERRED),
    ],
    "context parallel": [
        ("cp2", "cp2.mb2"),
        ("cp4", "cp4.mb2"),
        ("cp2-ring", "cp2.ring.mb2"),
        ("cp4-ring", "cp4.ring.mb2"),
        ("cp3-padded", "cp3.mb2"),
        ("cp2-dropout", "cp2.mb2", DROPPED),
        ("cp2-dpo", "cp2.mb2", PREFERRED),
        ("cp2-zero1", "cp2.dp2.zero1.mb2"),
        ("cp2-ring-zero3", "cp2.ring.dp2.zero3.mb2"),
        ("cp2-hsdp-zero2", "cp2.dp_replicate2.dp2.zero2.mb2"),
        ("cp2-tp2", "cp2.tp2.mb2"),
        ("cp2-tp2-ring-dropout", "cp2.tp2.ring.mb2", DROPPED),
        ("cp2-pp2", "cp2.pp2.mb2"),
        ("cp2-pp2-zbv-ring", "cp2.pp2.zbv.ring.mb4"),
        ("cp2-tp2-pp2", "cp2.tp2.pp2.mb2"),
        ("cp2-bf16", "cp2.mb2", HALF),
        ("cp2-ring-bf16", "cp2.ring.mb2", HALF),
    ],
    "Muon": [
        ("muon-zero0", "dp2.mb2", MUONS),
        ("muon-zero1", "dp2.zero1.mb2", MUONS),
        ("muon-zero2", "dp2.zero2.mb2", MUONS),
        ("muon-zero3", "dp2.zero3.mb2", MUONS),
        ("muon-hsdp-zero2", "dp_replicate2.dp2.zero2.mb2", MUONS),
        ("muon-tp2", "tp2.mb2", MUONS),
        ("muon-tp2-zero3", "dp2.tp2.zero3.mb2", MUONS),
        ("muon-pp2", "pp2.mb4", MUONS),
        ("muon-pp2-tp2", "pp2.tp2.mb4", MUONS),
    ],
    "8-bit Adam": [
        ("adam8bit-zero3", "dp2.zero3.mb2", EIGHT_BIT),
        ("adam8bit-tp2", "tp2.mb2", EIGHT_BIT),
        ("resume-adam8bit-zero3-then-alone", "dp2.zero3.mb2 > alone", EIGHT_BIT),
    ],
    "bf16": [
        ("bf16-zero0", "dp2.mb2", HALF),
        ("bf16-zero1", "dp2.zero1.mb2", HALF),
        ("bf16-zero2", "dp2.zero2.mb2", HALF),
        ("bf16-zero3", "dp2.zero3.mb2", HALF),
    ],
    "resumed elsewhere": [
        ("resume-zero3-then-alone", "dp2.zero3.mb2 > alone", EVERYTHING),
        ("resume-alone-then-zero2", "mb4 > dp2.zero2.mb2", EVERYTHING),
        ("resume-hsdp-then-zero1", "dp_replicate2.dp2.zero3.mb2 > dp2.zero1.mb2", EVERYTHING),
    ],
}
"""Family -> (name, layout, training where it is not the plain one). `a > b` trains the first half of the steps on `a`
and goes on from its checkpoint on `b`; `engine:layout` runs on another engine than the native one."""

QUICK = (
    *("accumulation-4", "zero1", "zero2", "hsdp-zero3", "muon-zero3", "dropout-zero3", "untied-zero3", "bf16-zero2"),
    *("dpo-zero3", "resume-alone-then-zero2", "resume-hsdp-then-zero1"),
)
"""Every technique once, in two minutes on two cores: `cells=[quick]`."""


def cells() -> list[Cell]:
    """The matrix. A new path joins it or does not exist."""
    return [made(family, *row) for family, rows in TABLE.items() for row in rows]


def made(family: str, name: str, way: str, training: Training = PLAIN) -> Cell:
    """A row of the table as a cell."""
    first, *rest = _stretches(way)
    second = rest[0] if rest else ("", None)
    exact = training.precision == "fp32" and not isinstance(training.optim, Adam8bit)
    return Cell(
        name,
        first[1],
        training,
        resumed=second[1],
        gate=FP32 if exact else BF16,
        engine=first[0],
        resumed_engine=second[0],
        family=family,
    )


def _stretches(way: str) -> Iterator[tuple[str, Layout]]:
    """Engine and layout of each part of a way through the steps."""
    for part in way.split(">"):
        engine, _, word = part.strip().rpartition(":")
        yield engine or "native", parse(word)
