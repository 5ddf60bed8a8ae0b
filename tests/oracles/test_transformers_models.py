"""Hugging Face transformers' models, on random configurations: the same logits from the same directory."""

import random

import pytest
import torch
import transformers

from train.models import hf, hf_weights
from train.models.transformer import Decoder

VOCABULARY = 97


class Words:
    vocabulary, eos, pad = VOCABULARY, 0, 1

    def save(self, directory):
        pass


def random_config(seed: int) -> transformers.PreTrainedConfig:
    """An architecture with features drawn at random; heads are grouped and head_dim is free."""
    draw = random.Random(seed)
    kind = ("llama", "qwen2", "qwen3")[seed % 3]
    kv_heads, group, head_dim = draw.choice([1, 2, 3]), draw.choice([1, 2, 4]), draw.choice([6, 8, 16])
    heads = kv_heads * group
    theta = draw.choice([1e4, 5e5, 1e6])
    rope = draw.choice(
        [
            {"rope_type": "default"},
            {"rope_type": "linear", "factor": 4.0},
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ]
    )
    features = {"head_dim": head_dim}
    if kind != "qwen2":
        features["attention_bias"] = draw.random() < 0.5
    if kind == "llama":
        features["mlp_bias"] = draw.random() < 0.5
    return transformers.AutoConfig.for_model(
        kind,
        vocab_size=VOCABULARY,
        hidden_size=heads * draw.choice([4, 8]),
        intermediate_size=draw.choice([24, 56]),
        num_hidden_layers=draw.choice([1, 3]),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=draw.choice([1e-5, 1e-6]),
        tie_word_embeddings=draw.random() < 0.5,
        max_position_embeddings=draw.choice([64, 128]),
        rope_parameters=rope | {"rope_theta": theta},
        **features,
    )


def theirs(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """Random weights, biases and norms included, large enough to matter."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model


def ours(directory) -> Decoder:
    config = hf.read_config(directory)
    model = config.build(VOCABULARY)
    model.load_state_dict(hf_weights.read(directory, config))
    return model


@pytest.mark.parametrize("seed", range(18))
@torch.no_grad()
def test_logits_equal_those_of_transformers_both_ways(tmp_path, seed):
    config = random_config(seed)
    there = theirs(config)
    there.save_pretrained(tmp_path / "theirs")
    here = ours(tmp_path / "theirs")

    tokens_BL = torch.randint(0, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(seed))
    positions_BL = torch.arange(40).expand(2, 40)
    logits_BLV = here(tokens_BL, positions_BL, torch.zeros_like(tokens_BL))
    expected_BLV = there(tokens_BL).logits
    torch.testing.assert_close(logits_BLV, expected_BLV, rtol=0, atol=1e-4)

    hf_weights.write(tmp_path / "ours", here.config, dict(here.named_parameters()), Words(), max_shard_bytes=20_000)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert again.config.model_type == config.model_type
    torch.testing.assert_close(again(tokens_BL).logits, expected_BLV, rtol=0, atol=1e-4)


def test_the_random_configurations_cover_every_feature():
    configs = [random_config(seed) for seed in range(18)]
    assert {c.model_type for c in configs} == {"llama", "qwen2", "qwen3"}
    assert {c.tie_word_embeddings for c in configs} == {True, False}
    assert {c.rope_parameters["rope_type"] for c in configs} == {"default", "linear", "llama3"}
    assert {getattr(c, "attention_bias", None) for c in configs if c.model_type != "qwen2"} == {True, False}
    assert {c.mlp_bias for c in configs if c.model_type == "llama"} == {True, False}
    assert any(c.num_key_value_heads < c.num_attention_heads for c in configs)
    assert any(c.head_dim * c.num_attention_heads != c.hidden_size for c in configs)


@torch.no_grad()
def test_padding_and_a_bidirectional_mask_agree_with_transformers(tmp_path):
    """Left padding as transformers has it: an attention mask, and positions that start at the first real token."""
    there = theirs(random_config(0))
    there.save_pretrained(tmp_path)
    here = ours(tmp_path)
    tokens_BL = torch.randint(0, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(0))
    real_BL = torch.tensor([[0] * 4 + [1] * 8])
    positions_BL = (real_BL.cumsum(-1) - 1).clamp(min=0)
    expected_BLV = there(tokens_BL, attention_mask=real_BL, position_ids=positions_BL).logits
    logits_BLV = here(tokens_BL, positions_BL, real_BL - 1)
    torch.testing.assert_close(logits_BLV[:, 4:], expected_BLV[:, 4:], rtol=0, atol=1e-4)

    visible_B1LL = (real_BL[:, :, None] * real_BL[:, None, :]).bool()[:, None]
    hidden_B1LL = torch.zeros(visible_B1LL.shape).masked_fill(~visible_B1LL, torch.finfo(torch.float32).min)
    expected_BLV = there(tokens_BL, attention_mask=hidden_B1LL, position_ids=positions_BL).logits
    logits_BLV = here(tokens_BL, positions_BL, real_BL - 1, causal=False)
    torch.testing.assert_close(logits_BLV[:, 4:], expected_BLV[:, 4:], rtol=0, atol=1e-4)
