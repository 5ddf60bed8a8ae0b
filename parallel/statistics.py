"""What modules count during a step, added up over the ranks, and handed back to them: a module takes part that has

    statistics() -> Tensor                               # sums of this rank since the last call, in one dimension
    settle(totals, taken) -> dict[str, Tensor]           # the sums of all ranks; taken is 0 where the step was skipped

and may change its persistent buffers in `settle`. Nobody waits for the device.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.mesh import PIPELINE, Mesh


class Statistics:
    """Those modules of this rank's parts of a model.

    Args:
        models: the parts.
        mesh: its data-parallel ranks have seen other tokens, and those of its pipeline have other modules.
    """

    def __init__(self, models: Iterable[nn.Module], mesh: Mesh):
        self.modules = [module for model in models for module in model.modules() if hasattr(module, "statistics")]
        self.mesh = mesh
        self.pipeline = mesh.axes[PIPELINE].get_group()
        everywhere: list[int] = [0] * self.pipeline.size()
        dist.all_gather_object(everywhere, len(self.modules), group=self.pipeline)
        self.anywhere = any(everywhere)
        self.names: list[str] | None = None

    def forget(self) -> None:
        """Begin the step anew."""
        for module in self.modules:
            module.statistics()  # type: ignore[operator]

    def settle(self, taken: Tensor) -> dict[str, Tensor]:
        """End a step: the mean of each of the modules' figures over all modules, on every rank."""
        if not self.anywhere:
            return {}
        found: dict[str, Tensor] = {}
        if self.modules:
            parts = [module.statistics() for module in self.modules]  # type: ignore[operator]
            totals = self.mesh.over_data(torch.cat(parts)).split([len(part) for part in parts])
            for module, own in zip(self.modules, totals, strict=True):
                for name, value in module.settle(own, taken).items():  # type: ignore[operator]
                    found[name] = found.get(name, 0) + value.double()
        return self._over_stages(found, taken)

    def _over_stages(self, found: dict[str, Tensor], taken: Tensor) -> dict[str, Tensor]:
        if self.names is None:  # a stage without such modules does not know what the others tell
            told: list[list[str]] = [[]] * self.pipeline.size()
            dist.all_gather_object(told, sorted(found), group=self.pipeline)
            self.names = next(names for names in told if names)
        nothing = torch.zeros((), dtype=torch.float64, device=taken.device)
        count = nothing + len(self.modules)
        sums = torch.stack([*(found.get(name, nothing) for name in self.names), count])
        dist.all_reduce(sums, group=self.pipeline)
        return dict(zip(self.names, (sums[:-1] / sums[-1]).float().unbind(), strict=True))
