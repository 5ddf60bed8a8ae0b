"""Hugging Face directories: what is refused, and that nothing is lost on the way."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train.models import hf, hf_weights
from train.models.hf import HuggingFaceError
from train.models.moe import MoE
from train.models.rope import Rope
from train.models.transformer import DecoderConfig, initialise

VOCABULARY = 61
CONFIG = DecoderConfig(
    layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8, tied=False, rope=Rope(theta=5e4)
)
EXPERTS = MoE(experts=3, active=2, intermediate=8)


class Words:
    """A tokenizer as far as `write` needs one."""

    vocabulary, eos, pad = VOCABULARY, 0, 1

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


def weights_of(config: DecoderConfig, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = config.build(VOCABULARY)
    initialise(model, 0)
    return {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    hf_weights.write(tmp_path / "model", CONFIG, weights_of(CONFIG), Words())
    return tmp_path / "model"


def changed(directory: Path, **keys: object) -> None:
    content = json.loads((directory / "config.json").read_text()) | keys
    (directory / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 8000])
@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        replace(CONFIG, tied=True, qkv_bias=True),
        replace(CONFIG, qk_norm=True, qkv_bias=True, output_bias=True, head_dim=16),
        replace(CONFIG, mlp_bias=True, rope=Rope(scaling="linear", factor=2.0)),
        replace(CONFIG, rope=Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 64)),
        replace(CONFIG, intermediate=8, moe=EXPERTS),
        replace(CONFIG, qkv_bias=True, moe=replace(EXPERTS, shared=20, shared_gate=True, normalise=False)),
        replace(CONFIG, qk_norm=True, moe=replace(EXPERTS, every=2)),
        replace(CONFIG, qk_norm=True, moe=replace(EXPERTS, scoring="sigmoid", selection_bias=True, shared=8, first=1)),
    ],
    ids=["llama", "qwen2", "qwen3", "linear", "llama3", "mixtral", "qwen2_moe", "qwen3_moe", "dots1"],
)
def test_what_is_written_is_read_again(tmp_path, config, max_shard_bytes):
    weights = weights_of(config)
    hf_weights.write(tmp_path, config, weights, Words(), max_shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if max_shard_bytes > 8000 else pytest.approx(10, abs=9))
    assert hf.read_config(tmp_path) == config
    found = hf_weights.read(tmp_path, config)
    assert list(found) == list(weights)
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_shards_keep_to_their_size_and_stale_ones_are_removed(tmp_path):
    weights = weights_of(CONFIG)
    hf_weights.write(tmp_path, CONFIG, weights, Words(), 8000)
    shards = [load_file(f) for f in sorted(tmp_path.glob("*.safetensors"))]
    assert len(shards) > 1
    assert all(len(s) == 1 or sum(t.nbytes for t in s.values()) <= 8000 for s in shards)
    assert sorted(n for s in shards for n in s) == sorted(weights)
    hf_weights.write(tmp_path, CONFIG, weights, Words())
    assert {f.name for f in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}


def test_bf16_files_are_read_as_fp32(tmp_path):
    weights = weights_of(CONFIG, torch.bfloat16)
    hf_weights.write(tmp_path, CONFIG, weights, Words())
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    found = hf_weights.read(tmp_path, CONFIG)
    assert all(found[n].dtype == torch.float32 and torch.equal(found[n], weights[n].float()) for n in weights)


def test_every_wrong_tensor_is_listed_at_once(directory):
    weights = load_file(directory / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 4)
    weights["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    save_file(weights, directory / "model.safetensors")
    with pytest.raises(HuggingFaceError) as caught:
        hf_weights.read(directory, CONFIG)
    message = str(caught.value)
    assert "model.norm.weight: missing" in message
    assert "model.layers.1.mlp.up_proj.weight: shape (3, 4), (48, 32) expected" in message
    assert "model.layers.2.mlp.up_proj.weight: unexpected" in message
    assert "lm_head.weight: dtype I8" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_a_pickle_is_refused_unopened(directory, name):
    (directory / "model.safetensors").unlink()
    (directory / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/opened'\ntR.")
    with pytest.raises(HuggingFaceError, match=rf"pickle files \({name}\).*refused, unopened"):
        hf_weights.read(directory, CONFIG)


def test_a_pickle_beside_safetensors_is_ignored(directory):
    (directory / "training_args.bin").write_bytes(b"anything")
    assert hf_weights.read(directory, CONFIG)


def test_a_truncated_file_is_refused_by_name(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(HuggingFaceError, match=r"model\.safetensors cannot be read .* truncated or damaged"):
        hf_weights.read(directory, CONFIG)


def test_a_shard_that_the_index_names_must_be_there(tmp_path):
    hf_weights.write(tmp_path, CONFIG, weights_of(CONFIG), Words(), 8000)
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(HuggingFaceError, match=f"absent files: {gone.name}"):
        hf_weights.read(tmp_path, CONFIG)


def test_a_directory_without_weights_is_refused(directory):
    (directory / "model.safetensors").unlink()
    with pytest.raises(HuggingFaceError, match=r"holds no weights: neither model\.safetensors"):
        hf_weights.read(directory, CONFIG)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; expected one of llama, qwen2, qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"num_experts": 8}, "num_experts=8 is not supported, only 0"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor, high_freq_factor"),
        ({"num_hidden_layers": ..., "hidden_size": ...}, "(?s)hidden_size is missing.*num_hidden_layers is missing"),
        (
            {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}},
            r"auto_map names code .*modeling_own\.py.*never run",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(directory, keys, message):
    changed(directory, **keys)
    with pytest.raises(HuggingFaceError, match=message):
        hf.read_config(directory)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("mixtral", {"sliding_window": 4096}, "sliding_window=4096 is not supported, only null"),
        ("mixtral", {"num_local_experts": ..., "num_experts_per_tok": ...}, "(?s)local_experts is.*per_tok is missing"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\] is not supported, only the first ones"),
        ("qwen2_moe", {}, "shared_expert_intermediate_size is missing"),
        ("dots1", {"n_routed_experts": 3, "n_shared_experts": 1, "n_group": 2}, "n_group=2 is not supported, only 1"),
    ],
)
def test_what_is_not_supported_of_experts_is_refused_by_name(tmp_path, kind, keys, message):
    config = replace(CONFIG, intermediate=8, moe=EXPERTS)
    hf_weights.write(tmp_path, config, weights_of(config), Words())
    changed(tmp_path, **{"model_type": kind, "num_experts": 3, "moe_intermediate_size": 8} | keys)
    with pytest.raises(HuggingFaceError, match=message):
        hf.read_config(tmp_path)


def test_the_older_spelling_of_rope_is_understood(directory):
    scaling = {"type": "linear", "factor": 4.0}
    changed(directory, rope_parameters=..., rope_theta=1e6, rope_scaling=scaling)
    assert hf.read_config(directory).rope == Rope(theta=1e6, scaling="linear", factor=4.0)
    changed(directory, rope_theta=..., rope_scaling=None)
    assert hf.read_config(directory).rope == Rope()


def test_a_stored_copy_of_a_tied_head_must_equal_the_embedding(tmp_path):
    config = replace(CONFIG, tied=True)
    weights = weights_of(config)
    hf_weights.write(tmp_path, config, weights, Words())
    copy = weights | {"lm_head.weight": weights[hf.EMBEDDING].clone()}
    save_file(copy, tmp_path / "model.safetensors")
    assert list(hf_weights.read(tmp_path, config)) == list(weights)
    copy["lm_head.weight"][0, 0] += 1
    save_file(copy, tmp_path / "model.safetensors")
    with pytest.raises(HuggingFaceError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        hf_weights.read(tmp_path, config)


@torch.no_grad()
def test_new_tokens_get_the_mean_row_and_old_ones_keep_theirs(directory):
    weights = weights_of(CONFIG)
    before, after = CONFIG.build(VOCABULARY), CONFIG.build(VOCABULARY + 3)
    for model in (before, after):
        hf_weights.load(model, directory, CONFIG)
    extended = after.state_dict()
    for name in (hf.EMBEDDING, hf.HEAD):
        assert torch.equal(extended[name][:VOCABULARY], weights[name])
        torch.testing.assert_close(extended[name][VOCABULARY:], weights[name].mean(0).expand(3, -1))
    tokens_BL = torch.arange(6)[None]
    arguments = (tokens_BL, tokens_BL, torch.zeros_like(tokens_BL))
    torch.testing.assert_close(after(*arguments)[..., :VOCABULARY], before(*arguments))


def test_weights_that_do_not_fit_are_not_written(tmp_path, directory):
    weights = weights_of(CONFIG)
    del weights["model.norm.weight"]
    weights["extra"] = torch.zeros(1)
    before = (directory / "model.safetensors").read_bytes()
    with pytest.raises(HuggingFaceError, match=r"(?s)model\.norm\.weight: missing.*extra: unexpected"):
        hf_weights.write(directory, CONFIG, weights, Words())
    assert (directory / "model.safetensors").read_bytes() == before
    few = {n: t[:9] if n in (hf.EMBEDDING, hf.HEAD) else t for n, t in weights_of(CONFIG).items()}
    with pytest.raises(HuggingFaceError, match=f"the tokenizer has {VOCABULARY} tokens, the embedding 9 rows"):
        hf_weights.write(tmp_path / "few", CONFIG, few, Words())


def test_features_that_no_architecture_has_together_are_refused(tmp_path):
    config = replace(CONFIG, qk_norm=True, mlp_bias=True)
    with pytest.raises(HuggingFaceError, match="No Hugging Face architecture has these together: qk_norm=True"):
        hf_weights.write(tmp_path, config, weights_of(config), Words())
    config = replace(CONFIG, qk_norm=True, moe=replace(EXPERTS, selection_bias=True))
    with pytest.raises(
        HuggingFaceError, match=r"moe\.scoring=softmax.*moe\.selection_bias=True.*dots\.llm1 has qk_norm"
    ):
        hf_weights.write(tmp_path, config, weights_of(config), Words())
    assert not list(tmp_path.iterdir())


def test_a_model_is_found_in_an_artifact_or_named_as_absent(directory):
    assert hf.model_directory(directory) == directory
    assert hf.model_directory(directory.parent) == directory
    (directory.parent / "other").mkdir()
    with pytest.raises(HuggingFaceError, match=r"no config\.json \(it holds nothing\)"):
        hf.model_directory(directory.parent / "other")
    with pytest.raises(HuggingFaceError, match="there is no such directory"):
        hf.model_directory(directory.parent / "absent")
