"""`python -m data_pipeline corpus=...`: make a data set."""

from typing import Any

from conf import entry
from data_pipeline.config import PipelineConfig


def main(config: PipelineConfig, resolved: dict[str, Any]) -> int:
    return config.corpus.run(config, resolved)


if __name__ == "__main__":
    entry.run("data_pipeline", PipelineConfig, main)
