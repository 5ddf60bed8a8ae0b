"""Where a run's tensors live: the sizes of the mesh axes and the ZeRO stage.

World size = pp x dp_replicate x dp_shard x cp x tp; ep divides the data-parallel ranks.
"""

from dataclasses import dataclass

from conf.errors import Problem


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

    @property
    def world_size(self) -> int:
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def dp(self) -> int:
        """Data-parallel ranks: each sees its own part of the global batch."""
        return self.dp_replicate * self.dp_shard

    def problems(self, world_size: int, global_batch: int) -> list[Problem]:
        """All reasons why this layout cannot run on `world_size` processes with `global_batch` sequences a step."""
        raise NotImplementedError  # replaced by the engine room
