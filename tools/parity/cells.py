"""The matrix: which layouts are compared, doing what, and how far off they may be."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from parallel.layout import Layout
from tools.parity.layouts import parse
from tools.parity.training import MODEL, MUON, Training
from train.models.moe import MoE
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
GIVEN = "given on the command line"


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
    family: str = GIVEN


EIGHT_BIT = Training(optim=Adam8bit(lr=1e-3, eps=1e-6))
DEEP = Training(model=replace(MODEL, layers=8))
UNEVEN = Training(model=replace(MODEL, layers=5))
NARROW = Training(model=replace(MODEL, intermediate=150))
UNTIED = Training(model=replace(MODEL, tied=False, qkv_bias=True, qk_norm=True))
NORMED = Training(model=replace(MODEL, tied=False, qk_norm=True))
BIASED = Training(model=replace(MODEL, qkv_bias=True, output_bias=True, mlp_bias=True))
DROPPED = Training(model=replace(MODEL, dropout=0.1))
MUONS = Training(optim=MUON)
AVERAGED = Training(ema=0.9)
EVERYTHING = Training(optim=MUON, model=DROPPED.model, ema=0.9)
HALF = Training(precision="bf16")
COMPILED = Training(compile=True)
FINE_TUNED = Training(objective=SFT())
PREFERRED = Training(objective=DPO())
EXPERTS = Training(model=replace(MODEL, moe=MoE(experts=8, active=2, intermediate=48, balance_loss=0.1)))
SHARED = MoE(experts=6, active=2, intermediate=48, shared=64, first=1, scoring="sigmoid", selection_bias=True)
MUON_EXPERTS = replace(EXPERTS, optim=MUON)
BALANCED = Training(model=replace(MODEL, moe=SHARED))
GATED = MoE(experts=4, active=2, intermediate=64, shared=32, shared_gate=True, normalise=False, every=2, z_loss=0.01)
QWEN = Training(model=replace(MODEL, moe=GATED))
ALL_ACTIVE = Training(precision="bf16", model=replace(MODEL, moe=replace(GATED, active=4)))
"""What rounding to 8 bits would send to another expert, it sends to all of them."""

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
        ("zero1-untied", "dp2.zero1.mb2", UNTIED),
        ("zero3-untied", "dp2.zero3.mb2", UNTIED),
        ("zero0-dropout", "dp2.mb2", DROPPED),
        ("zero3-dropout", "dp2.zero3.mb2", DROPPED),
        ("zero0-ema", "dp2.mb2", AVERAGED),
        ("zero3-ema", "dp2.zero3.mb2", AVERAGED),
        ("zero2-sft", "dp2.zero2.mb2", FINE_TUNED),
        ("zero3-dpo", "dp2.zero3.mb2", PREFERRED),
    ],
    "tensor parallel": [
        ("tp2", "tp2.mb2"),
        ("tp4-fewer-kv-heads", "tp4.mb2"),
        ("tp4-uneven-width", "tp4.mb2", NARROW),
        ("tp2-untied", "tp2.mb2", UNTIED),
        ("tp2-biased", "tp2.mb2", BIASED),
        ("tp2-dropout", "tp2.mb2", DROPPED),
        ("tp2-dpo", "tp2.mb2", PREFERRED),
        ("tp2-zero0", "dp2.tp2.mb2"),
        ("tp2-zero1", "dp2.tp2.zero1.mb2"),
        ("tp2-zero2", "dp2.tp2.zero2.mb2"),
        ("tp2-zero3", "dp2.tp2.zero3.mb2"),
        ("tp2-hsdp-zero3", "dp_replicate2.dp2.tp2.zero3.mb2"),
    ],
    "pipeline": [
        ("gpipe", "pp2.gpipe.mb4"),
        ("1f1b", "pp2.1f1b.mb4"),
        ("interleaved-1f1b", "pp2.interleaved_1f1b.mb4"),
        ("looped-bfs", "pp2.looped_bfs.mb4"),
        ("interleaved-zero-bubble", "pp2.interleaved_zero_bubble.mb4"),
        ("zbv", "pp2.zbv.mb4"),
        ("dual-pipe-v", "pp2.dual_pipe_v.mb4"),
        ("pp4", "pp4.mb4"),
        ("pp4-interleaved", "pp4.interleaved_1f1b.mb8", DEEP),
        ("pp4-zbv", "pp4.zbv.mb8", DEEP),
        ("pp2-uneven", "pp2.mb4", UNEVEN),
        ("pp4-uneven", "pp4.mb4", UNEVEN),
        ("pp2-untied", "pp2.mb4", UNTIED),
        ("pp2-dropout", "pp2.mb2", DROPPED),
        ("pp2-ema", "pp2.mb2", AVERAGED),
        ("pp2-dpo", "pp2.mb2", PREFERRED),
        ("pp2-zero0", "pp2.dp2.mb2"),
        ("pp2-zero1", "pp2.dp2.zero1.mb2"),
        ("pp2-zero2", "pp2.dp2.zero2.mb2"),
        ("pp2-zero3", "pp2.dp2.zero3.mb2"),
        ("zbv-zero2", "pp2.dp2.zero2.zbv.mb4"),
        ("zbv-zero3", "pp2.dp2.zero3.zbv.mb4"),
        ("dual-pipe-v-zero3", "pp2.dp2.zero3.dual_pipe_v.mb4"),
        ("zero-bubble-zero1", "pp2.dp2.zero1.interleaved_zero_bubble.mb4"),
    ],
    "three axes": [
        ("pp2-tp2", "pp2.tp2.mb4"),
        ("pp2-tp2-zero1", "pp2.dp2.tp2.zero1.mb2"),
        ("pp2-tp2-zero2-zbv", "pp2.dp2.tp2.zero2.zbv.mb4"),
        ("pp2-tp2-zero3", "pp2.dp2.tp2.zero3.mb2"),
        ("pp2-tp2-zero3-everything", "pp2.dp2.tp2.zero3.interleaved_1f1b.mb2", EVERYTHING),
    ],
    "experts": [
        ("moe-accumulation", "mb4", EXPERTS),
        ("moe-zero3", "dp2.zero3.mb2", EXPERTS),
        ("moe-bias-zero2", "dp2.zero2.mb2", BALANCED),
        ("moe-tp2", "tp2.mb2", EXPERTS),
        ("moe-bias-tp2", "dp2.tp2.mb2", BALANCED),
        ("moe-pp2", "pp2.mb4", EXPERTS),
        ("moe-dpo", "dp2.zero1.mb2", replace(EXPERTS, objective=DPO())),
        ("moe-cp2", "cp2.mb2", EXPERTS),
        ("ep2-zero0", "dp2.ep2.mb2", EXPERTS),
        ("ep2-zero1", "dp2.ep2.zero1.mb2", QWEN),
        ("ep2-zero2", "dp2.ep2.zero2.mb2", EXPERTS),
        ("ep2-zero3", "dp2.ep2.zero3.mb2", QWEN),
        ("ep2-dp4", "dp4.ep2.zero3.mb2", EXPERTS),
        ("ep4-dp4", "dp4.ep4.zero1.mb2", QWEN),
        ("ep2-hsdp", "dp_replicate2.dp2.ep2.zero2.mb2", EXPERTS),
        ("ep2-tp2", "dp2.ep2.tp2.zero3.mb2", QWEN),
        ("ep2-cp2", "cp2.ep2.zero3.mb2", QWEN),
        ("ep4-dp2-cp2", "dp2.cp2.ep4.zero1.mb2", EXPERTS),
        ("ep2-pp2", "pp2.dp2.ep2.zero1.mb2", EXPERTS),
        ("ep2-pp2-zbv", "pp2.dp2.ep2.zbv.zero2.mb4", QWEN),
        ("ep2-recompute", "dp2.ep2.zero3.mb2.recompute_full", BALANCED),
        ("ep2-dpo", "dp2.ep2.zero1.mb2", replace(QWEN, objective=DPO())),
        ("ep2-muon", "dp2.ep2.zero2.mb2", MUON_EXPERTS),
        ("ep2-bf16", "dp2.ep2.zero2.mb2", ALL_ACTIVE),
        ("ep2-bias", "dp2.ep2.zero3.mb2", BALANCED),
        ("ep2-bias-tp2", "dp2.ep2.tp2.zero2.mb2", BALANCED),
        ("ep2-bias-pp2", "pp2.dp2.ep2.mb2", BALANCED),
        ("ep2-pp2-tp2", "pp2.dp2.ep2.tp2.zero1.mb2", BALANCED),
        ("resume-ep2-tp2-then-alone", "dp2.ep2.tp2.zero3.mb2 > alone", BALANCED),
        ("resume-alone-then-ep2-pp2", "alone > pp2.dp2.ep2.zero1.mb2", BALANCED),
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
        ("cp2-ring-recompute-selective", "cp2.ring.recompute_selective.mb2"),
    ],
    "Muon": [
        ("muon-zero0", "dp2.mb2", MUONS),
        ("muon-zero1", "dp2.zero1.mb2", MUONS),
        ("muon-zero2", "dp2.zero2.mb2", MUONS),
        ("muon-zero3", "dp2.zero3.mb2", MUONS),
        ("muon-hsdp-zero2", "dp_replicate2.dp2.zero2.mb2", MUONS),
        ("muon-tp2", "tp2.mb2", MUONS),
        ("muon-tp2-zero3", "dp2.tp2.zero3.mb2", MUONS),
        ("muon-pp2-zero1", "pp2.dp2.zero1.mb2", MUONS),
        ("muon-pp2-tp2", "pp2.tp2.mb4", MUONS),
        ("muon-cp2-zero3", "cp2.zero3.mb2", MUONS),
        ("muon-moe-zero3", "dp2.zero3.mb2", MUON_EXPERTS),
        ("muon-moe-ep2-dp4", "dp4.ep2.zero3.mb2", MUON_EXPERTS),
        ("muon-moe-ep2-tp2", "dp2.ep2.tp2.zero3.mb2", MUON_EXPERTS),
    ],
    "8-bit Adam": [
        ("adam8bit-zero3", "dp2.zero3.mb2", EIGHT_BIT),
        ("adam8bit-tp2", "tp2.mb2", EIGHT_BIT),
        ("resume-adam8bit-zero3-then-alone", "dp2.zero3.mb2 > alone", EIGHT_BIT),
    ],
    "compiled blocks": [
        ("compiled-zero3", "dp2.zero3.mb2", COMPILED),
        ("compiled-tp2", "tp2.mb2", COMPILED),
        ("compiled-pp2", "pp2.mb2", COMPILED),
        ("compiled-cp2", "cp2.mb2", COMPILED),
        ("compiled-ep2", "dp2.ep2.mb2", replace(EXPERTS, compile=True)),
    ],
    "bf16": [
        ("bf16-zero0", "dp2.mb2", HALF),
        ("bf16-zero1", "dp2.zero1.mb2", HALF),
        ("bf16-zero2", "dp2.zero2.mb2", HALF),
        ("bf16-zero3", "dp2.zero3.mb2", HALF),
        ("bf16-tp2", "tp2.mb2", HALF),
        ("bf16-zbv", "pp2.zbv.mb4", HALF),
    ],
    "Megatron": [
        ("megatron-tp2", "megatron:tp2.mb2", NORMED),
        ("megatron-tp2-biased", "megatron:tp2.recompute_selective.mb2", BIASED),
        ("megatron-tp2-bf16", "megatron:tp2.mb2", HALF),
        ("megatron-tp2-dpo", "megatron:tp2.mb2", PREFERRED),
        ("megatron-pp2", "megatron:pp2.recompute_full.mb4"),
        ("megatron-pp2-interleaved", "megatron:pp2.interleaved_1f1b.mb2", UNEVEN),
        ("megatron-cp2", "megatron:cp2.mb2"),
        ("megatron-cp2-ring", "megatron:cp2.ring.mb2"),
        ("megatron-zero0", "megatron:dp2.mb2"),
        ("megatron-zero1", "megatron:dp2.zero1.mb2", AVERAGED),
        ("megatron-zero1-bf16", "megatron:dp2.zero1.mb2", HALF),
        ("megatron-tp2-pp2", "megatron:tp2.pp2.mb2"),
        ("megatron-tp2-zero1", "megatron:dp2.tp2.zero1.mb2"),
        ("megatron-pp2-zero1", "megatron:pp2.dp2.zero1.mb2", UNTIED),
        ("megatron-cp2-pp2-dpo", "megatron:cp2.pp2.mb2", PREFERRED),
        ("megatron-pp2-tp2-zero0", "megatron:pp2.dp2.tp2.mb2"),
        ("megatron-pp2-tp2-zero1", "megatron:pp2.dp2.tp2.zero1.interleaved_1f1b.mb2", AVERAGED),
        ("resume-zero3-then-megatron-tp2-pp2", "dp2.zero3.mb2 > megatron:tp2.pp2.mb2", AVERAGED),
        ("resume-megatron-zero1-then-zero2", "megatron:dp2.tp2.zero1.mb2 > dp2.zero2.mb2", AVERAGED),
        ("resume-megatron-pp2-then-megatron-zero1", "megatron:pp2.mb2 > megatron:dp2.zero1.mb2", AVERAGED),
    ],
    "recomputation": [
        ("recompute-full-zero3", "dp2.zero3.recompute_full.mb2", DROPPED),
        ("recompute-selective-zero3", "dp2.zero3.recompute_selective.mb2", DROPPED),
        ("recompute-half-zero2", "dp2.zero2.recompute_0.5.mb2", DROPPED),
        ("recompute-selective-tp2", "tp2.recompute_selective.mb2", DROPPED),
        ("recompute-full-pp2-zbv", "pp2.zbv.recompute_full.mb4", DROPPED),
        ("recompute-full-bf16-zero3", "dp2.zero3.recompute_full.mb2", HALF),
    ],
    "offload": [
        ("offload-optimizer-zero2", "dp2.zero2.offload_optimizer.mb2", MUONS),
        ("offload-parameters-zero3", "dp2.zero3.offload_parameters.mb2"),
        ("offload-parameters-pp2-tp2", "pp2.tp2.offload_parameters.recompute_full.mb2"),
    ],
    "resumed elsewhere": [
        ("resume-zero3-then-alone", "dp2.zero3.mb2 > alone", EVERYTHING),
        ("resume-alone-then-zero2", "mb4 > dp2.zero2.mb2", EVERYTHING),
        ("resume-hsdp-then-zero1", "dp_replicate2.dp2.zero3.mb2 > dp2.zero1.mb2", EVERYTHING),
        ("resume-zero3-then-pp2-tp2", "dp4.zero3.mb2 > pp2.tp2.mb4", EVERYTHING),
        ("resume-pp2-tp2-zero1-then-zero3", "pp2.dp2.tp2.zero1.mb2 > dp2.zero3", EVERYTHING),
        ("resume-tp2-then-zbv", "tp2 > pp2.zbv", EVERYTHING),
    ],
    "DeepSpeed": [
        ("deepspeed-alone", "deepspeed:mb4"),
        ("deepspeed-zero0", "deepspeed:dp2.mb2"),
        ("deepspeed-zero1", "deepspeed:dp2.zero1.mb2"),
        ("deepspeed-zero2", "deepspeed:dp2.zero2.mb2"),
        ("deepspeed-zero3", "deepspeed:dp2.zero3.mb2"),
        ("deepspeed-zero3-4-ranks", "deepspeed:dp4.zero3", DROPPED),
        ("deepspeed-zero1-tp", "deepspeed:dp2.tp2.zero1.mb2"),
        ("deepspeed-zero3-tp", "deepspeed:dp2.tp2.zero3", UNTIED),
        ("deepspeed-offload-optimizer", "deepspeed:dp2.zero2.mb2.offload_optimizer"),
        ("deepspeed-offload-parameters", "deepspeed:dp2.zero3.mb2.offload_parameters"),
        ("deepspeed-bf16-zero1", "deepspeed:dp2.zero1.mb2", HALF),
        ("deepspeed-bf16-zero2", "deepspeed:dp2.zero2.mb2", HALF),
        ("deepspeed-bf16-zero3", "deepspeed:dp2.zero3.mb2", HALF),
        ("deepspeed-recompute-full", "deepspeed:dp2.tp2.zero2.recompute_full", DROPPED),
        ("deepspeed-recompute-selective", "deepspeed:dp2.zero3.mb2.recompute_selective"),
        ("deepspeed-dpo", "deepspeed:dp2.zero2.mb2", PREFERRED),
        ("deepspeed-from-native", "dp2.zero3.mb2 > deepspeed:dp4.zero2", AVERAGED),
        ("deepspeed-to-native", "deepspeed:dp2.zero3.mb2 > dp_replicate2.dp2.zero1", AVERAGED),
        ("deepspeed-tp-to-native", "deepspeed:dp2.tp2.zero2.mb2 > alone", AVERAGED),
    ],
}
"""Family -> (name, layout, training where it is not the plain one). `a > b` trains the first half of the steps on `a`
and goes on from its checkpoint on `b`; `engine:layout` runs on another engine than the native one."""

QUICK = (
    *(
        "zero1",
        "zero3-dropout",
        "hsdp-zero2",
        "tp2-untied",
        "zbv",
        "pp2-zero2",
        "cp2-zero1",
        "pp2-tp2-zero3",
        "ep2-zero3",
    ),
    *("muon-zero3", "bf16-zero2", "recompute-selective-tp2", "resume-zero3-then-pp2-tp2"),
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
