"""What Hugging Face directories say of experts, and what their tensors are called there: Mixtral (arXiv:2401.04088),
Qwen2-MoE (arXiv:2407.10671), Qwen3-MoE (arXiv:2505.09388) and dots.llm1 (arXiv:2506.05767).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train.models.moe import MoE

if TYPE_CHECKING:
    from train.models.transformer import DecoderConfig

ARCHITECTURES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "dots1": "Dots1ForCausalLM",
}

ROPE_THETA = {"mixtral": 1e6}
"""Where a `config.json` says nothing and it is not 1e4."""

RENAMED: dict[str, dict[str, str]] = {
    "mixtral": {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    "dots1": {".shared_expert.": ".shared_experts."},
}
"""Parts of our names, and what stands for them in files of a kind; others keep theirs."""


def stored_names(kind: str, name: str, experts: int) -> list[str]:
    """What one of our tensors is called in files: there, each expert of a stack is a tensor, in this order."""
    stack, _, matrix = name.rpartition(".experts.")
    names = [f"{stack}.experts.{expert}.{matrix}.weight" for expert in range(experts)] if stack else [name]
    for ours, theirs in RENAMED.get(kind, {}).items():
        names = [name.replace(ours, theirs) for name in names]
    return names


def read_experts(kind: str, content: Mapping[str, Any], problems: list[str]) -> MoE:
    """The experts that a `config.json` of this kind describes; what is missing or not supported joins the problems."""
    keys = {"experts": "num_experts", "active": "num_experts_per_tok", "intermediate": "moe_intermediate_size"}
    if kind == "mixtral":
        keys |= {"experts": "num_local_experts", "intermediate": "intermediate_size"}
    if kind == "qwen2_moe":
        keys |= {"shared": "shared_expert_intermediate_size"}
    if kind == "dots1":
        keys |= {"experts": "n_routed_experts", "shared": "n_shared_experts"}
    sizes: dict[str, Any] = {ours: content.get(theirs) for ours, theirs in keys.items()}
    if sizes["experts"] is None:  # transformers 5 has one name for all
        sizes["experts"] = content.get("num_local_experts")
    # The Qwens say by another key whether the window counts.
    if content.get("sliding_window") and (kind == "mixtral" or (kind == "dots1" and not content.get("layer_types"))):
        problems.append(f"sliding_window={content['sliding_window']!r} is not supported, only null")
    missing = [f"{keys[ours]} is missing" for ours, value in sizes.items() if not isinstance(value, int)]
    if missing:
        problems += missing
        return MoE()
    if kind == "mixtral":
        return MoE(**sizes, normalise=True)
    normalise = bool(content.get("norm_topk_prob", False))
    if kind == "dots1":
        sizes["shared"] *= sizes["intermediate"]
        for key in ("n_group", "topk_group"):
            if content.get(key) not in (None, 1):
                problems.append(f"{key}={content[key]!r} is not supported, only 1")
        return MoE(
            **sizes,
            scoring="sigmoid",
            selection_bias=True,
            normalise=normalise,
            scale=content.get("routed_scaling_factor", 1.0),
            first=content.get("first_k_dense_replace") or 0,
        )
    dense = content.get("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        problems.append(f"mlp_only_layers={dense} is not supported, only the first ones, from 0")
    return MoE(
        **sizes,
        shared_gate=kind == "qwen2_moe",
        normalise=normalise,
        first=len(dense),
        every=content.get("decoder_sparse_step", 1),
    )


def architecture(config: "DecoderConfig") -> str | None:
    """The `model_type` that has these experts and the features around them; None where none has."""
    moe, biases = config.moe, (config.qkv_bias, config.output_bias)
    plain = moe.scoring == "softmax" and not moe.selection_bias and moe.scale == 1
    if config.mlp_bias:
        return None
    if plain and config.qk_norm and biases[0] == biases[1] and not moe.shared:
        return "qwen3_moe"
    if plain and not config.qk_norm and moe.shared_gate and not config.output_bias:
        return "qwen2_moe" if config.heads * config.head_dim == config.hidden else None
    if plain and not config.qk_norm and not any(biases) and not moe.shared and moe.normalise:
        return "mixtral" if (moe.first, moe.every) == (0, 1) else None
    whole = moe.shared > 0 and moe.shared % moe.intermediate == 0 and not moe.shared_gate
    if moe.scoring == "sigmoid" and moe.selection_bias and config.qk_norm and biases[0] == biases[1] and whole:
        return "dots1" if moe.every == 1 else None
    return None


def features(config: "DecoderConfig") -> str:
    """What decides on the architecture, and what each offers, for a message."""
    moe = config.moe
    names = ("shared", "shared_gate", "scoring", "normalise", "scale", "first", "every", "selection_bias")
    return (
        ", ".join(f"moe.{name}={getattr(moe, name)}" for name in names)
        + ". Mixtral has normalised softmax weights in every layer; Qwen3-MoE has qk_norm as well, layers without "
        "experts and weights that need not be normalised; Qwen2-MoE has a gated shared expert, without qk_norm and "
        "with heads x head_dim equal to hidden; dots.llm1 has qk_norm, sigmoid scores, a selection bias and an ungated "
        "shared expert as wide as a number of the others."
    )


def written(kind: str, config: "DecoderConfig") -> dict[str, Any]:
    """What `config.json` says of the experts."""
    moe = config.moe
    content: dict[str, Any] = {"num_experts_per_tok": moe.active, "output_router_logits": False}
    if kind == "mixtral":
        return content | {
            "num_local_experts": moe.experts,
            "intermediate_size": moe.intermediate,
            "sliding_window": None,
            "router_jitter_noise": 0.0,
        }
    content |= {"moe_intermediate_size": moe.intermediate, "norm_topk_prob": moe.normalise}
    if kind == "dots1":
        return content | {
            "n_routed_experts": moe.experts,
            "n_shared_experts": moe.shared // moe.intermediate,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": moe.first,
            "routed_scaling_factor": moe.scale,
            "attention_bias": config.qkv_bias,
            "sliding_window": None,
        }
    content |= {
        "num_experts": moe.experts,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(range(moe.first)),
        "use_sliding_window": False,
    }
    if kind == "qwen2_moe":
        return content | {"shared_expert_intermediate_size": moe.shared, "qkv_bias": config.qkv_bias}
    return content | {"attention_bias": config.qkv_bias}
