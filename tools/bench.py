"""`python -m tools.bench bench=...`: figures that are read, never tested. Each bench is one class in tools/benches."""

import json
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

import tools.benches
from conf import entry
from conf.registry import discover, register
from parallel import distributed

discover(tools.benches)


@register("", "bench_schema")
@dataclass(frozen=True)
class BenchConfig:
    """Measure something on this machine, against a yardstick measured in the same run.

    Args:
        bench: what is measured.
        json: print the figures as one JSON object instead of a table.
    """

    bench: Any = MISSING
    json: bool = False


def main(config: BenchConfig, resolved: dict[str, Any]) -> int:
    """Run one bench and print its figures."""
    try:
        figures: dict[str, float] = config.bench.run()
    finally:
        distributed.stop()
    if config.json:
        print(json.dumps(figures))
    else:
        width = max(map(len, figures))
        print("\n".join(f"{name:{width}}  {value:12,.4g}" for name, value in figures.items()))
    return 0


if __name__ == "__main__":
    entry.run("bench", BenchConfig, main)
