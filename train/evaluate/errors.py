"""What can be wrong with an evaluation."""

from conf.errors import LongrunError


class EvaluationError(LongrunError):
    """There is nothing to measure, or nothing to measure it with."""
