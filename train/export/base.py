"""What every exporter shares: a model, the verdict on it, and a directory to hand on."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.errors import Problem
from train.export.gate import Verdict
from train.export.source import Source

if TYPE_CHECKING:
    from train.config import RunConfig


@dataclass(frozen=True)
class Exporter:
    """Subclasses are frozen dataclasses registered with `@register("export", name)`.

    Args:
        evaluation: evaluation artifact of the model that is exported; its gate decides.
        force: export although the gate failed or there is no evaluation; the manifest and the model card say so.
    """

    evaluation: str = ""
    force: bool = False

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        return []

    def write(self, directory: Path, source: Source, verdict: Verdict) -> None:
        """Write the model into an empty directory, in the exporter's format.

        Args:
            directory: becomes `model/` of the export.
            source: the model.
            verdict: what its evaluation says.
        """
        raise NotImplementedError
