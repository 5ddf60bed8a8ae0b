"""The Llama family of decoders for one device (Touvron et al. 2023, arXiv:2302.13971; Qwen2: arXiv:2407.10671; Qwen3:
arXiv:2505.09388): pre-normalised blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward.

Modules are named so that parameters have their Hugging Face names. Nothing here knows of ranks or meshes.

Shape suffixes: B sequences, L tokens, N model width, F feed-forward width, H query heads, K key/value heads,
D features of a head, V vocabulary.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from conf.errors import Problem
from conf.registry import register
from parallel.layout import Sizes
from parallel.plan import Plan
from train.models.attention import BACKENDS, Visibility, attention, visibility
from train.models.cache import Cache, LayerCache
from train.models.dropout import dropout, keys_of_layers
from train.models.feed_forward import FeedForward
from train.models.logprobs import VocabularyShard, logprobs
from train.models.moe import MixtureOfExperts, MoE, token_weights
from train.models.norm import RMSNorm
from train.models.rope import SCALINGS, Rope, rotate
from train.models.seeds import derived_seed

if TYPE_CHECKING:
    from train.config import RunConfig


@register("model", "decoder")
@dataclass(frozen=True)
class DecoderConfig:
    """Shape of a Llama-family decoder. The vocabulary is the tokenizer's.

    Args:
        layers: number of blocks.
        hidden: width of the residual stream, in features.
        intermediate: width of the feed-forward, in features.
        heads: query heads.
        kv_heads: key/value heads; divides `heads`.
        head_dim: features of one head; even.
        rope: rotary position embedding.
        norm_eps: added to the mean square before the root in RMSNorm.
        tied: use the embedding as the output head.
        qkv_bias: query, key and value projections have a bias (Qwen2).
        output_bias: the attention's output projection has a bias.
        mlp_bias: the feed-forward's projections have a bias.
        qk_norm: normalise each query and key head before the rotation (Qwen3).
        moe: experts in place of feed-forwards; by default there are none.
        dropout: share of features dropped from the embedding and from each block's two outputs while training.
        max_positions: longest context the model is meant for, in tokens; written for those who serve it.
        attention: kernel: "auto", "sdpa", "flex" or "flash" (needs the package flash-attn).
    """

    layers: int = 4
    hidden: int = 128
    intermediate: int = 384
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    rope: Rope = field(default_factory=Rope)
    norm_eps: float = 1e-5
    tied: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    moe: MoE = field(default_factory=MoE)
    dropout: float = 0.0
    max_positions: int = 2048
    attention: str = "auto"

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        """Everything that keeps this shape from being built."""
        found = []
        for name in ("layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "max_positions"):
            if getattr(self, name) < 1:
                found.append(Problem(f"model.{name}", getattr(self, name), "must be at least 1"))
        if self.kv_heads > 0 and self.heads % self.kv_heads:
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            found.append(Problem("model.kv_heads", self.kv_heads, f"must divide heads={self.heads}: one of {divisors}"))
        if self.head_dim % 2:
            found.append(Problem("model.head_dim", self.head_dim, "must be even: rotary embedding turns pairs"))
        if not 0 <= self.dropout < 1:
            found.append(Problem("model.dropout", self.dropout, "must be in [0, 1)"))
        if self.norm_eps <= 0:
            found.append(Problem("model.norm_eps", self.norm_eps, "must be above 0, for instance 1e-5"))
        if self.attention not in BACKENDS:
            found.append(Problem("model.attention", self.attention, f"one of {', '.join(BACKENDS)}"))
        if self.rope.scaling not in SCALINGS:
            found.append(Problem("model.rope.scaling", self.rope.scaling, f"one of {', '.join(SCALINGS)}"))
        if self.attention == "flash" and config.parallel.cp > 1:
            fix = "cannot tell the keys of other context-parallel ranks apart; use auto with parallel.cp > 1"
            found.append(Problem("model.attention", self.attention, fix))
        return found + self.moe.problems(self.layers)

    @property
    def sizes(self) -> Sizes:
        """What a layout divides."""
        return Sizes(self.layers, self.hidden, self.heads, self.kv_heads, self.moe.experts)

    def build(self, vocabulary: int) -> "Decoder":
        """The model, uninitialised: call `initialise`, or load weights. May be called under torch.device("meta")."""
        return Decoder(self, vocabulary)

    def parameter_count(self, vocabulary: int) -> int:
        """All parameters, shared ones counted once."""
        with torch.device("meta"):
            return sum(p.numel() for p in self.build(vocabulary).parameters())

    def flops_per_token(self, sequence_length: int, vocabulary: int) -> float:
        """Floating-point operations of forward and backward per token, for MFU: 6 per weight of a matrix product (the
        head is one, the embedding look-up is none; of experts, those that a token is sent to), and
        6 x sequence_length x attention width per layer, counting only the causal half of the attention. Recomputation
        and norms are not counted."""
        attention_width = self.heads * self.head_dim
        projections = self.hidden * (2 * attention_width + 2 * self.kv_heads * self.head_dim)
        sparse = sum(self.moe.sparse(layer) for layer in range(self.layers))
        dense = (self.layers - sparse) * 3 * self.hidden * self.intermediate
        experts = sparse * self.moe.active_weights(self.hidden)
        matrices = self.layers * projections + dense + experts + vocabulary * self.hidden
        return 6.0 * matrices + 6.0 * self.layers * sequence_length * attention_width


@dataclass(frozen=True)
class Context:
    """What every block of a forward pass is told beside its input. The residual stream may be a slice of the sequence
    (`index_L`), what is inside attention and feed-forward is not.

    Args:
        rotation: cos_BL1E and sin_BL1E of the positions.
        visible: what each token sees.
        index_L: place in the sequence of each token of the residual stream: keys its dropout.
        token_weights_BL: weight of each token in what blocks add to the loss, 0 for padding; None outside of training.
    """

    rotation: tuple[Tensor, Tensor]
    visible: Visibility
    index_L: Tensor
    token_weights_BL: Tensor | None = None


class Attention(nn.Module):
    """Attributes:
    attend: the kernel; context parallelism puts its own here.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Visibility], Tensor]

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim = config.head_dim
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, queries, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden, keys, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden, keys, bias=config.qkv_bias)
        self.o_proj = nn.Linear(queries, config.hidden, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.attend = attention

    def forward(self, x_BLN: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        q_BLHD = self.q_proj(x_BLN).unflatten(-1, (-1, self.head_dim))
        k_BLKD = self.k_proj(x_BLN).unflatten(-1, (-1, self.head_dim))
        v_BLKD = self.v_proj(x_BLN).unflatten(-1, (-1, self.head_dim))
        q_BLHD = rotate(self.q_norm(q_BLHD), *context.rotation)
        k_BLKD = rotate(self.k_norm(k_BLKD), *context.rotation)
        if cache is not None:
            k_BLKD, v_BLKD = cache.extend(k_BLKD, v_BLKD)
        return self.o_proj(self.attend(q_BLHD, k_BLKD, v_BLKD, context.visible).flatten(2))


class Block(nn.Module):
    """One layer. It does not know which: all blocks of a kind then share one compiled graph.

    Args:
        config: of the decoder.
        sparse: whether it has experts.
    """

    def __init__(self, config: DecoderConfig, sparse: bool):
        super().__init__()
        self.dropout = config.dropout
        self.self_attn = Attention(config)
        self.mlp: nn.Module = (
            MixtureOfExperts(config.moe, config.hidden)
            if sparse
            else FeedForward(config.hidden, config.intermediate, bias=config.mlp_bias)
        )
        self.input_layernorm = RMSNorm(config.hidden, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden, config.norm_eps)

    def forward(
        self,
        x_BLN: Tensor,
        context: Context,
        dropout_keys_B: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        attended_BLN = self.self_attn(self.input_layernorm(x_BLN), context, cache)
        x_BLN = x_BLN + dropout(attended_BLN, self.dropout, dropout_keys_B, site=0, index_L=context.index_L)
        fed_BLN = self.mlp(self.post_attention_layernorm(x_BLN), context)
        return x_BLN + dropout(fed_BLN, self.dropout, dropout_keys_B, site=1, index_L=context.index_L)


class Backbone(nn.Module):
    """All but the head; there for the `model.` in Hugging Face's parameter names."""

    def __init__(self, config: DecoderConfig, vocabulary: int):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, config.hidden)
        self.layers = nn.ModuleList(Block(config, config.moe.sparse(n)) for n in range(config.layers))
        self.norm = RMSNorm(config.hidden, config.norm_eps)


class Decoder(nn.Module):
    """Tokens to log-probabilities.

    Args:
        config: the shape.
        vocabulary: number of token ids.

    Attributes:
        reads_tokens: it embeds tokens; else it is given the hidden states of the part before it.
        answers: it ends in log-probabilities; else in hidden states.
        slice_sequence: of the places in a sequence, those that the residual stream holds here.
        visibility: what attention is told of who sees whom; context parallelism that passes keys around has its own.
    """

    slice_sequence: Callable[[Tensor], Tensor]
    visibility: Callable[..., Any]

    def __init__(self, config: DecoderConfig, vocabulary: int):
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.model = Backbone(config, vocabulary)
        if not config.tied:  # a tied head is the embedding itself: one parameter, one name
            self.lm_head = nn.Linear(config.hidden, vocabulary, bias=False)
        self.reads_tokens = self.answers = True
        self.slice_sequence = _all
        self.visibility = visibility
        self.vocabulary_shard: VocabularyShard | None = None

    @property
    def blocks(self) -> nn.ModuleList:
        """The units that are sharded, compiled or recomputed one by one; None for a layer of another part."""
        return self.model.layers

    @property
    def plan(self) -> Plan:
        """How tensor- and expert-parallel ranks share it."""
        return Plan(
            regions=("model.layers.*.self_attn", "model.layers.*.mlp"),
            column=("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj"),
            grouped=("*.k_proj", "*.v_proj"),
            groups=self.config.kv_heads,
            row=("*.o_proj", "*.down_proj"),
            vocabulary=("model.embed_tokens", "lm_head"),
            gathered=("model.norm",),
            experts=("model.layers.*.mlp.experts",),
            routers=("model.layers.*.mlp.gate",),
        )

    def part(self, layers: range, *, reads_tokens: bool, answers: bool) -> "Decoder":
        """A pipeline's part of this model: copies of some of its modules, under their names.

        Args:
            layers: those it has.
            reads_tokens: it is the first part.
            answers: it is the last part. A tied embedding is in the first and in the last.
        """
        part = copy.deepcopy(self)
        part.reads_tokens, part.answers = reads_tokens, answers
        absent: list[tuple[nn.Module, str]] = [
            (part.model.layers, str(layer)) for layer in range(self.config.layers) if layer not in layers
        ]
        if not reads_tokens and not (answers and self.config.tied):
            absent.append((part.model, "embed_tokens"))
        if not answers:
            absent += [(part.model, "norm")] + ([] if self.config.tied else [(part, "lm_head")])
        for owner, name in absent:
            setattr(owner, name, None)
        return part

    def share_vocabulary(self, first: int, group: dist.ProcessGroup) -> None:
        """To be called where this rank has some rows of the embedding and the head only.

        Args:
            first: token id of the first of them.
            group: the ranks that share them.
        """
        self.vocabulary_shard = VocabularyShard(first, group)

    @property
    def head(self) -> Tensor:
        """head_VN: the output matrix, or those of its rows that are here."""
        weight = self.model.embed_tokens.weight if self.config.tied else self.lm_head.weight
        return weight.to_local() if isinstance(weight, DTensor) else weight

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def width(self) -> int:
        """Features of the hidden states that one part hands to the next."""
        return self.config.hidden

    def forward(
        self,
        inputs: Tensor,
        positions_BL: Tensor,
        documents_BL: Tensor,
        labels_BL: Tensor | None = None,
        *,
        next_only: bool = False,
        **context: Any,
    ) -> Tensor:
        """Log-probabilities of labels, or logits; hidden states where this part does not answer.

        Args:
            inputs: token ids tokens_BL, int64; or the hidden states of the part before, where it does not read tokens.
            positions_BL: position of each token in its document, int64.
            documents_BL: document of each token, int64; tokens see only their own document. Padding is -1.
            labels_BL: what each position predicts, int64; -100 where nothing is asked.
            next_only: logits of the last position only.
            context: further arguments of `hidden`.

        Returns:
            logprobs_BL in nats, fp32, 0 where the label is -100; or logits_BLV without labels; or hidden_BLN.
        """
        hidden_BLN = self.hidden(inputs, positions_BL, documents_BL, **context)
        if not self.answers:
            return hidden_BLN
        if labels_BL is None:
            logits_BLV = F.linear(hidden_BLN[:, -1:] if next_only else hidden_BLN, self.head)
            shard = self.vocabulary_shard
            return logits_BLV if shard is None else shard.whole(logits_BLV, self.vocabulary)
        return logprobs(hidden_BLN, self.head, labels_BL, self.vocabulary_shard)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Room for the keys and values of so many sequences of so many tokens."""
        return Cache(self.config.layers, batch, capacity, self.device)

    def next_logits(self, tokens_BL: Tensor, positions_BL: Tensor, documents_BL: Tensor, cache: Any) -> Tensor:
        """logits_BV of the token after the last; the tokens are added to `cache`."""
        return self(tokens_BL, positions_BL, documents_BL, next_only=True, cache=cache)[:, -1]

    def hidden(
        self,
        inputs: Tensor,
        positions_BL: Tensor,
        documents_BL: Tensor,
        *,
        causal: bool = True,
        dropout_keys_B: Tensor | None = None,
        cache: Cache | None = None,
        index_L: Tensor | None = None,
        key_documents_BS: Tensor | None = None,
        sequence_weights_B: Tensor | None = None,
    ) -> Tensor:
        """hidden_BLN: what the head multiplies, or the next part reads.

        Args:
            inputs, positions_BL, documents_BL: as in `forward`.
            causal: hide later tokens.
            dropout_keys_B: int64 key per sequence, a hash of (seed, step, sample); None drops nothing.
            cache: keys and values of the tokens before these; these are added to it.
            index_L: place of each token in its sequence, where only some of the sequence's tokens are given.
            key_documents_BS: documents of the whole sequence then.
            sequence_weights_B: share of the step's weight that each sequence stands for: scales what blocks add to the
                loss.
        """
        config = self.config
        seen_BS = key_documents_BS if cache is None else cache.see(documents_BL)
        visible = self.visibility(
            documents_BL, causal=causal, backend=config.attention, key_documents_BS=seen_BS, index_L=index_L
        )
        keys = keys_of_layers(dropout_keys_B if config.dropout else None, config.layers + 1)
        x_BLN = self.model.embed_tokens(inputs) if self.reads_tokens else inputs
        if index_L is None:
            index_L = torch.arange(positions_BL.shape[1], device=positions_BL.device)
        rotation = config.rope.rotation(positions_BL, config.head_dim, x_BLN.dtype)
        weights_BL = None
        if sequence_weights_B is not None:
            whole_BS = documents_BL if key_documents_BS is None else key_documents_BS
            weights_BL = token_weights(documents_BL, whole_BS, sequence_weights_B)
        context = Context(rotation, visible, self.slice_sequence(index_L), weights_BL)
        if self.reads_tokens:
            x_BLN = dropout(x_BLN, config.dropout, keys[-1], site=0, index_L=context.index_L)
        for layer, block in enumerate(self.blocks):
            if block is not None:
                x_BLN = block(x_BLN, context, keys[layer], None if cache is None else cache.layers[layer])
        return self.model.norm(x_BLN) if self.answers else x_BLN


def _all(index_L: Tensor) -> Tensor:
    return index_L


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Random weights that depend on the seed and each parameter's name only, not on how it is sharded.

    Matrices are normal with standard deviation 0.02; those that write into the residual stream (`o_proj`, `down_proj`)
    have 0.02 / sqrt(2 layers), so that its variance does not grow with depth (Radford et al. 2019, GPT-2, section
    2.3). Norms are 1, biases and buffers 0. A model built on the meta device must have storage first:
    `model.to_empty(device=...)`.

    Args:
        model: parameters may be DTensors; every rank draws the whole tensor and keeps its part.
        seed: of the run.
    """
    for name, parameter in model.named_parameters():
        full = torch.empty(parameter.shape, dtype=torch.float32)
        if name.endswith("norm.weight"):
            full.fill_(1.0)
        elif name.endswith(".bias"):
            full.zero_()
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj"))
            std = 0.02 / math.sqrt(2 * model.config.layers) if residual else 0.02
            full.normal_(0.0, std, generator=torch.Generator().manual_seed(derived_seed(seed, name)))
        if isinstance(parameter, DTensor):
            moved = full.to(parameter.device)
            parameter.copy_(distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None))
        else:
            parameter.copy_(full)
    for buffer in model.buffers():
        buffer.zero_()
