"""Which canonical parameters (Hugging Face names) a parameter of Megatron's GPTModel holds, and where in it.

Megatron fuses projections that read the same input. On each tensor-parallel rank:

    linear_qkv   [K, G + 2, D, N]: for each key/value head its G query heads, then its key, then its value
    linear_fc1   [2, F, N]: gate, then up
    embeddings   [V, N]: rows of the vocabulary; the last ranks have some that stand for no token

Each canonical parameter is a strided view of that, with the elements in the same order.

Shape suffixes (all of one tensor-parallel rank): V vocabulary rows, N model width, F feed-forward width, K key/value
heads, G query heads to each, D features of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Piece:
    """One canonical parameter, as far as this tensor-parallel rank holds it.

    Args:
        name: canonical.
        select: view of its elements in a tensor of the shape of Megatron's parameter.
        dimension: along which tensor-parallel ranks share it; None where each holds all of it.
    """

    name: str
    select: Callable[[Tensor], Tensor]
    dimension: int | None = None


def pieces(name: str, first_layer: int, architecture: Any, rows: int) -> list[Piece]:
    """What a parameter of a GPTModel holds.

    Args:
        name: Megatron's.
        first_layer: global number of the model chunk's first layer.
        architecture: a DecoderConfig, or what has its fields.
        rows: how many of this rank's rows of the vocabulary stand for a token.
    """
    if name.startswith("embedding.") or name == "output_layer.weight":
        canonical = HEAD if name.startswith("output") and not architecture.tied else EMBEDDING
        return [Piece(canonical, lambda rows_VN: rows_VN[:rows], dimension=0)]
    if name == "decoder.final_layernorm.weight":
        return [Piece("model.norm.weight", _all)]
    _, _, layer, module, kind = name.replace("self_attention.", "").replace("mlp.", "").split(".")
    prefix = f"model.layers.{first_layer + int(layer)}"
    if module == "linear_qkv":
        queries, head_dim = architecture.heads // architecture.kv_heads, architecture.head_dim
        heads = {
            "q_proj": slice(queries),
            "k_proj": slice(queries, queries + 1),
            "v_proj": slice(queries + 1, queries + 2),
        }
        return [
            Piece(f"{prefix}.self_attn.{projection}.{kind}", _heads(which, queries + 2, head_dim), dimension=0)
            for projection, which in heads.items()
        ]
    if module == "linear_fc1":
        return [
            Piece(f"{prefix}.mlp.{projection}.{kind}", _half(number), dimension=0)
            for number, projection in enumerate(("gate_proj", "up_proj"))
        ]
    canonical = _OTHERS[module]
    shared_by_rows = module in ("linear_proj", "linear_fc2") and kind == "weight"
    return [Piece(f"{prefix}.{canonical}.{kind}", _all, dimension=1 if shared_by_rows else None)]


_OTHERS = {
    "input_layernorm": "input_layernorm",
    "pre_mlp_layernorm": "post_attention_layernorm",
    "q_layernorm": "self_attn.q_norm",
    "k_layernorm": "self_attn.k_norm",
    "linear_proj": "self_attn.o_proj",
    "linear_fc2": "mlp.down_proj",
}


def _all(tensor: Tensor) -> Tensor:
    return tensor


def _heads(which: slice, in_group: int, head_dim: int) -> Callable[[Tensor], Tensor]:
    return lambda fused: fused.unflatten(0, (-1, in_group, head_dim))[:, which]


def _half(number: int) -> Callable[[Tensor], Tensor]:
    return lambda fused: fused.chunk(2)[number]
