"""The page: sections put into the template. Every text of a corpus is escaped; the page loads nothing from anywhere."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.registry import OPTIONS
from data_pipeline.artifact import write_atomically
from data_pipeline.card import contents, figures, samples

if TYPE_CHECKING:
    from data_pipeline.card.samples import Pair, Sample

HERE = Path(__file__).parent
PAGE = "corpus.html"
SHOWN = 20
"""Rows of a table that are seen at once; the others are folded."""
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
"""Control characters, which HTML cannot hold, as the signs that picture them."""


def write(directory: Path, metrics: Mapping[str, Any], settings: Mapping[str, Any], pieces: Sequence[Path]) -> None:
    """Write `corpus.html` into a corpus.

    Args:
        directory: of the corpus, with `quarantine/` in place.
        metrics: of its manifest.
        settings: its recipe; `settings["steps"]` has name, class, settings and state of each curation step.
        pieces: files of the train split.
    """
    known = {option.__name__: option for (group, _), option in OPTIONS.items() if group == "corpus/step"}
    topics = {name: getattr(known.get(kind), "topic", "") for name, kind, *_ in settings["steps"]}
    dropped = {
        step["name"]: samples.dropped(
            (directory / "quarantine" / step["name"]).glob("*"), topics.get(step["name"]) == contents.PERSONAL
        )
        for step in metrics["steps"]
        if step["dropped"]
    }
    copies = [name for name, topic in topics.items() if topic == contents.DUPLICATES and name in dropped]
    quarantined = [file for name in copies for file in sorted((directory / "quarantine" / name).glob("*"))]
    page = render(metrics, settings, topics, dropped, samples.kept(pieces), samples.pairs(pieces, quarantined))
    write_atomically(directory / PAGE, page)


def render(
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    topics: Mapping[str, str],
    dropped: Mapping[str, dict[str, list["Sample"]]],
    kept: Sequence["Sample"],
    pairs: Sequence["Pair"],
) -> str:
    """The whole page as HTML.

    Args:
        metrics: of the manifest.
        settings: the recipe.
        topics: step -> section that its findings belong to.
        dropped: step -> reason -> documents to show.
        kept: documents to show.
        pairs: copies and what they are copies of.
    """
    chosen = {name: (values, state) for name, _, values, state in settings["steps"]}
    steps = contents.steps(metrics["steps"], topics, chosen, dropped)
    sources = contents.sources(metrics)
    others = {key: value for key, value in settings.items() if key not in ("steps", "sources")}
    return drawn(
        "page.html.jinja",
        title=contents.title(metrics, sources),
        figures=contents.figures(metrics, steps),
        sources=sources,
        licences=contents.licences(sources),
        splits=metrics["splits"],
        flow=contents.flow(sources, steps, metrics["splits"]),
        steps=steps,
        histograms=contents.histograms(metrics),
        labels={label: rows for label in ("language", "kind") if (rows := contents.labelled(metrics, label))},
        undated=contents.undated(metrics),
        topics={topic: [step for step in steps if step.topic == topic] for topic in contents.TOPICS},
        clusters=contents.clusters(metrics),
        pairs=pairs,
        tokenizer=metrics.get("tokenizer", {}),
        fertility=contents.fertility(metrics),
        kept=kept,
        settings=yaml_of(others),
    )


def drawn(template: str, **sections: Any) -> str:
    """A page of one of the templates here."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {name: getattr(figures, name) for name in ("number", "size", "share", "percent")}
    environment.filters["tables"] = contents.tables
    style = (HERE / "base.css").read_text() + (HERE / "card.css").read_text()
    page = environment.get_template(template).render(style=style, shown=SHOWN, **sections)
    return page.translate(PICTURES).encode(errors="replace").decode()


def yaml_of(values: Mapping[str, Any]) -> str:
    """As a person reads it; empty for nothing."""
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(values, default=str)), allow_unicode=True) if values else ""
