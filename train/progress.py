"""What a run must remember besides tensors: how far it is and what happened on the way."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Saved with every checkpoint. Schedule and data order are functions of `step`, so nothing else is kept of them.

    Args:
        step: optimizer steps done, skipped ones included.
        samples: samples consumed.
        tokens: tokens consumed, padding left out.
        seconds: wall time of the run so far, over all restarts.
        best_validation_loss: the lowest so far, in the objective's unit.
        validations_without_gain: validations since that one.
        validated: step of the newest validation that is counted in these two.
        skipped: the steps that were skipped for a loss or norm that was not finite, or a spike.
        roll_backs: the faults for which the run went back: kind, step, and the step that it went back to.
        inputs: fingerprint of what the run reads (tokens, tokenizer, initial weights): it must be the same on resume.
    """

    step: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_validation_loss: float = math.inf
    validations_without_gain: int = 0
    validated: int = -1
    skipped: list[int] = field(default_factory=list)
    roll_backs: list[tuple[str, int, int]] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def skipped_in_a_row(self) -> int:
        """Skipped steps that end with the newest one recorded."""
        count = 0
        while count < len(self.skipped) and self.skipped[-1 - count] == self.skipped[-1] - count:
            count += 1
        return count

    def count_validation(self, step: int, loss: float) -> None:
        """Take note of a validation; one that is repeated after a restart counts once."""
        if step <= self.validated:
            return
        self.validated = step
        if loss < self.best_validation_loss:
            self.best_validation_loss, self.validations_without_gain = loss, 0
        else:
            self.validations_without_gain += 1
