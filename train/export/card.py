"""The model card: what a model was made from, how, how well it does, and what it must not be trusted with."""

from collections.abc import Iterable, Sequence
from typing import Any

from data_pipeline.artifact import Artifact
from train.export.gate import Verdict
from train.export.source import Source, ancestors

SETTINGS = {
    "stage.steps": "steps",
    "stage.global_batch": "sequences a step",
    "data.sequence_length": "tokens a sequence",
    "optim.lr": "learning rate",
    "stage.precision": "precision",
    "objective.beta": "beta",
    "seed": "seed",
}
MEASURED = {
    "tokens": "tokens",
    "loss": "loss",
    "validation_loss": "validation loss",
    "bits_per_byte": "bits per byte",
}


def model_card(source: Source, verdict: Verdict, dtype: str, parameters: int) -> str:
    """README.md of an export, in Markdown with the front matter that model hubs read.

    Args:
        source: the model.
        verdict: its evaluation.
        dtype: of the written weights.
        parameters: number of weights.
    """
    line = [*([("model", source.artifact)] if source.artifact else []), *_line(source)]
    title = source.path.resolve().name if source.artifact is None else f"{source.artifact.kind} {source.artifact.id}"
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [longrun]\n---",
        f"# {title}",
        _shape(source, dtype, parameters),
        "## Data",
        _data([artifact for _, artifact in line]),
        "## Training",
        _training([artifact for _, artifact in line], source),
        "## Evaluation",
        _evaluation(verdict),
        "## Limits",
        _limits(source, verdict),
        "## Use",
        _use(),
        "## Lineage",
        _lineage(line, verdict),
    ]
    return "\n\n".join(sections) + "\n"


def _line(source: Source) -> list[tuple[str, Artifact]]:
    return list(ancestors(source.artifact)) if source.artifact else []


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _shape(source: Source, dtype: str, parameters: int) -> str:
    config = source.config
    chat = "with a chat template" if source.tokenizer.chat_template else "without a chat template"
    return (
        f"A decoder of {parameters / 1e6:,.1f} M parameters ({config.layers} layers, width {config.hidden}, "
        f"{config.heads} heads, {config.kv_heads} key/value heads), {dtype}, context {config.max_positions:,} tokens, "
        f"vocabulary {source.tokenizer.vocabulary:,}, {chat}. Trained and exported with Longrun."
    )


def _data(line: Sequence[Artifact]) -> str:
    rows = []
    for artifact in line:
        for entry in artifact.metrics.get("sources", []):
            size = f"{entry['bytes'] / 1e6:,.1f} MB" if "bytes" in entry else "-"
            name = f"[{entry['name']}]({entry['url']})" if entry.get("url") else entry["name"]
            cells = [artifact.kind, name, entry.get("version", "-"), entry.get("licence", "not recorded")]
            rows.append([*cells, _number(entry.get("documents", "-")), size])
    if not rows:
        return "Not recorded: the model came from outside, or its data artifacts are no longer beside it."
    return _table(("set", "source", "version", "licence", "documents", "size"), rows)


def _training(line: Sequence[Artifact], source: Source) -> str:
    stages = [artifact for artifact in reversed(line) if "stage.steps" in artifact.config]
    if not stages:
        return f"Not recorded: taken from `{source.path.name}` as it was."
    rows = []
    for stage in stages:
        settings = [f"{name} {stage.config[key]}" for key, name in SETTINGS.items() if key in stage.config]
        found = [f"{name} {_number(stage.metrics[key])}" for key, name in MEASURED.items() if key in stage.metrics]
        rows.append([stage.kind, "; ".join(settings), "; ".join(found), f"{stage.duration_s:,.0f} s"])
    return _table(("stage", "settings", "result", "time"), rows)


def _evaluation(verdict: Verdict) -> str:
    if verdict.evaluation is None:
        return "**None.** The export was forced without an evaluation."
    results = verdict.results
    models = results["models"]  # baselines first, the model last
    figures = dict.fromkeys(figure for measured in models.values() for figure in measured)
    rows = [[figure, *(_number(measured.get(figure, "-")) for measured in models.values())] for figure in figures]
    parts = [_table(("figure", *models), rows)]
    if gate := results["gate"]:
        checks = [
            (c["metric"], _number(c["found"]), c["threshold"], "passed" if c["passed"] else "FAILED")
            for c in gate["checks"]
        ]
        parts.append(_table(("gate", "found", "asked for", "verdict"), checks))
    if not verdict.passed:
        parts.append("**The gate was not passed; the export was forced.**")
    return "\n\n".join(parts)


def _limits(source: Source, verdict: Verdict) -> str:
    limits = [
        f"Text beyond {source.config.max_positions:,} tokens is outside what it was built for.",
        "It knows what the sources above say, in their languages, and invents the rest: check what it states.",
        "It was not trained to refuse harmful requests. Put your own safeguards around it.",
    ]
    if verdict.results.get("tasks"):
        limits.append("The tasks above were generated by program; they say little about other tasks.")
    if not verdict.passed:
        limits.insert(0, "**Forced export:** " + "; ".join(verdict.reasons) + ".")
    return "\n".join(f"- {limit}" for limit in limits)


def _use() -> str:
    return (
        "Where `EXPORT` is the directory above this one:\n\n"
        "```\n"
        "python -m tools.serve target=EXPORT    # an OpenAI-compatible server (vLLM) on 127.0.0.1\n"
        "python -m tools.chat target=EXPORT     # here, without a server\n"
        "```\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")\n'
        "```"
    )


def _lineage(line: Sequence[tuple[str, Artifact]], verdict: Verdict) -> str:
    if verdict.evaluation:
        line = [("evaluation", verdict.evaluation), *line]
    if not line:
        return "Not recorded."
    rows = [
        (name, artifact.kind, f"`{artifact.id}`", f"`{str(artifact.facts.get('commit', 'unknown'))[:12]}`")
        for name, artifact in line
    ]
    return _table(("as", "kind", "artifact", "code"), rows)
