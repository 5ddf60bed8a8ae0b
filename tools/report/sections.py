"""What the page says, section by section, from what the stages recorded.

Every function takes the life and answers None (or nothing) where its stages are missing, so that half a life still
makes a page.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from data_pipeline.card.page import PAGE
from launchers.display import duration
from tools.report import charts
from tools.report.read import Life, StageView, results_of
from train.goodput import Account

SHARES = ("compute", "communication", "data", "checkpoint", "evaluation")
"""Of the wall time of a training stage, in the order they are drawn."""


@dataclass(frozen=True)
class Verdict:
    """The first thing a reader wants to know.

    Args:
        level: "good", "bad" or "open".
        title: one sentence.
        details: what it rests on.
    """

    level: str
    title: str
    details: list[str]


def verdict(life: Life) -> Verdict:
    """Good only where the gate passed and the export was verified."""
    details = []
    wrong = [f"{stage.name}: {stage.note}" for stage in life if stage.note]
    missing = [stage.name for stage in life if not stage.artifact]
    gate = gate_of(life)
    if checks := gate.get("checks", []):
        failed = ", ".join(check["metric"] for check in checks if not check.get("passed"))
        details.append(
            f"The gate failed on {failed}." if failed else f"{len(checks)} of {len(checks)} gate checks hold."
        )
    verified = _verified(life)
    if verified:
        details.append(verified)
    details += wrong
    if wrong:
        return Verdict("bad", "This life is not whole", details)
    if gate and not gate.get("passed"):
        return Verdict("bad", "The model did not pass its gate", details)
    if missing or not gate or not verified:
        what = f"Still to come: {', '.join(missing)}." if missing else "No gate or no verified export was found."
        return Verdict("open", "This life is not finished", [*details, what])
    return Verdict("good", "The model passed its gate and its export is verified", details)


def gate_of(life: Life) -> dict[str, Any]:
    """Of the last evaluation; empty without one."""
    return results_of(life.last("evaluation")).get("gate") or {}


def _verified(life: Life) -> str:
    stage = life.last("verification")
    if not stage:
        return ""
    worst = next((v for name, v in stage.metrics.items() if name.startswith("log-probabilities, fp32")), None)
    how = f"; log-probabilities differ by at most {worst:.1e}" if isinstance(worst, float) else ""
    return f"transformers reloaded the export in a fresh process and agrees with it{how}."


@dataclass(frozen=True)
class Figure:
    """One of the numbers at the top of the page."""

    label: str
    value: str
    note: str = ""


def figures(life: Life) -> list[Figure]:
    found = []
    last = life.trained[-1] if life.trained else None
    if last and (count := last.facts.get("parameters")):
        found.append(Figure("parameters", charts.compact(count)))
    if base := life.last("pretrain"):
        found.append(Figure("tokens trained on", charts.compact(base.metrics.get("tokens", 0)), "pre-training"))
    results = results_of(life.last("evaluation"))
    if bits := results.get("bits_per_byte"):
        found.append(Figure("bits per byte", f"{bits:.3f}", "held-out text"))
    models: dict[str, dict[str, float]] = results.get("models", {})
    accuracies = {name: figures["accuracy"] for name, figures in models.items() if "accuracy" in figures}
    if accuracies:
        *before, (_, accuracy) = accuracies.items()
        note = ", ".join(f"{value:.0%} after {name}" for name, value in before)
        found.append(Figure("held-out tasks solved", f"{accuracy:.0%}", note))
    made = [stage.seconds for stage in life if stage.artifact]
    if made:
        found.append(Figure("made in", duration(sum(made)), f"{len(made)} stages"))
    return found


@dataclass
class Corpus:
    """Where text came from and what became of it."""

    stage: StageView
    sources: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    splits: dict[str, dict[str, Any]]
    records: dict[str, int]
    """Conversations and preferences by file."""

    @property
    def bytes_in(self) -> int:
        return sum(source.get("bytes", 0) for source in self.sources)

    @property
    def documents_in(self) -> int:
        return self.steps[0].get("documents_in", 0) if self.steps else sum(s.get("documents", 0) for s in self.sources)

    @property
    def documents_kept(self) -> int:
        return self.steps[-1].get("documents_out", 0) if self.steps else self.documents_in

    @property
    def tokens(self) -> int:
        return sum(split.get("tokens", 0) for split in self.splits.values())

    @property
    def card(self) -> Path | None:
        """Its data card; None for an artifact that was made without one."""
        assert self.stage.artifact is not None  # it has metrics
        return self.stage.directory / PAGE if PAGE in self.stage.artifact.files else None


def corpora(life: Life) -> list[Corpus]:
    return [
        Corpus(stage, m.get("sources", []), m.get("steps", []), m.get("splits", {}), m.get("records", {}))
        for stage in life.of_kind("corpus", "chat")
        if (m := stage.metrics)
    ]


@dataclass
class Training:
    """One stage that changed weights."""

    stage: StageView
    loss: Markup
    small: list[Markup] = field(default_factory=list)
    shares: list[tuple[str, float]] = field(default_factory=list)

    @property
    def first_loss(self) -> float | None:
        values = self.stage.curve("loss")[1]
        return values[0] if values else None

    @property
    def last_loss(self) -> float | None:
        """The mean of the last twentieth: single steps are noisy."""
        values = self.stage.curve("loss")[1]
        tail = values[-max(1, len(values) // 20) :]
        return sum(tail) / len(tail) if tail else None


def trainings(life: Life) -> list[Training]:
    found = []
    for stage in life.trained:
        curve = stage.curve
        loss = charts.lines(
            "loss, nats per token" if curve("margin")[0] == [] else "loss, nats per pair",
            [
                charts.Line("training", *curve("loss"), noisy=True),
                charts.Line("validation", *curve("validation_loss"), colour=1, marked=True),
            ],
            wide=True,
        )
        small = [
            charts.lines("learning rate", [charts.Line("", *curve("lr"), colour=4)]),
            charts.lines("gradient norm, before clipping", [charts.Line("", *curve("grad_norm"), 3, noisy=True)]),
            charts.lines("throughput, tokens/s", [charts.Line("", *curve("tokens_per_s"), 2, noisy=True)]),
            charts.lines("share of the peak FLOP/s", [charts.Line("", *curve("mfu"), 2, noisy=True)], percent=True),
        ]
        for key, title in (("margin", "reward margin of chosen over rejected"), ("accuracy", "chosen preferred")):
            pair = [
                charts.Line("training", *curve(key), noisy=True),
                charts.Line("validation", *curve(f"validation_{key}"), colour=1, marked=True),
            ]
            small.append(charts.lines(title, pair, percent=key == "accuracy"))
        small.append(
            charts.lines("bits per byte", [charts.Line("held-out text", *curve("bits_per_byte"), 1, marked=True)])
        )
        recorded = stage.metrics.get("shares", {})
        shares = [(name, recorded[name]) for name in SHARES if name in recorded]
        found.append(Training(stage, loss, [chart for chart in small if chart], shares))
    return found


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of one training stage went, its restarts included.

    Args:
        shares: of the wall time, in the order they are drawn; together 1.
    """

    stage: StageView
    account: Account
    shares: list[tuple[str, float]]


def goodputs(life: Life) -> list[Goodput]:
    found = []
    for stage in life:
        if (account := stage.account) is None:
            continue
        shares = {
            "useful steps": account.useful_s,
            "restarts": account.restarts_s,
            "checkpoint": account.seconds.get("checkpoint", 0.0),
            "evaluation": account.seconds.get("evaluation", 0.0),
        }
        shares["start, end and the rest"] = account.wall_s - sum(shares.values())
        found.append(Goodput(stage, account, [(name, s / max(account.wall_s, 1e-9)) for name, s in shares.items()]))
    return found


@dataclass(frozen=True)
class Weights:
    """What is handed on."""

    stage: StageView
    parameters: int | None
    files: list[tuple[str, int]]
    architecture: dict[str, Any]

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.files)


ARCHITECTURE = (
    "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "max_position_embeddings", "tie_word_embeddings", "dtype", "torch_dtype",
)  # fmt: skip


def weights(life: Life) -> Weights | None:
    stage = life.last("export") or (life.trained[-1] if life.trained else None)
    if stage is None or stage.artifact is None:
        return None
    files = [(name, record["bytes"]) for name, record in stage.artifact.files.items() if name.endswith(".safetensors")]
    counts = [s.facts["parameters"] for s in life if "parameters" in s.facts]
    config = _architecture(stage.directory / "model" / "config.json")
    return Weights(stage, counts[-1] if counts else None, files, config)


def _architecture(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return {key: config[key] for key in ARCHITECTURE if config.get(key) is not None}


def commands(life: Life) -> list[tuple[str, str]]:
    """(what for, command) with what there is to serve."""
    target = life.last("export") or (life.trained[-1] if life.trained else None)
    if target is None:
        return []
    here = target.directory
    found = [("Talk to it in the terminal, with nothing but this project", f"python -m tools.chat target={here}")]
    if target.kind == "export":
        found += [
            ("Serve it with vLLM on loopback, behind an API key", f"python -m tools.serve target={here}"),
            (
                "Load it with transformers",
                "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
                f'model = AutoModelForCausalLM.from_pretrained("{here}/model")\n'
                f'tokenizer = AutoTokenizer.from_pretrained("{here}/model")',
            ),
        ]
    found.append(("See what it was made from", f"python -m tools.lineage path={here}"))
    return found


@dataclass(frozen=True)
class Config:
    """A stage's settings, and how they differ from those of the stage before it."""

    stage: StageView
    text: str
    before: str
    changes: list[tuple[str, Any, Any]]


def configs(life: Life) -> list[Config]:
    import yaml

    found = []
    stages = [stage for stage in life if stage.config]
    for previous, stage in pairwise([None, *stages]):
        assert stage is not None
        text = yaml.safe_dump(stage.config, sort_keys=False, allow_unicode=True)
        comparable = previous is not None and previous.trained and stage.trained
        changes = differences(previous.config, stage.config) if comparable and previous else []
        found.append(Config(stage, text, previous.name if comparable and previous else "", changes))
    return found


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value before, value after) of every flat key that differs."""
    old, new = dict(_flat(before)), dict(_flat(after))
    keys = [*new, *(key for key in old if key not in new)]
    return [(key, old.get(key, "–"), new.get(key, "–")) for key in keys if old.get(key, "–") != new.get(key, "–")]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + str(key), value


def environment(life: Life) -> dict[str, str]:
    """Code, packages and machine, as the last stage recorded them."""
    stage = next((s for s in reversed(life.stages) if s.facts), None)
    if stage is None:
        return {}
    found = {"code": stage.facts.get("commit", "unknown")[:12]}
    if str(stage.facts.get("commit", "")).endswith("+"):
        found["code"] += " with local changes"
    found |= {name: str(version) for name, version in stage.facts.get("packages", {}).items()}
    for name in ("device", "host", "python"):
        if value := next((s.facts[name] for s in reversed(life.stages) if name in s.facts), None):
            found[name] = str(value)
    return found
