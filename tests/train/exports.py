"""Small finished artifacts as the stages before an export leave them."""

import json
from pathlib import Path
from typing import Any

import torch

from data_pipeline.artifact import Artifact, Draft
from data_pipeline.tokenizer import Tokenizer
from tests.data import tiny_tokenizer
from train.models import hf_weights
from train.models.transformer import DecoderConfig, initialise

TINY = DecoderConfig(layers=2, hidden=64, intermediate=96, heads=2, kv_heads=1, head_dim=32, max_positions=512)


def corpus(directory: Path) -> Artifact:
    """The manifest of a corpus: what a model card reads of it."""
    directory.mkdir(parents=True)
    sources = [
        {"name": "django-docs", "version": "5.2", "licence": "BSD-3-Clause", "documents": 120, "bytes": 4_000_000}
    ]
    return Draft(directory, "corpus", {}, {}, metrics={"sources": sources}).publish()


def weights_of(config: DecoderConfig, vocabulary: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights, large enough that the likeliest token stands out and the text wanders."""
    model = config.build(vocabulary)
    initialise(model, seed)
    return {name: weight if name.endswith("norm.weight") else weight * 8 for name, weight in model.state_dict().items()}


def trained_run(
    directory: Path,
    inputs: dict[str, Artifact] | None = None,
    config: DecoderConfig = TINY,
    tokenizer: Tokenizer | None = None,
    kind: str = "sft",
    seed: int = 0,
) -> Artifact:
    """What a training stage leaves: `model/` and a manifest."""
    tokenizer = tokenizer or tiny_tokenizer()
    hf_weights.write(directory / "model", config, weights_of(config, tokenizer.vocabulary, seed), tokenizer)
    recipe = {"stage.steps": 40, "stage.global_batch": 16, "optim.lr": 3e-4, "seed": seed}
    metrics = {"steps": 40, "tokens": 81920, "loss": 2.5, "validation_loss": 2.6}
    return Draft(directory, kind, recipe, inputs or {}, metrics=metrics).publish("model/**/*")


def evaluation(directory: Path, model: Artifact, passed: bool = True, **baselines: Artifact) -> Artifact:
    """What stage=evaluate leaves."""
    directory.mkdir(parents=True)
    accuracy = 0.9 if passed else 0.1
    results: dict[str, Any] = {
        "model": "sft",
        "models": {
            "pretrain": {"perplexity": 14.0, "accuracy": 0.05},
            "sft": {"perplexity": 12.5, "accuracy": accuracy},
        },
        "tasks": {"addition": {"accuracy": accuracy, "n": 50, "examples": []}},
        "gate": {
            "passed": passed,
            "checks": [
                {"metric": "accuracy/addition", "found": accuracy, "threshold": "at least 0.5", "passed": passed}
            ],
        },
    }
    (directory / "results.json").write_text(json.dumps(results))
    return Draft(directory, "evaluation", {}, {"model": model, **baselines}).publish("results.json")


def stage(**settings: object) -> int:
    """`python -m train` with these overrides, in this process; returns its exit code.

    Raises:
        LongrunError: as the command would print it.
    """
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from conf import entry
    from train.config import RunConfig

    overrides = [*(f"{key}={value}" for key, value in settings.items())]
    with initialize_config_module("conf", version_base="1.3"):
        node = compose("train", overrides=overrides)
    resolved = OmegaConf.to_container(node, resolve=True)
    config = entry.typed(node, RunConfig)
    return config.stage.run(config, resolved)
