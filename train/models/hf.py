"""Hugging Face's `config.json` in and out, for the Llama, Qwen2, Qwen3 and SmolLM2 families and their relatives with
experts; tensors are the business of `hf_weights`.

Nothing here imports transformers.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from conf.errors import LongrunError
from train.models import hf_experts
from train.models.moe import MoE
from train.models.rope import Rope
from train.models.transformer import DecoderConfig

if TYPE_CHECKING:
    from data_pipeline.tokenizer import Tokenizer

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
CONFIG = "config.json"

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    **hf_experts.ARCHITECTURES,
}

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1.0,),
    "pretraining_tp": (1,),
    "embedding_multiplier": (1.0,),
    "attention_multiplier": (1.0,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "quantization_config": (),
    "no_rope_layers": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
"""Keys of config.json that change what the model computes, and the values (or null) under which they do not."""


class HuggingFaceError(LongrunError):
    """A directory is no Hugging Face model that this program can read, or a model cannot be written as one."""


def model_directory(path: str | Path) -> Path:
    """Where the model is: `path` itself, or `path/model` where `path` is an artifact.

    Raises:
        HuggingFaceError: neither holds a config.json.
    """
    path = Path(path)
    for directory in (path / "model", path):
        if (directory / CONFIG).is_file():
            return directory
    there = f"it holds {listed(f.name for f in path.iterdir())}" if path.is_dir() else "there is no such directory"
    raise HuggingFaceError(
        f"{path} is neither a Hugging Face model directory nor an artifact with one in model/: no {CONFIG} ({there}). "
        "Give the directory that holds config.json and *.safetensors, or that of a finished training or export run."
    )


def read_config(directory: str | Path) -> DecoderConfig:
    """The architecture that `config.json` describes.

    Raises:
        HuggingFaceError: the architecture or a feature of it is not one of ours (every one is named), or a key lacks.
    """
    directory = Path(directory)
    content = read_json(directory / CONFIG)
    kind = content.get("model_type")
    if kind not in ARCHITECTURES:
        raise HuggingFaceError(
            f"{directory / CONFIG}: model_type {kind!r} is not supported; expected one of {', '.join(ARCHITECTURES)}."
        )
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    problems = [f"{key} is missing" for key in needed if not isinstance(content.get(key), int)]
    if content.get("auto_map"):
        code = ", ".join(sorted({str(value).split(".")[0] + ".py" for value in content["auto_map"].values()}))
        problems.append(
            f"auto_map names code of the model's own ({code}), which is never run; take auto_map out of the file where "
            f"{ARCHITECTURES[kind]} computes the same"
        )
    for key, neutral in NEUTRAL.items():
        if content.get(key) is not None and content[key] not in neutral:
            problems.append(f"{key}={content[key]!r} is not supported{f', only {neutral[0]!r}' if neutral else ''}")
    sparse = kind in hf_experts.ARCHITECTURES
    for key in () if sparse else ("num_experts", "num_local_experts"):
        if content.get(key):
            problems.append(f"{key}={content[key]!r} is not supported, only 0")
    if set(content.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        problems.append(f"layer_types={content['layer_types']!r} is not supported, only 'full_attention'")
    rope = _rope(content, problems)
    moe = hf_experts.read_experts(kind, content, problems) if sparse else MoE()
    if problems:
        raise HuggingFaceError(f"{directory / CONFIG} cannot be read:\n  " + "\n  ".join(problems))

    heads = content["num_attention_heads"]
    bias = bool(content.get("attention_bias", False))
    return DecoderConfig(
        layers=content["num_hidden_layers"],
        hidden=content["hidden_size"],
        intermediate=content["intermediate_size"],
        heads=heads,
        kv_heads=content.get("num_key_value_heads") or heads,
        head_dim=content.get("head_dim") or (128 if kind == "qwen3" else content["hidden_size"] // heads),
        rope=rope,
        norm_eps=content.get("rms_norm_eps", 1e-6),
        tied=bool(content.get("tie_word_embeddings", False)),
        qkv_bias=kind == "qwen2" or (bool(content.get("qkv_bias", True)) if kind == "qwen2_moe" else bias),
        output_bias=kind not in ("qwen2", "qwen2_moe") and bias,
        mlp_bias=kind == "llama" and bool(content.get("mlp_bias", False)),
        qk_norm=kind in ("qwen3", "qwen3_moe", "dots1"),
        moe=moe,
        max_positions=content.get("max_position_embeddings", 2048 if kind == "llama" else 32768),
    )


def _rope(content: Mapping[str, Any], problems: list[str]) -> Rope:
    """Both spellings: `rope_parameters` (transformers 5), and `rope_theta` beside `rope_scaling`."""
    told = content.get("rope_parameters") or content.get("rope_scaling") or {}
    theta = told.get("rope_theta") or content.get("rope_theta") or hf_experts.ROPE_THETA.get(content["model_type"], 1e4)
    kind = told.get("rope_type") or told.get("type") or "default"
    if told.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"partial_rotary_factor={told['partial_rotary_factor']!r} is not supported, only 1.0")
    needed = {
        "default": {},
        "linear": {"factor": "factor"},
        "llama3": {
            "factor": "factor",
            "low_frequency_factor": "low_freq_factor",
            "high_frequency_factor": "high_freq_factor",
            "original_positions": "original_max_position_embeddings",
        },
    }.get(kind)
    if needed is None:
        problems.append(f"rope type {kind!r} is not supported, only default, linear and llama3")
        return Rope()
    missing = [key for key in needed.values() if told.get(key) is None]
    if missing:
        problems.append(f"rope type {kind!r} lacks {', '.join(missing)}")
        return Rope()
    return Rope(theta=float(theta), scaling=kind, **{ours: told[theirs] for ours, theirs in needed.items()})


def architecture(config: DecoderConfig) -> str:
    """The `model_type` that has this configuration's features.

    Raises:
        HuggingFaceError: none has.
    """
    if config.moe.experts:
        kind = hf_experts.architecture(config)
        if kind is None:
            raise HuggingFaceError(
                f"No Hugging Face architecture has these together: qk_norm={config.qk_norm}, "
                f"qkv_bias={config.qkv_bias}, output_bias={config.output_bias}, mlp_bias={config.mlp_bias}, "
                f"{hf_experts.features(config)}"
            )
        return kind
    biases = (config.qkv_bias, config.output_bias)
    if config.qk_norm and biases in ((False, False), (True, True)) and not config.mlp_bias:
        return "qwen3"
    if not config.qk_norm and biases == (True, False) and not config.mlp_bias:
        return "qwen2"
    if not config.qk_norm and biases in ((False, False), (True, True)) and config.hidden % config.heads == 0:
        return "llama"
    raise HuggingFaceError(
        f"No Hugging Face architecture has these together: qk_norm={config.qk_norm}, qkv_bias={config.qkv_bias}, "
        f"output_bias={config.output_bias}, mlp_bias={config.mlp_bias}, hidden={config.hidden}, heads={config.heads}. "
        "Qwen3 has qk_norm without mlp_bias; Qwen2 has qkv_bias alone; Llama has qkv_bias and output_bias both or "
        "neither, and heads that divide hidden."
    )


def stored_names(config: DecoderConfig, name: str) -> str | list[str]:
    """What a parameter is called in files; a list where they hold it as several tensors, stacked here along their new
    first dimension."""
    if not config.moe.experts:
        return name
    names = hf_experts.stored_names(architecture(config), name, config.moe.experts)
    return names if ".experts." in name else names[0]


def config_json(config: DecoderConfig, embedding: Tensor, tokenizer: "Tokenizer") -> dict[str, Any]:
    """Content of `config.json`.

    Args:
        config: the architecture.
        embedding: embedding_VN, for its rows and dtype.
        tokenizer: for its ids of the end and of padding.

    Raises:
        HuggingFaceError: no architecture has these features together.
    """
    kind = architecture(config)
    rope: dict[str, Any] = {"rope_type": config.rope.scaling, "rope_theta": config.rope.theta}
    if config.rope.scaling != "default":
        rope["factor"] = config.rope.factor
    if config.rope.scaling == "llama3":
        rope["low_freq_factor"] = config.rope.low_frequency_factor
        rope["high_freq_factor"] = config.rope.high_frequency_factor
        rope["original_max_position_embeddings"] = config.rope.original_positions
    content = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": embedding.shape[0],
        "hidden_size": config.hidden,
        "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_parameters": rope,
        "rope_theta": config.rope.theta,  # where readers before transformers 5 look
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "dtype": str(embedding.dtype).removeprefix("torch."),
    }
    if config.moe.experts:
        return content | hf_experts.written(kind, config)
    if kind != "qwen2":
        content["attention_bias"] = config.qkv_bias
    if kind == "llama":
        content["mlp_bias"] = config.mlp_bias
    else:
        content["use_sliding_window"] = False
    return content


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HuggingFaceError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise HuggingFaceError(f"{file} holds a {type(content).__name__}, but a JSON object was expected.")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def listed(names: Iterable[str], most: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"
