"""Megatron-Core's GPTModel, built from the configuration of a Llama-family decoder.

Linear layers, embeddings, the pipeline's stages and the blocks around them are Megatron's. Norms, attention and rotary
angles are put into its layer specification from here: norms that sequence parallelism knows, the run's own attention
kernel under the documents' mask, and angles from each token's position in its document.

Shape suffixes: B sequences, L tokens (of this context-parallel rank), H query heads, K key/value heads, D features of a
head, E = D/2 rotated pairs, V vocabulary rows of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from conf.errors import Problem
from parallel.layout import Layout
from parallel.view import IGNORED


def dropout_problems(architecture: Any) -> list[Problem]:
    """What this run's own share of the architecture must not have, wherever the rest comes from."""
    if architecture.dropout == 0:
        return []
    fix = "engine=megatron draws dropout by rank, so that it would depend on the layout; use 0, or engine=native"
    return [Problem("model.dropout", architecture.dropout, fix)]


def model_problems(architecture: Any, layout: Layout) -> list[Problem]:
    """What of a decoder Megatron's GPTModel does not have, or cannot share so.

    Args:
        architecture: a DecoderConfig, or what has its fields.
        layout: sizes of the mesh axes.
    """
    if min(layout.pp, layout.tp, layout.virtual_stages) < 1:
        return []  # the layout says so itself, and what follows divides by them
    found = []
    if (experts := getattr(getattr(architecture, "moe", None), "experts", 0)) > 0:
        found.append(
            Problem("model.moe.experts", experts, "engine=megatron has dense decoders only; use engine=native")
        )
    found += dropout_problems(architecture)
    if architecture.output_bias != architecture.mlp_bias or (architecture.mlp_bias and not architecture.qkv_bias):
        fix = (
            "engine=megatron has biases on query, key and value projections only (Qwen2), on all of attention and "
            "feed-forward, or none; use engine=native"
        )
        key, value = ("mlp_bias", True) if architecture.mlp_bias else ("output_bias", True)
        found.append(Problem(f"model.{key}", value, fix))
    for key in ("heads", "kv_heads", "intermediate"):
        value = getattr(architecture, key)
        if value % layout.tp:
            nearest = multiples_near(value, layout.tp)
            fix = f"must be a multiple of parallel.tp={layout.tp} for engine=megatron; nearest: {nearest}"
            found.append(Problem(f"model.{key}", value, fix))
    chunks = layout.pp * layout.virtual_stages
    if architecture.layers < chunks:
        fix = f"engine=megatron needs at least one for each of the {chunks} parts of the pipeline (pp x virtual_stages)"
        found.append(Problem("model.layers", architecture.layers, fix))
    return found


def multiples_near(value: int, of: int) -> str:
    """The nearest multiples, as they are named to the user."""
    return " or ".join(map(str, sorted({max(of, value // of * of), -(-value // of) * of})))


def join_groups(layout: Layout) -> None:
    """Megatron's process groups, which are its module's globals: those of the run that started last.

    Ranks are in the order of `parallel.mesh`. Groups that fit are kept, so that engines of one layout share them.
    """
    from megatron.core import parallel_state, tensor_parallel

    global _joined
    wanted = (dist.group.WORLD, layout.pp, layout.cp, layout.tp, layout.virtual_stages)
    if _joined != wanted:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
            context_parallel_size=layout.cp,
            create_gloo_process_groups=False,
        )
        _joined = wanted
    tensor_parallel.model_parallel_cuda_manual_seed(0)  # Megatron asks for its generators even where nothing is drawn


_joined: tuple[Any, ...] = ()


class Sight:
    """What the modules are told of each micro-batch beside its tokens.

    Megatron hands a mask from module to module as it is, and keeps it for recomputation, but it must be a tensor: it is
    given the number of the micro-batch, under which is found what its tokens see.

    Args:
        model: our decoder: its `visibility` and its blocks' `attend` are used, and its configuration's `rope`.

    Attributes:
        positions_BL: of the micro-batch whose forward pass is next.
        visible: of each micro-batch of the step, by number.
    """

    def __init__(self, model: Any):
        self.architecture = model.config
        self.visibility = model.visibility
        self.attend = model.blocks[0].self_attn.attend
        self.positions_BL: Tensor | None = None
        self.visible: dict[int, Any] = {}

    def see(self, number: int, positions_BL: Tensor, documents_BL: Tensor, **context: Any) -> Tensor:
        """The mask to give to Megatron; `context` are further arguments of the decoder's `visibility`."""
        self.positions_BL = positions_BL
        self.visible[number] = self.visibility(documents_BL, backend=self.architecture.attention, **context)
        return torch.tensor(number)  # on the CPU: reading it waits for nobody

    def angles(self) -> Tensor:
        """angle_LB1D: each pair's angle, for both of its features."""
        assert self.positions_BL is not None, "see first"
        frequency_E = self.architecture.rope.frequencies(self.architecture.head_dim, self.positions_BL.device)
        angle_LB1E = self.positions_BL.t()[:, :, None, None].float() * frequency_E
        return torch.cat([angle_LB1E, angle_LB1E], dim=-1)


def build_chunks(
    sight: Sight, vocabulary: int, layout: Layout, compute: torch.dtype, transformer_engine: bool
) -> list[nn.Module]:
    """This rank's GPTModels, uninitialised, one for each of its pipeline chunks.

    Args:
        sight: what they will be told.
        vocabulary: number of token ids; rows are added until tensor-parallel ranks have the same number.
        layout: sizes of the mesh axes.
        compute: dtype of parameters and activations.
        transformer_engine: the blocks' linear layers are TransformerEngine's.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

    architecture = sight.architecture
    config = _transformer_config(architecture, layout, compute)
    layer = _layer(sight, transformer_engine)
    chunks = []
    for number in range(layout.virtual_stages):
        vp_stage = number if layout.virtual_stages > 1 else None
        layers = get_num_layers_to_build(config, vp_stage)
        chunk = GPTModel(
            config,
            TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm),
            vocab_size=-(-vocabulary // layout.tp) * layout.tp,
            max_sequence_length=architecture.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        chunk.rotary_pos_emb = Rotary(sight)
        chunks.append(chunk)
    return chunks


def _transformer_config(architecture: Any, layout: Layout, compute: torch.dtype) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    virtual = layout.virtual_stages > 1
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        ffn_hidden_size=architecture.intermediate,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=architecture.mlp_bias,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=compute,
        pipeline_dtype=compute,
        bf16=compute == torch.bfloat16,
        perform_initialization=False,
        calculate_per_token_loss=True,  # gradients of sums, never means: the engine divides, once
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        context_parallel_size=layout.cp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if virtual else None,
        pipeline_model_parallel_layout=_stages(architecture.layers, layout) if layout.pp > 1 else None,
        # With the defaults, an interleaved schedule trains on wrong data without a word.
        overlap_p2p_comm=virtual,
        batch_p2p_comm=not virtual,
        gradient_accumulation_fusion=False,  # these four need Apex's or TransformerEngine's kernels
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        bias_dropout_fusion=False,
        **_recompute(layout.recompute, architecture.layers // (layout.pp * layout.virtual_stages)),
    )


def _stages(layers: int, layout: Layout) -> list[list[str]]:
    """What each part of the pipeline holds; the first parts have a layer more where they do not all have as many."""
    parts = layout.pp * layout.virtual_stages
    stages = [["decoder"] * (layers // parts + (part < layers % parts)) for part in range(parts)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def _recompute(recompute: str, layers: int) -> dict[str, Any]:
    if recompute == "none":
        return {}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    share = max(1, round(float(recompute) * layers))
    return {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": share}


def _layer(sight: Sight, transformer_engine: bool) -> Any:
    """What one block is made of."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear as Column
        from megatron.core.extensions.transformer_engine import TERowParallelLinear as Row
    else:
        from megatron.core.tensor_parallel.layers import ColumnParallelLinear as Column
        from megatron.core.tensor_parallel.layers import RowParallelLinear as Row
    head_norm = Norm if sight.architecture.qk_norm else IdentityOp
    attention = SelfAttentionSubmodules(
        linear_qkv=Column,
        core_attention=ModuleSpec(module=Attention, params={"sight": sight}),
        linear_proj=Row,
        q_layernorm=head_norm,
        k_layernorm=head_norm,
    )
    feed_forward = MLPSubmodules(linear_fc1=Column, linear_fc2=Row)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.arbitrary}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=feed_forward),
            mlp_bda=get_bias_dropout_add,
        ),
    )


class Norm(nn.Module):
    """RMSNorm. Under sequence parallelism each rank sees a part of the tokens, and Megatron adds up the gradients of
    weights that say so. Arguments are Megatron's."""

    def __init__(self, config: Any, hidden_size: int, eps: float, **unused: Any):
        super().__init__()
        device = torch.cuda.current_device()
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype, device=device))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.eps = eps

    def forward(self, x_N: Tensor) -> Tensor:
        return F.rms_norm(x_N, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """The kernel of our decoder's attention; arguments are Megatron's."""

    def __init__(self, sight: Sight, **unused: Any):
        super().__init__()
        self.sight = sight

    def forward(self, q_LBHD: Tensor, k_LBKD: Tensor, v_LBKD: Tensor, number: Tensor, **unused: Any) -> Tensor:
        """out_LBN, N = HD; `number` is the micro-batch's."""
        q_BLHD, k_BLKD, v_BLKD = (x.transpose(0, 1) for x in (q_LBHD, k_LBKD, v_LBKD))
        out_BLHD = self.sight.attend(q_BLHD, k_BLKD, v_BLKD, self.sight.visible[int(number)])
        return out_BLHD.transpose(0, 1).flatten(2)


class Rotary(nn.Module):
    """Angles of the micro-batch that is seen; stands in for Megatron's own, which counts from 0."""

    def __init__(self, sight: Sight):
        super().__init__()
        self.sight = sight

    def get_rotary_seq_len(self, *unused: Any) -> int:
        """Megatron asks; the positions say."""
        return 0

    def forward(self, *unused: Any, **also_unused: Any) -> Tensor:
        """angle_LB1D."""
        return self.sight.angles()


def label_logprobs(logits_BLV: Tensor, labels_BL: Tensor, rows: int) -> Tensor:
    """logprobs_BL in nats, fp32; 0 where the label is -100. Each rank has the logits of its rows of the vocabulary.

    Args:
        logits_BLV: overwritten.
        labels_BL: int64 token ids, or -100.
        rows: how many of this rank's rows stand for a token.
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits_BLV[..., rows:] = -torch.inf
    logprobs_BL = -vocab_parallel_cross_entropy(logits_BLV, labels_BL.clamp(min=0))
    return logprobs_BL.masked_fill(labels_BL == IGNORED, 0.0)
