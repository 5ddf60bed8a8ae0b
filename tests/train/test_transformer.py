"""The decoder: who sees whom, initialisation, dropout, presets."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from parallel import context
from tests.ranks import run_ranks
from train.models import attention, blocked
from train.models.attention import AttentionError, visibility
from train.models.dropout import dropout, random_bits
from train.models.moe import MoE
from train.models.rope import Rope
from train.models.transformer import Decoder, DecoderConfig, initialise

VOCABULARY = 61
CONFIG = DecoderConfig(layers=2, hidden=32, intermediate=48, heads=4, kv_heads=2, head_dim=8)
PRESETS = sorted(Path("conf/model").glob("*.yaml"))


def built(config: DecoderConfig = CONFIG, seed: int = 0, scale: float = 8.0) -> Decoder:
    """Weights large enough that what a token sees changes what it says."""
    model = config.build(VOCABULARY)
    initialise(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def packed(lengths: list[int], length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sequence of documents with these lengths, then padding."""
    documents, positions = [], []
    for number, n in enumerate(lengths):
        documents += [number] * n
        positions += range(n)
    padding = length - len(documents)
    documents_BL = torch.tensor([documents + [-1] * padding])
    return tokens(1, length, seed=seed), torch.tensor([positions + [0] * padding]), documents_BL


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@torch.no_grad()
def test_a_document_in_a_packed_row_is_the_document_alone(causal, backend):
    model = built(replace(CONFIG, attention=backend))
    tokens_BL, positions_BL, documents_BL = packed([5, 1, 9], 18)
    whole_BLV = model(tokens_BL, positions_BL, documents_BL, causal=causal)
    for start, end in ((0, 5), (5, 6), (6, 15)):
        part = slice(start, end)
        alone_BLV = model(
            tokens_BL[:, part], positions_BL[:, part], torch.zeros_like(tokens_BL[:, part]), causal=causal
        )
        torch.testing.assert_close(whole_BLV[:, part], alone_BLV, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_alone_gives_no_nan(causal):
    model = built()
    tokens_BL = tokens(2, 6)
    documents_BL = torch.tensor([[-1] * 6, [-1, -1, 0, 0, 1, -1]])
    labels_BL = torch.full_like(tokens_BL, -100)
    labels_BL[1, 3] = 4
    logprobs_BL = model(tokens_BL, torch.zeros_like(tokens_BL), documents_BL, labels_BL, causal=causal)
    logprobs_BL.sum().backward()
    assert logprobs_BL.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("documents", "causal", "cheap"),
    [
        ([0, 0, 0, 0], True, True),
        ([3, 3, -1, -1], True, True),
        ([0, 0, 1, 1], True, False),
        ([-1, -1, 0, 0], True, False),
        ([0, -1, 0, 0], True, False),
        ([0, 0, 0, 0], False, True),
        ([0, 0, 0, -1], False, False),
    ],
)
def test_a_mask_is_made_only_where_the_triangle_is_not_enough(documents, causal, cheap):
    documents_BL = torch.tensor([documents])
    visible = visibility(documents_BL, causal=causal)
    assert (visible.restriction is None) == cheap

    model = built()
    tokens_BL, positions_BL = tokens(1, 4), torch.arange(4)[None]
    exact_BLL = documents_BL[:, :, None] == documents_BL[:, None]
    exact = attention.Visibility(causal, exact_BLL.tril() if causal else exact_BLL)
    chosen_BLV = model(tokens_BL, positions_BL, documents_BL, causal=causal)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "visibility", lambda *_, **__: exact)
        expected_BLV = model(tokens_BL, positions_BL, documents_BL, causal=causal)
    real = documents_BL >= 0
    torch.testing.assert_close(chosen_BLV[real], expected_BLV[real], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("backend", "dtype"), [("sdpa", torch.float32), ("sdpa", torch.bfloat16), ("flex", torch.float32)]
)
@torch.no_grad()
def test_some_of_the_queries_see_what_they_see_among_all(monkeypatch, backend, dtype, causal):
    monkeypatch.setattr(blocked, "QUERIES", 4)
    documents_BL = torch.tensor([[0] * 5 + [1] * 11 + [-1] * 4, [0] * 20])
    index_L = torch.tensor([4, 5, 6, 7, 0, 12, 19])
    generator = torch.Generator().manual_seed(0)
    q_BLHD, k_BSKD, v_BSKD = (torch.randn(2, 20, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2))
    whole = visibility(documents_BL, causal=causal, backend=backend)
    some = visibility(
        documents_BL[:, index_L], causal=causal, backend=backend, key_documents_BS=documents_BL, index_L=index_L
    )
    whole_BLHD = attention.attention(q_BLHD, k_BSKD, v_BSKD, whole)
    some_BLHD = attention.attention(q_BLHD[:, index_L], k_BSKD, v_BSKD, some)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    real_BL = documents_BL[:, index_L] >= 0  # padding may see anything where the triangle hides all that it must
    torch.testing.assert_close(some_BLHD[real_BL], whole_BLHD[:, index_L][real_BL], rtol=0, atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_a_later_token_is_seen_only_where_attention_is_bidirectional(causal):
    model = built()
    before_BL = tokens(1, 8)
    after_BL = before_BL.clone()
    after_BL[0, -1] = (after_BL[0, -1] + 1) % VOCABULARY
    positions_BL, documents_BL = torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.int64)
    before_BLV, after_BLV = (model(t, positions_BL, documents_BL, causal=causal) for t in (before_BL, after_BL))
    assert torch.equal(before_BLV[:, :-1], after_BLV[:, :-1]) == causal


def test_flash_attention_that_is_absent_is_refused_by_name():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(AttentionError, match=r"attention=flash needs a CUDA device.*attention=auto"):
        visibility(torch.zeros(1, 4, dtype=torch.int64), causal=True, backend="flash")


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_of_some_queries_leave_out_nothing_that_is_seen(causal):
    documents_BS = torch.tensor([[0] * 300 + [1] * 400 + [2] * 324 + [-1] * 176, [5] * 1200])
    index_L = context.indices(1200, 2, 0)
    documents_BL = documents_BS[:, index_L]
    mask_BLS = documents_BL[:, :, None] == documents_BS[:, None]
    if causal:
        mask_BLS &= index_L[:, None] >= torch.arange(1200)
    some_BQK, all_BQK = attention._seen_blocks(documents_BL, documents_BS, index_L, causal)
    seen = 0
    for q, rows in enumerate(mask_BLS.split(128, dim=1)):
        for k, block_Bqk in enumerate(rows.split(128, dim=2)):
            assert (block_Bqk.flatten(1).any(-1) <= some_BQK[:, q, k]).all()
            assert (all_BQK[:, q, k] <= block_Bqk.flatten(1).all(-1)).all()
            seen += int(all_BQK[:, q, k].sum())
    assert seen > 0
    assert some_BQK.float().mean() < (0.7 if causal else 1.0)

    with torch.no_grad():
        visible = visibility(
            documents_BL, causal=causal, backend="flex", key_documents_BS=documents_BS, index_L=index_L
        )
    dense_BQK = visible.restriction.to_dense()[:, 0].bool()
    assert torch.equal(dense_BQK, some_BQK)


def test_flash_attention_of_some_queries_is_refused_by_name():
    documents_BL = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(AttentionError, match=r"attention=flash needs.*attention=auto"):
        visibility(
            documents_BL[:, :2], causal=True, backend="flash", key_documents_BS=documents_BL, index_L=torch.arange(2)
        )


def test_flex_attention_without_a_backward_pass_is_refused_by_name():
    with pytest.raises(AttentionError, match="no backward pass on CPU"):
        visibility(torch.zeros(1, 4, dtype=torch.int64), causal=True, backend="flex")


def test_segments_cut_where_document_or_sequence_changes():
    segments = attention._segments(torch.tensor([[0, 0, 1, 1, 1], [1, 1, 0, -1, -1]]))
    assert segments.offsets.tolist() == [0, 2, 5, 7, 8, 10]
    assert segments.longest == 3


def test_a_meta_model_materialises_to_the_same_weights():
    direct = CONFIG.build(VOCABULARY)
    initialise(direct, 7)
    with torch.device("meta"):
        late = CONFIG.build(VOCABULARY)
    late.to_empty(device="cpu")
    initialise(late, 7)
    assert all(torch.equal(a, b) for a, b in zip(direct.parameters(), late.parameters(), strict=True))
    tokens_BL = tokens(1, 5)
    arguments = (tokens_BL, torch.arange(5)[None], torch.zeros_like(tokens_BL))
    assert torch.equal(direct(*arguments), late(*arguments))  # nothing but parameters was lost on meta


def test_weights_depend_on_name_and_seed_only():
    deep, shallow, other = (
        built(replace(CONFIG, layers=layers), seed, scale=1.0) for layers, seed in ((4, 0), (2, 0), (2, 1))
    )
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(deep.get_parameter(name), shallow.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(shallow.get_parameter(name), shallow.get_parameter("model.layers.0.self_attn.q_proj.weight"))


def test_standard_deviations_are_those_of_the_docstring():
    config = DecoderConfig(layers=8, hidden=256, intermediate=512, heads=4, kv_heads=4, head_dim=64, qkv_bias=True)
    model = config.build(512)
    initialise(model, 0)
    for name, parameter in model.named_parameters():
        residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02 / 4 if residual else 0.02, rel=0.02)
            assert abs(parameter.mean().item()) < 5e-4


def _sharded_differences(size: int) -> list[str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from parallel import distributed

    distributed.start()

    whole = CONFIG.build(VOCABULARY)
    initialise(whole, 3)
    with torch.device("meta"):
        sharded = CONFIG.build(VOCABULARY)
    mesh = init_device_mesh("cpu", (size,))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    sharded.to_empty(device="cpu")
    initialise(sharded, 3)
    weights = dict(whole.named_parameters())
    return [n for n, p in sharded.named_parameters() if not torch.equal(p.full_tensor(), weights[n])]


def test_sharding_does_not_change_the_initial_weights():
    assert run_ranks(2, _sharded_differences, 2) == [[], []]


def test_dropout_follows_the_key_and_nothing_else():
    x_BLN = torch.ones(3, 50, 40)
    keys_B = torch.tensor([5, 6, 7])
    state = torch.get_rng_state()
    dropped_BLN = dropout(x_BLN, 0.25, keys_B, site=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(dropped_BLN[1:2], dropout(x_BLN[:1], 0.25, keys_B[1:2], site=0))
    assert not torch.equal(dropped_BLN, dropout(x_BLN, 0.25, keys_B, site=1))
    assert (dropped_BLN == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert dropped_BLN.mean().item() == pytest.approx(1.0, abs=0.03)
    assert dropout(x_BLN, 0.25, None, site=0) is x_BLN


def test_a_slice_of_a_sequence_drops_what_the_whole_would():
    x_BLN, keys_B = torch.randn(2, 12, 40), torch.tensor([5, 6])
    whole_BLN = dropout(x_BLN, 0.25, keys_B, site=1)
    for index_L in (torch.arange(12), torch.tensor([0, 1, 2, 9, 10, 11]), torch.tensor([7])):
        assert torch.equal(whole_BLN[:, index_L], dropout(x_BLN[:, index_L], 0.25, keys_B, site=1, index_L=index_L))


def test_bits_of_neighbouring_keys_features_and_sites_are_independent():
    bits = random_bits(torch.arange(64), 0, (64, 64)) < 0
    signs = bits.double() * 2 - 1
    for other in (
        signs.roll(1, 0),
        signs.roll(1, 1),
        signs.roll(1, 2),
        (random_bits(torch.arange(64), 1, (64, 64)) < 0).double() * 2 - 1,
    ):
        assert abs((signs * other).mean().item()) < 5 / signs.numel() ** 0.5


def test_every_layer_drops_other_features():
    model = built(replace(CONFIG, dropout=0.5))
    masks = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, arguments: masks.append(arguments[2]))
    tokens_BL = tokens(2, 6)
    model(tokens_BL, torch.arange(6).expand(2, 6), torch.zeros_like(tokens_BL), dropout_keys_B=torch.tensor([1, 2]))
    assert len({int(key) for keys_B in masks for key in keys_B}) == 4


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied": False}, {"moe": MoE(experts=5, active=2, intermediate=24, shared=16, shared_gate=True, first=1)}],
    ids=["tied", "untied", "experts"],
)
def test_counted_operations_are_those_of_the_formula(changes):
    config = replace(CONFIG, attention="sdpa", **changes)
    model, length = built(config), 16
    tokens_BL = tokens(2, length)
    with FlopCounterMode(display=False) as counter:
        logprobs_BL = model(tokens_BL, torch.arange(length).expand(2, -1), torch.zeros_like(tokens_BL), tokens_BL)
        logprobs_BL.sum().backward()
    counts = {str(operator): flops for operator, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(flops for operator, flops in counts.items() if operator in ("aten.mm", "aten.addmm", "aten.bmm"))
    head = 2 * length * 2 * VOCABULARY * config.hidden  # fp32 computes the head's product again in backward
    attention_flops = 6 * config.layers * length * config.heads * config.head_dim
    expected = config.flops_per_token(length, VOCABULARY) - attention_flops
    assert products - head == expected * 2 * length


def test_a_tied_head_is_one_parameter():
    names = [name for name, _ in built().named_parameters()]
    assert "lm_head.weight" not in names
    assert "lm_head.weight" in dict(built(replace(CONFIG, tied=False)).named_parameters())


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_preset_has_the_parameters_that_its_first_line_says(preset):
    told = re.match(r"# ([\d,]+) parameters with a vocabulary of (\d+)", preset.read_text())
    assert told, f"{preset} must begin with its parameter count"
    with initialize_config_module("conf", version_base="1.3"):
        config = OmegaConf.to_object(compose(f"model/{preset.stem}").model)
    assert isinstance(config, DecoderConfig)
    assert config.problems(None, 1) == []
    assert config.parameter_count(int(told[2])) == int(told[1].replace(",", ""))


def test_all_problems_of_a_shape_are_listed():
    config = DecoderConfig(
        layers=0, heads=6, kv_heads=4, head_dim=7, dropout=1.0, attention="fast", rope=Rope(scaling="yarn")
    )
    keys = {problem.key for problem in config.problems(None, 1)}
    assert keys == {"model." + k for k in ("layers", "kv_heads", "head_dim", "dropout", "attention", "rope.scaling")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)]
)  # fused code rounds less often
def test_compiled_blocks_share_one_graph_and_give_the_same_gradients(dtype, tolerance):
    plain, compiled = (built(replace(CONFIG, qk_norm=True, dropout=0.1)).to(dtype) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in compiled.blocks:
        block.compile()
    tokens_BL, positions_BL, documents_BL = packed([5, 1, 9], 18)
    for model in (plain, compiled):
        keys_B = torch.tensor([3])
        model(tokens_BL, positions_BL, documents_BL, tokens_BL, dropout_keys_B=keys_B).sum().backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= tolerance * a.grad.norm()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
