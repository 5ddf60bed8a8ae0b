"""The test suite's way to run on several processes; see tools/ranks.py."""

from tools.ranks import RanksError, run_ranks

__all__ = ["RanksError", "run_ranks"]
