"""`python -m train stage=...`: run one stage of a model's life."""

from typing import Any

from conf import entry
from train.config import RunConfig
from train.plan import plan
from train.stages.base import DONE


def main(config: RunConfig, resolved: dict[str, Any]) -> int:
    if config.dry_run:
        print(plan(config))
        return DONE
    return config.stage.run(config, resolved)


if __name__ == "__main__":
    entry.run("train", RunConfig, main)
