"""The test suite's way to run on several processes; see tools/ranks.py."""

from tools.ranks import RanksFailed, run_ranks

__all__ = ["RanksFailed", "run_ranks"]
