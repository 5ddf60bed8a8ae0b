"""A stage reads artifacts and writes one."""

from typing import TYPE_CHECKING, Any

from conf.errors import LostError, Problem

if TYPE_CHECKING:
    from train.config import RunConfig

DONE = 0
STOPPED_EARLY = 75
"""Stopped on request or preemption with a checkpoint written: start me again."""
LOST = LostError.exit_code
"""Another rank or a machine was lost, or hangs: start me again, at most so many times without progress."""


class Stage:
    """Subclasses are frozen dataclasses registered with `@register("stage", name)`."""

    def problems(self, config: "RunConfig", world_size: int) -> list[Problem]:
        return []

    def run(self, config: "RunConfig", resolved: dict[str, Any]) -> int:
        """Do it; returns the exit code. `resolved` is the plain configuration, for manifests and logs."""
        raise NotImplementedError
