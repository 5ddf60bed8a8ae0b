"""Hugging Face transformers' generation: the same greedy tokens, the same sampling distribution."""

import pytest
import torch
import transformers
from transformers.generation import logits_process

from train.generate import Generator, Sampling, distribution
from train.models import hf, hf_weights

VOCABULARY = 61


class Ids:
    vocabulary, eos, pad = VOCABULARY, 0, 0

    def encode(self, text: str) -> list[int]:
        return []

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        return "".join(chr(64 + i) for i in ids)


def test_greedy_tokens_of_a_ragged_batch_are_those_of_transformers(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=0,
    )
    there = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    there.save_pretrained(tmp_path)
    here = hf.read_config(tmp_path).build(VOCABULARY)
    here.load_state_dict(hf_weights.read(tmp_path, here.config))
    prompts = [[5, 7, 9, 11, 2], [3], [8, 8]]
    answers = Generator(here, Ids()).generate(prompts, Sampling(max_tokens=24))
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = there.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        assert answer == (expected[: expected.index(0)] if 0 in expected else expected)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.6, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.7), (0.8, 9, 0.9), (1.0, 0, 0.05)]
)
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    logits_BV = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)) * 3
    warpers = [logits_process.TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(logits_process.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(logits_process.TopPLogitsWarper(top_p))
    expected_BV = logits_BV
    for warper in warpers:
        expected_BV = warper(None, expected_BV)
    ours_BV = distribution(logits_BV, Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(ours_BV, expected_BV.softmax(-1))
