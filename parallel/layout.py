"""Where a run's tensors live: the sizes of the mesh axes and the ZeRO stage.

World size = pp x dp_replicate x dp_shard x cp x tp; ep divides the data-parallel ranks.
"""

from dataclasses import dataclass

from conf.errors import Problem

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "looped_bfs", "interleaved_zero_bubble", "zbv", "dual_pipe_v")
"""Pipeline schedules, by the names that torch.distributed.pipelining's classes have in snake case."""

V_SCHEDULES = ("zbv", "dual_pipe_v")
"""Schedules whose ranks have one stage on the way down and one on the way back."""

DEFERRING_SCHEDULES = ("interleaved_zero_bubble", "zbv", "dual_pipe_v")
"""Schedules that compute gradients of weights later than those of inputs."""

ROUND_SCHEDULES = ("interleaved_1f1b", "interleaved_zero_bubble")
"""Schedules that go in rounds of at least pp micro-batches, all of one length."""

COUNTS = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "virtual_stages", "micro_batches")
RECOMPUTE = ("none", "full", "selective")
OFFLOAD = ("none", "optimizer", "parameters")


@dataclass(frozen=True)
class Sizes:
    """What a layout divides of a model.

    Args:
        layers: blocks.
        hidden: width of the residual stream, in features.
        heads: query heads.
        kv_heads: key/value heads.
        experts: routed experts of a layer; 0 is a dense model.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    experts: int = 0


@dataclass(frozen=True)
class Layout:
    """Sizes of the mesh axes. Every layout trains the same run.

    Args:
        pp: pipeline stages (ranks along the model's depth).
        dp_replicate: data-parallel replicas that hold full copies of the shards (HSDP's outer axis).
        dp_shard: data-parallel ranks that share one copy of the training state.
        cp: context-parallel ranks that share each sequence.
        tp: tensor-parallel ranks that share each matrix.
        ep: expert-parallel ranks.
        zero: what the dp_shard ranks share (Rajbhandari et al. 2019, arXiv:1910.02054): 0 nothing, 1 optimizer state,
            2 also gradients, 3 also parameters.
        schedule: pipeline schedule.
        virtual_stages: model chunks per pipeline rank.
        micro_batches: micro-batches per data-parallel rank and step (gradient accumulation).
        recompute: activations that are computed again in the backward pass instead of being kept: "none", "full" (all
            but each block's input), "selective" (all but the results of matrix products and attention), or a share in
            (0, 1) of the blocks, which are then recomputed fully.
        offload: what waits in host memory between its uses: "none", "optimizer" or "parameters" (with the optimizer).
        ring: context-parallel ranks pass keys and values around instead of gathering them.
        async_tp: overlap tensor-parallel collectives with matrix products (CUDA, with stage.compile).
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    zero: int = 0
    schedule: str = "1f1b"
    virtual_stages: int = 1
    micro_batches: int = 1
    recompute: str = "none"
    offload: str = "none"
    ring: bool = False
    async_tp: bool = False

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Data-parallel ranks: each sees its own part of the global batch."""
        return self.dp_replicate * self.dp_shard

    @property
    def sequence_multiple(self) -> int:
        """Tokens of a sequence are a multiple of this; the engine pads. (Two pieces a context-parallel rank.)"""
        return self.tp * (2 * self.cp if self.cp > 1 else 1)

    def problems(
        self, world_size: int, global_batch: int, model: Sizes | None = None, *, compile: bool = False
    ) -> list[Problem]:
        """All reasons why this layout cannot run.

        Args:
            world_size: processes.
            global_batch: sequences of a step.
            model: what is to be trained, where that is known yet.
            compile: whether blocks are compiled.
        """
        found = self._value_problems()
        if any(getattr(self, key) < 1 for key in COUNTS):
            return found  # what follows divides by them
        if self.zero and self.dp > 1 and self.dp_shard * self.cp == 1:
            fix = f"shares state among dp_shard=1 ranks, so nothing: use dp_shard={self.dp} dp_replicate=1, or zero=0"
            found.append(Problem("parallel.zero", self.zero, fix))
        found += self._pipeline_problems(compile)
        found += self._switch_problems(compile)
        found += self._expert_problems()
        if model is not None:
            found += self.model_problems(model)
        return found + self._size_problems(world_size) + self._batch_problems(global_batch)

    def model_problems(self, model: Sizes) -> list[Problem]:
        """All reasons why this layout cannot divide a model."""
        if min(model.layers, model.hidden, model.heads, model.kv_heads) < 1:
            return []  # the model says so itself
        found = []
        if reasons := _broken_rules(model, self.tp):
            works = [tp for tp in range(1, model.heads + 1) if not _broken_rules(model, tp)]
            fix = f"must divide {'; and '.join(reasons)}; use {_or(_nearest(self.tp, works, 4))}"
            found.append(Problem("parallel.tp", self.tp, fix))
        stages = self.pp * self.virtual_stages
        if stages > model.layers:
            fix = f"makes {stages} stages (pp x virtual_stages), each of which needs one of {model.layers} layers; use "
            fix += f"at most {model.layers} stages"
            found.append(Problem("parallel.pp", self.pp, fix))
        if not self._shares_features(model.hidden, self.dp_shard):
            works = [n for n in range(1, model.hidden + 1) if self._shares_features(model.hidden, n)]
            near = _nearest(self.dp_shard, works, 3)
            fix = (
                "with tp or ep above 1 FSDP2 shares weights among dp_shard x cp ranks by their "
                f"{model.hidden} features, evenly only; use {' or '.join([*map(str, near), 'zero=0'])}"
            )
            found.append(Problem("parallel.dp_shard", self.dp_shard, fix))
        if self.ep > 1 and model.experts == 0:
            found.append(Problem("parallel.ep", self.ep, "the model has no experts to share; use 1"))
        elif self.ep > 1 and model.experts % self.ep:
            fix = (
                f"must divide the {model.experts} experts of a layer; use {_or(_divisors_near(model.experts, self.ep))}"
            )
            found.append(Problem("parallel.ep", self.ep, fix))
        return found

    def _shares_features(self, hidden: int, dp_shard: int) -> bool:
        """Whether the ranks that share state can do so along the one dim that other axes leave to them."""
        shards = dp_shard * self.cp if self.zero else 1
        if self.tp > 1:
            return hidden % shards == 0
        return self.ep == 1 or shards % self.ep > 0 or hidden % (shards // self.ep) == 0

    def _value_problems(self) -> list[Problem]:
        """Each key by itself."""
        found = [
            Problem(f"parallel.{key}", getattr(self, key), "must be at least 1")
            for key in COUNTS
            if getattr(self, key) < 1
        ]
        if self.zero not in (0, 1, 2, 3):
            found.append(Problem("parallel.zero", self.zero, "one of 0, 1, 2, 3"))
        if self.schedule not in SCHEDULES:
            found.append(Problem("parallel.schedule", self.schedule, f"one of {', '.join(SCHEDULES)}"))
        if self.recompute not in RECOMPUTE and not _is_share(self.recompute):
            fix = f"one of {', '.join(RECOMPUTE)}, or the share of blocks to recompute, between 0 and 1, as in 0.5"
            found.append(Problem("parallel.recompute", self.recompute, fix))
        if self.recompute == "selective" and self.ep > 1:
            fix = (
                "torch's selective checkpointing does not bear that FSDP2 gathers experts inside a block, as it does "
                "with ep > 1; use full, a share of the blocks such as 0.5, or none"
            )
            found.append(Problem("parallel.recompute", self.recompute, fix))
        if self.offload not in OFFLOAD:
            found.append(Problem("parallel.offload", self.offload, f"one of {', '.join(OFFLOAD)}"))
        return found

    def _pipeline_problems(self, compile: bool) -> list[Problem]:
        """Schedule, stages and micro-batches against each other."""
        if self.pp == 1:
            if self.virtual_stages == 1:
                return []
            return [Problem("parallel.virtual_stages", self.virtual_stages, "needs pp > 1; with pp=1 it must be 1")]
        if self.schedule not in SCHEDULES:
            return []
        found = []
        single, v_shaped = self.schedule in ("gpipe", "1f1b"), self.schedule in V_SCHEDULES
        if single and self.virtual_stages > 1:
            fix = f"schedule={self.schedule} has one stage a rank; use 1, or schedule=interleaved_1f1b"
            found.append(Problem("parallel.virtual_stages", self.virtual_stages, fix))
        elif v_shaped and self.virtual_stages != 2:
            fix = f"schedule={self.schedule} has two stages a rank, there and back; use 2"
            found.append(Problem("parallel.virtual_stages", self.virtual_stages, fix))
        elif not single and not v_shaped and self.virtual_stages < 2:
            fix = f"schedule={self.schedule} interleaves the stages of a rank; use 2 or more, or schedule=1f1b"
            found.append(Problem("parallel.virtual_stages", self.virtual_stages, fix))
        if self.schedule == "dual_pipe_v" and self.micro_batches < 2 * self.pp:
            fix = f"schedule=dual_pipe_v fills both ways first: use at least {2 * self.pp} = 2 x pp"
            found.append(Problem("parallel.micro_batches", self.micro_batches, fix))
        if self.schedule in ROUND_SCHEDULES and not self._fills_rounds(self.micro_batches):
            fitting = [n for n in range(1, self.micro_batches + self.pp + 1) if self._fills_rounds(n)]
            fix = (
                f"schedule={self.schedule} goes in rounds of equally many micro-batches, at least pp={self.pp}; "
                f"use {_or(_nearest(self.micro_batches, fitting, 2))}"
            )
            found.append(Problem("parallel.micro_batches", self.micro_batches, fix))
        if compile and self.schedule in DEFERRING_SCHEDULES:
            fix = (
                f"schedule={self.schedule} takes the backward pass in two halves, which a compiled block cannot: "
                "silently wrong; use false, or schedule=interleaved_1f1b"
            )
            found.append(Problem("stage.compile", True, fix))
        return found

    def _fills_rounds(self, micro_batches: int) -> bool:
        return micro_batches % max(1, micro_batches // self.pp) == 0

    def _switch_problems(self, compile: bool) -> list[Problem]:
        found = []
        if self.ring and self.cp == 1:
            found.append(Problem("parallel.ring", True, "passes keys around context-parallel ranks; needs cp > 1"))
        if self.async_tp and self.tp == 1:
            found.append(Problem("parallel.async_tp", True, "overlaps tensor-parallel collectives; needs tp > 1"))
        if self.async_tp and not compile:
            found.append(Problem("parallel.async_tp", True, "is a pass of the compiler; needs stage.compile=true"))
        return found

    def _expert_problems(self) -> list[Problem]:
        """ep is cut out of the ranks that share state, or, where none is shared, out of all that have other data."""
        ranks = self.dp_shard * self.cp if self.zero else self.dp * self.cp
        if ranks % self.ep == 0:
            return []
        of = "dp_shard x cp" if self.zero else "dp_replicate x dp_shard x cp"
        fix = f"must divide {of} = {ranks}" + (f" with zero={self.zero}" if self.zero else "")
        return [Problem("parallel.ep", self.ep, f"{fix}; use {_or(_divisors_near(ranks, self.ep))}")]

    def _size_problems(self, world_size: int) -> list[Problem]:
        if self.world_size == world_size:
            return []
        others = self.world_size // self.dp_shard
        need = (
            f"the layout (pp x dp_replicate x dp_shard x cp x tp) needs {self.world_size} processes, {world_size} run; "
        )
        fixes = [f"start {self.world_size} processes (torchrun --nproc-per-node, srun -n)"]
        if world_size % others == 0:
            fixes.insert(0, f"parallel.dp_shard={world_size // others}")
        else:
            fixes.insert(0, f"parallel.dp_shard={world_size} with the other axes at 1")
        return [Problem("parallel.dp_shard", self.dp_shard, need + "use " + ", or ".join(fixes))]

    def _batch_problems(self, global_batch: int) -> list[Problem]:
        if global_batch < 1:
            return [Problem("stage.global_batch", global_batch, "must be at least 1")]
        parts = self.dp * self.micro_batches
        if global_batch % parts == 0:
            return []
        nearest = sorted({max(parts, global_batch // parts * parts), -(-global_batch // parts) * parts})
        fix = (
            f"must be a multiple of {parts} = {self.dp} data-parallel ranks x {self.micro_batches} micro-batches; "
            f"nearest: {_or(nearest)}"
        )
        if global_batch % self.dp == 0:
            share = global_batch // self.dp
            fix += f"; or parallel.micro_batches={_or(_divisors_near(share, self.micro_batches))}"
        return [Problem("stage.global_batch", global_batch, fix)]


def _broken_rules(model: Sizes, tp: int) -> list[str]:
    """What tp must divide, and does not. Widths and vocabularies may divide unevenly."""
    shared = model.kv_heads % tp == 0 or tp % model.kv_heads == 0
    rules = {
        f"the model's {model.heads} query heads": model.heads % tp == 0,
        f"its {model.kv_heads} key/value heads, or be a multiple of them": shared,
    }
    return [rule for rule, holds in rules.items() if not holds]


def _is_share(value: str) -> bool:
    try:
        return 0 < float(value) < 1
    except ValueError:
        return False


def _nearest(wanted: int, fitting: list[int], count: int) -> list[int]:
    return sorted(sorted(fitting, key=lambda n: abs(n - wanted))[:count])


def _divisors_near(of: int, wanted: int) -> list[int]:
    return _nearest(wanted, [n for n in range(1, of + 1) if of % n == 0], 3)


def _or(values: list[int]) -> str:
    return " or ".join(map(str, values))
