"""What the page says, section by section, from the metrics and settings of a corpus.

Every function answers nothing where a corpus has nothing of the kind, so that any corpus makes a page.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from data_pipeline.card import bins, charts, sankey
from data_pipeline.card.figures import compact, counted, share, size
from data_pipeline.card.samples import Sample

SOURCES_DRAWN = 6
STEPS_DRAWN = 20
REASONS_DRAWN = 5
"""In the picture of the documents' way; the tables have all of them."""
LONGEST_NAME = 18
"""Characters of the names of several steps that are drawn as one; else their number stands there."""
DUPLICATES, PERSONAL, CONTAMINATION, REPRESENTATION = "duplicates", "personal", "contamination", "representation"
TOPICS = (DUPLICATES, PERSONAL, CONTAMINATION, REPRESENTATION)
Counts = dict[str, int]


@dataclass(frozen=True)
class Step:
    """One step, as it was counted.

    Args:
        name: of the step.
        documents_in: that came to it.
        documents_out: that it passed on.
        judged: of those that came, how many were of a kind that it judges.
        characters_in: of the documents that came; 0 where they were not counted.
        characters_out: of those that it passed on.
        dropped: reason -> documents, the most frequent first.
        counts: label -> what it found.
        topic: which section its findings belong to; empty for none.
        settings: name -> value.
        state: what decided its result beyond the settings.
        samples: reason -> documents that it dropped.
    """

    name: str
    documents_in: int
    documents_out: int
    judged: int
    characters_in: int
    characters_out: int
    dropped: Counts
    counts: Counts
    topic: str
    settings: dict[str, Any] = field(default_factory=dict)
    state: Any = None
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    @property
    def lost(self) -> int:
        return self.documents_in - self.documents_out


def steps(
    recorded: Iterable[Mapping[str, Any]],
    topics: Mapping[str, str],
    settings: Mapping[str, tuple[dict[str, Any], Any]],
    samples: Mapping[str, dict[str, list[Sample]]],
) -> list[Step]:
    """The steps in order.

    Args:
        recorded: `metrics["steps"]`.
        topics: step -> section.
        settings: step -> settings and state.
        samples: step -> reason -> documents.
    """
    return [
        Step(
            name=step["name"],
            documents_in=step["documents_in"],
            documents_out=step["documents_out"],
            judged=step.get("judged", step["documents_in"]),
            characters_in=step.get("characters_in", 0),
            characters_out=step.get("characters_out", 0),
            dropped=ranked(step["dropped"]),
            counts=ranked(step.get("counts", {})),
            topic=topics.get(step["name"], ""),
            settings=settings.get(step["name"], ({}, None))[0],
            state=settings.get(step["name"], ({}, None))[1],
            samples=samples.get(step["name"], {}),
        )
        for step in recorded
    ]


@dataclass
class Table:
    """Some of what a step found: rows with a number in each column, 0 where there is none.

    Args:
        title: of the table; empty for none.
        columns: their names.
        rows: (label, numbers), the greatest first.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[int]]]


def tables(step: Step) -> list[Table]:
    """What a step counted, label by label. Those of the form column/title/row stand in one table for each title, those
    of the form row: column in one table; evaluation sets of which nothing was found have a row too."""
    cells: dict[str, dict[str, Counts]] = {}
    if step.topic == CONTAMINATION:
        for name, about in (step.state or {}).items():
            cells.setdefault("", {})[name] = {"items of the set": about["items"]}
    for label, count in step.counts.items():
        row, colon, column = label.rpartition(": ")
        title, parts = "", label.split("/", 2)
        if not colon and len(parts) == 3:
            column, title, row = parts
        elif not colon:
            row, column = label, "number"
        cells.setdefault(title, {}).setdefault(row, {})[column] = count
    found = []
    for title, rows in cells.items():
        columns = list(dict.fromkeys(column for numbers in rows.values() for column in numbers))
        listed = [(row, [numbers.get(column, 0) for column in columns]) for row, numbers in rows.items()]
        found.append(Table(title, columns, sorted(listed, key=lambda item: ([-n for n in item[1]], item[0]))))
    return sorted(found, key=lambda table: table.title)


def ranked(counts: Mapping[str, int]) -> Counts:
    """The greatest first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


@dataclass
class Source:
    """What came from one place under one licence.

    Args:
        name: package, data set or directory.
        licence: as its metadata states it.
        versions: as pinned.
        urls: where a person reads about it.
        documents: that could be read.
        bytes: of their text.
        tokens: split -> tokens of those that remained.
    """

    name: str
    licence: str
    versions: list[str] = field(default_factory=list)
    urls: list[str] = field(default_factory=list)
    documents: int = 0
    bytes: int = 0
    tokens: Counts = field(default_factory=dict)

    @property
    def all_tokens(self) -> int:
        return sum(self.tokens.values())


def sources(metrics: Mapping[str, Any]) -> list[Source]:
    """The one with most tokens first."""
    found: dict[tuple[str, str], Source] = {}
    for entry in metrics["sources"]:
        key = entry["name"], entry.get("licence", "")
        source = found.setdefault(key, Source(*key))
        for several, one in ((source.versions, entry.get("version")), (source.urls, entry.get("url"))):
            if one and one not in several:
                several.append(one)
        source.documents += entry.get("documents", 0)
        source.bytes += entry.get("bytes", 0)
    for entry in metrics.get("tokens", []):
        key = entry["source"], entry["licence"]
        found.setdefault(key, Source(*key)).tokens = entry["splits"]
    return sorted(found.values(), key=lambda source: (-source.all_tokens, -source.bytes, source.name, source.licence))


def licences(of: Iterable[Source]) -> dict[str, Source]:
    """Licence -> what is under it, the one with most tokens first."""
    found: dict[str, Source] = {}
    for source in of:
        total = found.setdefault(source.licence, Source("", source.licence))
        total.documents += source.documents
        total.bytes += source.bytes
        for split, tokens in source.tokens.items():
            total.tokens[split] = total.tokens.get(split, 0) + tokens
    return dict(sorted(found.items(), key=lambda item: (-item[1].all_tokens, -item[1].bytes, item[0])))


def title(metrics: Mapping[str, Any], of: Sequence[Source]) -> str:
    tokens = sum(split["tokens"] for split in metrics["splits"].values())
    for scale, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if tokens >= scale:
            amount = f"{tokens / scale:.3g} {word} tokens"
            break
    else:
        amount = counted(tokens, "token")
    return f"{amount} from {counted(len({source.name for source in of}), 'source')}"


def flow(of: Sequence[Source], steps: Sequence[Step], splits: Mapping[str, Mapping[str, int]]) -> Markup:
    """The way of all documents."""
    names: Counts = {}
    for source in of:
        names[source.name] = names.get(source.name, 0) + source.documents
    came = folded(ranked(names), SOURCES_DRAWN, "other sources")
    if unread := (steps[0].documents_in if steps else 0) - sum(names.values()):
        came.append(sankey.Band("unreadable", unread))
    ends = [
        sankey.Band(name, split["documents"], f" documents · {compact(split['tokens'])} tokens")
        for name, split in splits.items()
    ]
    return sankey.draw(came, drawn(steps), ends)


def drawn(of: Sequence[Step]) -> list[sankey.Step]:
    """The steps that lost most; those between them are drawn as one."""
    most = {step.name for step in sorted(of, key=lambda step: -step.lost)[:STEPS_DRAWN] if step.lost}
    found = []
    for alone, group in itertools.groupby(of, key=lambda step: step.name if step.name in most else ""):
        members = list(group)
        dropped: Counts = {}
        for step in members:
            for reason, count in step.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + count
        names = ", ".join(step.name for step in members)
        name = alone or (names if len(names) <= LONGEST_NAME else counted(len(members), "step"))
        bands = folded(ranked(dropped), REASONS_DRAWN, "other reasons")
        found.append(sankey.Step(name, members[0].documents_in, bands))
    return found


def folded(counts: Mapping[str, int], most: int, others: str) -> list[sankey.Band]:
    """The first so many, and the rest as one."""
    bands = [sankey.Band(name.replace("_", " "), count) for name, count in counts.items()]
    rest = bands[most:]
    if len(rest) < 2:
        return bands
    return [*bands[:most], sankey.Band(f"{len(rest)} {others}", sum(band.documents for band in rest))]


@dataclass(frozen=True)
class Figure:
    """One of the numbers at the top of the page."""

    label: str
    value: str
    note: str = ""


def figures(metrics: Mapping[str, Any], of: Sequence[Step]) -> list[Figure]:
    splits = metrics["splits"].values()
    documents, tokens, amount = (sum(split[key] for split in splits) for key in ("documents", "tokens", "bytes"))
    came = of[0].documents_in if of else documents
    found = [
        Figure("documents", compact(documents), f"{share(documents / came)} of {compact(came)} read" if came else ""),
        Figure("tokens", compact(tokens), f"{amount / tokens:.2f} bytes each" if tokens else ""),
        Figure("of text", size(amount)),
    ]
    for topic, label in ((DUPLICATES, "copies taken out"), (CONTAMINATION, "contaminated documents dropped")):
        if members := [step for step in of if step.topic == topic]:
            found.append(Figure(label, compact(sum(step.lost for step in members))))
    if members := [step for step in of if step.topic == PERSONAL]:
        found.append(Figure("pieces of personal data found", compact(sum(sum(s.counts.values()) for s in members))))
    return found


@dataclass(frozen=True)
class Chart:
    """A histogram with its title, and a sentence on what it shows."""

    title: str
    drawing: Markup
    note: str = ""


def histograms(metrics: Mapping[str, Any]) -> list[Chart]:
    """Lengths, years and scores."""
    portrait = metrics.get("portrait", {})
    read, kept = portrait.get("read", {}), portrait.get("kept", {})
    found = [
        _pair("length in characters", read.get("length", {}), kept.get("length", {}), _length_names),
        _tokens(metrics.get("lengths", {})),
        _pair("year", _years(read), _years(kept), _year_names),
    ]
    for name, counts in sorted(kept.get("score", {}).items()):
        found.append(_pair(name.replace("_", " "), {}, counts, _score_names))
    return [chart for chart in found if chart.drawing]


def _pair(title: str, read: Mapping[str, int], kept: Mapping[str, int], names: Any) -> Chart:
    series = [
        charts.Series(name, {float(value): count for value, count in counts.items()}, style)
        for name, counts, style in (("read", read, "read"), ("kept", kept, "kept"))
        if counts
    ]
    values = sorted({value for one in series for value in one.counts})
    return Chart(title, charts.histogram(title, series, names(values)) if values else Markup())


def _tokens(lengths: Mapping[str, Mapping[str, int]]) -> Chart:
    total: Counts = {}
    for counts in lengths.values():
        for value, count in counts.items():
            total[value] = total.get(value, 0) + count
    return _pair("length in tokens", {}, total, _length_names)


def _years(portrait: Mapping[str, Any]) -> Counts:
    return {year: count for year, count in portrait.get("year", {}).items() if year}


def _length_names(values: Sequence[float]) -> dict[float, str]:
    """With two digits: bins are wider than that."""
    places = range(int(values[0]), int(values[-1]) + 1)
    return {float(place): compact(float(f"{bins.length_from(place):.2g}")) for place in places}


def _year_names(values: Sequence[float]) -> dict[float, str]:
    return {float(year): str(year) for year in range(int(values[0]), int(values[-1]) + 1)}


def _score_names(values: Sequence[float]) -> dict[float, str]:
    if values[0] >= 0 and values[-1] < 1:
        return {place / 20: f"{place / 20:.2g}" for place in range(20)}
    return {value: f"{value:.3g}" for value in values}


def labelled(metrics: Mapping[str, Any], label: str) -> list[tuple[str, int, int]]:
    """(value, documents read, documents kept) of a label, the most frequent first; nothing where there is one value."""
    portrait = metrics.get("portrait", {})
    read, kept = (portrait.get(when, {}).get(label, {}) for when in ("read", "kept"))
    found = [(value, read.get(value, 0), kept.get(value, 0)) for value in sorted(read.keys() | kept.keys())]
    return sorted(found, key=lambda row: (-row[2], -row[1], row[0])) if len(found) > 1 else []


def undated(metrics: Mapping[str, Any]) -> float:
    """Share of the documents kept that bear no date."""
    years = metrics.get("portrait", {}).get("kept", {}).get("year", {})
    return years.get("", 0) / sum(years.values()) if years else 1.0


def clusters(metrics: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, int]]]]:
    """What kind of copies -> (how many of one document were dropped, of how many documents so many)."""
    found = []
    for name, counts in sorted(metrics.get("portrait", {}).get("kept", {}).get("copies", {}).items()):
        rows = []
        for value in sorted(map(int, counts)):
            least, end = bins.length_from(value), bins.length_from(value + 1)
            first, last = -int(-least // 1), -int(-end // 1) - 1
            rows.append((f"{first:,}" if first >= last else f"{first:,} to {last:,}", counts[str(value)]))
        found.append((name.replace("_", " "), rows))
    return found


def fertility(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the tokenizer makes of all text, and of that of each language, kind and source."""
    report = metrics.get("tokenizer", {})
    rows = [("all", "", report["all"])] if report else []
    for group in ("language", "kind", "source"):
        sizes = report.get(group, {})
        rows += [(group, name or "not told", sizes[name]) for name in sorted(sizes, key=lambda n: -sizes[n]["tokens"])]
    return [{"group": group, "name": name, **sizes} for group, name, sizes in rows]
