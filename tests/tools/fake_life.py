"""The artifacts of a whole life, made up: what the report is given, without a second of training."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.artifact import Artifact, Draft
from train.goodput import Attempt

CORPUS = {
    "sources": [
        {"name": "celery", "version": "5.6.1", "licence": "BSD-3-Clause", "documents": 300, "bytes": 4_000_000},
        {"name": "sympy", "version": "1.14.0", "licence": "BSD-3-Clause", "documents": 700, "bytes": 9_000_000},
    ],
    "steps": [
        {"name": "read", "documents_in": 1000, "documents_out": 1000, "dropped": {}},
        {"name": "quality", "documents_in": 1000, "documents_out": 800, "dropped": {"too short": 150, "symbols": 50}},
        {"name": "exact dedup", "documents_in": 800, "documents_out": 790, "dropped": {"duplicate": 10}},
    ],
    "splits": {
        "train": {"documents": 750, "tokens": 2_345_678, "bytes": 9_000_000},
        "validation": {"documents": 40, "tokens": 111_222, "bytes": 450_000},
    },
}
RECORDS = {"train": 3000, "preferences_train": 400}
RESULTS = {
    "model": "dpo",
    "bits_per_byte": 1.31,
    "models": {
        "pretrain": {"perplexity": 24.1, "bits_per_byte": 1.29, "accuracy": 0.02, "accuracy/sort": 0.02},
        "sft": {"perplexity": 25.0, "bits_per_byte": 1.3, "accuracy": 0.81, "accuracy/sort": 0.81},
        "dpo": {"perplexity": 25.2, "bits_per_byte": 1.31, "accuracy": 0.83, "accuracy/sort": 0.83},
    },
    "samples": [
        {
            "task": "sort",
            "prompt": "Sort these digits: 3 1 2",
            "expected": "1 2 3",
            "answers": {"pretrain": "the class", "sft": "1 2", "dpo": "1 2 3"},
        }
    ],
    "gate": {
        "passed": True,
        "checks": [{"metric": "bits_per_byte", "found": 1.31, "threshold": "at most 2", "passed": True}],
    },
}
CHECKS = [
    {"name": "text ids", "found": 0, "threshold": 0, "passed": True, "detail": "7 compared"},
    {"name": "log-probabilities, fp32", "found": 3.1e-6, "threshold": 1e-4, "passed": True, "detail": "mean 2e-7"},
]


def make(
    directory: Path,
    kind: str,
    inputs: dict[str, Artifact],
    metrics: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
) -> Artifact:
    """One artifact with these files."""
    for name, text in (files or {"out": directory.name}).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    draft = Draft(directory, kind, {}, inputs, metrics or {}, facts or {}, earlier_s=10.0)
    return draft.publish(*(files or {"out": ""}))


def attempts(run_dir: Path) -> None:
    """Two starts of a training stage: the first was killed at step 50 and the second went on from step 40."""
    (run_dir / "attempts").mkdir()
    for number, began_s, first, last in ((1, 0.0, 0, 50), (2, 70.0, 40, 60)):
        seconds = {"init": 5.0, "compute": float(last - first)}
        spans = [[(first, 0.0), (last, float(last - first))]]
        end_s = began_s + sum(seconds.values())
        one = Attempt(
            number, "a run", "here", "", 0, 2, began_s, end_s, seconds, spans, exit=None if number == 1 else 0
        )
        (run_dir / "attempts" / f"{number:06d}.json").write_text(json.dumps(asdict(one)))


def train(directory: Path, inputs: dict[str, Artifact], steps: int, **figures: float) -> Artifact:
    """A training stage with its curve; `figures` are further ones, raised evenly up to their values."""
    kind = directory.name
    directory.mkdir()
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 0.2 + 6 * math.exp(-4 * step / steps)
        further = {name: value * step / steps for name, value in figures.items()}
        lines.append(
            {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 9e3, "mfu": 0.3, **further}
        )
        if step % (steps // 2) == 0:
            lines.append({"step": step, "validation_loss": loss + 0.1})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"stage": {"kind": kind, "steps": steps}, "optim": {"lr": 1e-3}, "seed": 0}
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    shares = {"data": 0.01, "compute": 0.8, "communication": 0.1, "checkpoint": 0.04, "evaluation": 0.05}
    metrics = {
        "steps": steps,
        "tokens": steps * 8192,
        "loss": 0.31,
        "validation_loss": 0.41,
        "tokens_per_s": 9000.0,
        "mfu": 0.3,
        "peak_memory_bytes": 1.5e9,
        "shares": shares,
    }
    files = {
        "model/config.json": json.dumps({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 6}),
        "model/model.safetensors": "w" * 5000,
    }
    return make(directory, kind, inputs, metrics, {"parameters": 5_123_456, "processes": 2}, files)


def make_life(root: Path) -> dict[str, Artifact]:
    """Every stage of the demo, by name."""
    made: dict[str, Artifact] = {}
    made["corpus"] = make(root / "corpus", "corpus", {}, CORPUS, files={"corpus.html": "<p>card</p>"})
    made["tasks"] = make(
        root / "tasks", "chat", {}, {"records": {"train": 3000, "preferences_train": 400}, "tasks": ["compare"]}
    )
    made["pretrain"] = train(root / "pretrain", {"data": made["corpus"]}, 60)
    attempts(root / "pretrain")
    made["sft"] = train(root / "sft", {"data": made["tasks"], "model": made["pretrain"]}, 40)
    made["dpo"] = train(root / "dpo", {"data": made["tasks"], "model": made["sft"]}, 20, margin=2.0, accuracy=0.9)
    results = {"results.json": json.dumps(RESULTS)}
    inputs = {"model": made["dpo"], "corpus": made["corpus"], "tasks": made["tasks"]}
    made["evaluate"] = make(root / "evaluate", "evaluation", inputs, {"bits_per_byte": 1.31}, files=results)
    made["export"] = make(
        root / "export",
        "export",
        {"model": made["dpo"], "evaluation": made["evaluate"]},
        files={"model/config.json": "{}", "model/model.safetensors": "w" * 5000},
    )
    verify = {"verify.json": json.dumps({"passed": True, "checks": CHECKS})}
    figures = {check["name"]: check["found"] for check in CHECKS}
    made["verify"] = make(root / "verify", "verification", {"export": made["export"]}, figures, files=verify)
    return made
