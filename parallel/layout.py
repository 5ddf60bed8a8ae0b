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

    def problems(self, world_size: int, global_batch: int) -> list[Problem]:
        """All reasons why this layout cannot run on `world_size` processes with `global_batch` sequences a step."""
        counts = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "virtual_stages", "micro_batches")
        found = [
            Problem(f"parallel.{key}", getattr(self, key), "must be at least 1")
            for key in counts
            if getattr(self, key) < 1
        ]
        if self.zero not in (0, 1, 2, 3):
            found.append(Problem("parallel.zero", self.zero, "one of 0, 1, 2, 3"))
        if self.schedule not in SCHEDULES:
            found.append(Problem("parallel.schedule", self.schedule, f"one of {', '.join(SCHEDULES)}"))
        if self.pp == 1 and self.virtual_stages > 1:
            found.append(
                Problem("parallel.virtual_stages", self.virtual_stages, "needs pp > 1; with pp=1 it must be 1")
            )
        if any(getattr(self, key) < 1 for key in counts):
            return found  # what follows divides by them
        if self.zero and self.dp > 1 and self.dp_shard == 1:
            fix = f"shares state among dp_shard=1 ranks, so nothing: use dp_shard={self.dp} dp_replicate=1, or zero=0"
            found.append(Problem("parallel.zero", self.zero, fix))
        return found + self._size_problems(world_size) + self._batch_problems(global_batch)

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
            f"nearest: {' or '.join(map(str, nearest))}"
        )
        if global_batch % self.dp == 0:
            share = global_batch // self.dp
            fitting = [n for n in range(1, share + 1) if share % n == 0]
            near = sorted(sorted(fitting, key=lambda n: abs(n - self.micro_batches))[:3])
            fix += f"; or parallel.micro_batches={' or '.join(map(str, near))}"
        return [Problem("stage.global_batch", global_batch, fix)]
