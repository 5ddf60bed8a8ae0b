"""Hugging Face transformers' models with experts, on random configurations: the same logits from the same directory."""

import random

import pytest
import torch
import transformers

from tests.oracles.test_transformers_models import VOCABULARY, Words, ours, theirs
from train.models import hf_weights

KINDS = ("mixtral", "qwen2_moe", "qwen3_moe", "dots1")
SEEDS = range(24)


def random_config(seed: int) -> transformers.PreTrainedConfig:
    """An architecture with features drawn at random."""
    draw = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    layers, experts, kv_heads, group = 3, draw.choice([4, 7]), draw.choice([1, 2]), draw.choice([1, 2])
    features = {"num_experts_per_tok": draw.choice([1, 2, 4]), "head_dim": draw.choice([6, 8])}
    head_width = 8
    if kind == "mixtral":
        features["num_local_experts"] = experts
    else:
        features |= {"moe_intermediate_size": draw.choice([12, 20]), "norm_topk_prob": draw.random() < 0.5}
    if kind == "dots1":
        features |= {"n_routed_experts": experts, "n_shared_experts": draw.choice([1, 2])}
        features |= {"first_k_dense_replace": draw.choice([0, 1]), "routed_scaling_factor": draw.choice([1.0, 1.7])}
    if kind in ("qwen2_moe", "qwen3_moe"):
        features |= {"num_experts": experts}
        features |= draw.choice([{}, {"mlp_only_layers": [0, 1]}, {"decoder_sparse_step": 2}])
    if kind == "qwen2_moe":
        features |= {"shared_expert_intermediate_size": draw.choice([12, 28]), "qkv_bias": draw.random() < 0.5}
        head_width = features["head_dim"]
    if kind in ("qwen3_moe", "dots1"):
        features["attention_bias"] = draw.random() < 0.5
    return transformers.AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=kv_heads * group * head_width,
        intermediate_size=draw.choice([24, 40]),
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=draw.random() < 0.5,
        max_position_embeddings=64,
        **features,
    )


@pytest.mark.parametrize("seed", SEEDS)
@torch.no_grad()
def test_logits_equal_those_of_transformers_both_ways(tmp_path, seed):
    config = random_config(seed)
    there = theirs(config)
    for name, buffer in there.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.3)
    there.save_pretrained(tmp_path / "theirs")
    here = ours(tmp_path / "theirs")

    tokens_BL = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(seed))
    logits_BLV = here(tokens_BL, torch.arange(40).expand(2, 40), torch.zeros_like(tokens_BL))
    expected_BLV = there(tokens_BL).logits
    torch.testing.assert_close(logits_BLV, expected_BLV, rtol=0, atol=1e-4)

    hf_weights.write(tmp_path / "ours", here.config, here.state_dict(), Words(), max_shard_bytes=20_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert again.config.model_type == config.model_type
    torch.testing.assert_close(again(tokens_BL).logits, expected_BLV, rtol=0, atol=1e-4)


def test_the_random_configurations_cover_every_feature():
    configs = [random_config(seed) for seed in SEEDS]
    assert {c.model_type for c in configs} == set(KINDS)
    assert {c.norm_topk_prob for c in configs if c.model_type != "mixtral"} == {True, False}
    assert {c.routed_scaling_factor for c in configs if c.model_type == "dots1"} == {1.0, 1.7}
    assert {c.first_k_dense_replace for c in configs if c.model_type == "dots1"} == {0, 1}
    assert {c.qkv_bias for c in configs if c.model_type == "qwen2_moe"} == {True, False}
    qwens = [c for c in configs if c.model_type in ("qwen2_moe", "qwen3_moe")]
    assert {c.decoder_sparse_step for c in qwens} == {1, 2}
    assert any(c.mlp_only_layers for c in qwens)
