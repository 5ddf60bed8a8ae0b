"""The data card: it says what the manifest says, shows nothing personal, and is one harmless file."""

import io
import itertools
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
import zstandard
from datatrove.data import Document
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline import agreement
from data_pipeline.card import bins, chats, contents, sankey
from data_pipeline.card.page import PAGE, render
from data_pipeline.card.samples import LENGTH, Pair, dropped, excerpt, kept, pairs
from data_pipeline.engine import documents as engine_documents
from data_pipeline.engine import pieces as engine_pieces
from data_pipeline.engine import portrait
from data_pipeline.engine.documents import all_rows
from data_pipeline.engine.pieces import VARIOUS, Tally, tallied
from data_pipeline.engine.portrait import OTHER, Portrait, portrayed
from data_pipeline.shards import Shard
from tests.data import write_shard
from tests.data_pipeline import cards
from tests.data_pipeline.test_corpus import made, texts  # noqa: F401  a fixture

HOSTILE = "</style></svg><script>alert(1)</script><img src=x onerror=alert(1)>\"'&{{ 987 * 13 }}\0\ud800"


class Page(HTMLParser):
    """What a reader sees, and whether every element is closed in order."""

    VOID = {"meta", "br", "path", "rect", "line"}

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.parts: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.parts))
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):  # noqa: F811
    return made(texts, tmp_path_factory.mktemp("runs") / "corpus")


def test_the_card_of_a_corpus_says_what_its_manifest_says(corpus):
    assert PAGE in corpus.files
    page = Page((corpus.path / PAGE).read_text())
    for step in corpus.metrics["steps"]:
        assert step["name"].replace("_", " ") in page.text
        for reason, count in step["dropped"].items():
            assert f"{reason.replace('_', ' ')} {count:,}" in page.text
    for split in corpus.metrics["splits"].values():
        assert f"{split['tokens']:,}" in page.text
    assert corpus.metrics["sources"][0]["licence"] in page.text
    assert "{broken" in page.text  # a sample of what could not be read


def test_tokens_of_the_sources_add_up_to_those_of_the_splits(corpus):
    total: Counter[str] = Counter()
    for entry in corpus.metrics["tokens"]:
        total.update(entry["splits"])
    assert total == {name: split["tokens"] for name, split in corpus.metrics["splits"].items()}
    for name, split in corpus.metrics["splits"].items():
        assert sum(corpus.metrics["lengths"][name].values()) == split["documents"]


def test_what_is_read_and_kept_is_all_in_the_portrait(corpus):
    steps = corpus.metrics["steps"]
    for when, documents in (("read", steps[0]["documents_out"]), ("kept", steps[-1]["documents_out"])):
        portrait = corpus.metrics["portrait"][when]
        for label in ("length", "year", "kind"):
            assert sum(portrait[label].values()) == documents


def test_documents_beside_a_shard_are_those_in_it_in_order(corpus):
    for split in corpus.metrics["splits"]:
        (root,) = corpus.path.glob("steps/split-*")
        pieces = sorted((root / split).iterdir()) if (root / split).exists() else []
        records = [(record, number) for number, file in enumerate(pieces) for record in lines(file)]
        rows = list(all_rows(corpus.path / f"shards/{split}.documents.parquet"))
        assert [row[0] for row in rows] == [record["id"] for record, _ in records]
        assert len(rows) == Shard(corpus.path / "shards" / split).documents


def lines(file: Path) -> list[dict]:
    with zstandard.open(file, "rb") as stream:
        return [json.loads(line) for line in io.BufferedReader(stream)]


def test_any_document_of_a_long_list_is_found_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_documents, "GROUP", 3)
    rows = [(f"id {n}", f"source {n % 2}", "MIT", n // 4) for n in range(10)]
    for part, some in enumerate((rows[:4], [], rows[4:])):
        written = engine_documents.Rows(tmp_path / f"{part}.parquet")
        for row in some:
            written.add(*row)
        written.close()
    stem = tmp_path / "train"
    engine_documents.merge([tmp_path / f"{part}.parquet" for part in range(3)], tmp_path / "train.documents.parquet")
    assert [engine_documents.row_of(stem, number) for number in range(10)] == rows
    shard = write_shard(stem, [[1] * (n + 1) for n in range(10)])
    counted = engine_documents.tokens_by_source(shard, tmp_path / "train.documents.parquet")
    assert counted == {("source 0", "MIT"): 1 + 3 + 5 + 7 + 9, ("source 1", "MIT"): 2 + 4 + 6 + 8 + 10}


# The page


def test_the_page_is_one_file_without_script_that_loads_nothing():
    html = render(**cards.contents())
    page = Page(html)
    assert not set(page.tags) & {"script", "link", "img", "iframe", "object", "embed", "form", "image", "use"}
    assert all(value.startswith("#") for name, value in page.attributes if name in ("href", "src"))
    assert not re.search(r"url\(|@import|javascript:", html)


@pytest.mark.parametrize("sources", [1, 300])
def test_a_page_is_drawn_for_any_number_of_sources_and_steps(sources):
    page = Page(render(**cards.contents(metrics=cards.metrics(sources, sources))))
    assert page.tags["section"] == 11
    assert ("280 more sources" in page.text) == (sources == 300)


def hostile(value):
    """The same shape, every text of it replaced by one that would like to be more than text."""
    if isinstance(value, dict):
        return {key: hostile(item) for key, item in value.items()}
    return (
        [hostile(item) for item in value] if isinstance(value, list) else HOSTILE if isinstance(value, str) else value
    )


def test_no_text_of_a_corpus_becomes_markup():
    metrics = cards.metrics()
    metrics["sources"] = hostile(metrics["sources"])
    for step in metrics["steps"]:
        step["name"] += HOSTILE
        step["dropped"] = {reason + HOSTILE: count for reason, count in step["dropped"].items()}
        step["counts"] = {label + HOSTILE: count for label, count in step["counts"].items()}
    for when in metrics["portrait"].values():
        when["language"] = {HOSTILE: 3, "x" + HOSTILE: 4}
    metrics["portrait"]["kept"]["score"] = {HOSTILE: {"0.5": 3}}
    metrics["tokenizer"] = {
        **metrics["tokenizer"],
        "source": {HOSTILE: cards.SIZES},
        "longest": [{"token": HOSTILE, "count": 1}],
        "unused_examples": [HOSTILE],
    }
    sample = cards.sample(HOSTILE, HOSTILE)
    honest = Page(render(**cards.contents()))
    page = Page(
        render(
            **cards.contents(
                metrics=metrics,
                topics={f"{name}{HOSTILE}": topic for name, topic in cards.TOPICS.items()},
                settings={
                    **cards.SETTINGS,
                    "steps": [[f"pii{HOSTILE}", "Pii", {HOSTILE: HOSTILE}, None]],
                    "x": HOSTILE,
                },
                dropped={f"pii{HOSTILE}": {f"too_much{HOSTILE}": [sample]}},
                kept=[sample],
                pairs=[Pair(HOSTILE, sample, sample)],
            )
        )
    )
    assert set(page.tags) <= set(honest.tags)
    assert page.tags["style"] == 1 and {name for name, _ in page.attributes} <= {name for name, _ in honest.attributes}
    assert "alert(1)" in page.text and "12831" not in page.text and "\0" not in page.text


def test_what_was_found_is_told_set_by_set_and_group_by_group():
    steps = contents.steps(
        cards.metrics()["steps"],
        cards.TOPICS,
        {name: (values, state) for name, _, values, state in cards.SETTINGS["steps"]},
        {},
    )
    by_name = {step.name: contents.tables(step) for step in steps}
    (sets,) = by_name["decontamination"]
    assert sets.columns == ["items of the set", "documents", "items"]
    assert sets.rows == [("gsm8k", [1319, 0, 0]), ("strategyqa", [229, 3, 2])]
    pronouns, sources = by_name["representation"]
    assert pronouns.title == "pronouns" and dict(pronouns.rows)["she"] == [900, 700]
    assert sources.rows == [("a/b", [9])]


def test_the_way_of_the_documents_tells_all_of_them():
    steps = contents.steps(cards.metrics(3)["steps"], {}, {}, {})
    drawn = contents.drawn(steps)
    assert drawn[0].documents_in == steps[0].documents_in
    assert sum(band.documents for step in drawn for band in step.dropped) == sum(step.lost for step in steps)
    for before, after in itertools.pairwise(drawn):
        assert before.documents_out == after.documents_in


def test_bands_are_as_wide_as_their_numbers():
    bands = [sankey.Band("half", 500), sankey.Band("tenth", 100)]
    svg = sankey.draw([sankey.Band("all", 1000)], [sankey.Step("step", 1000, bands)], [sankey.Band("train", 400)])
    widths = [
        float(right) - float(left)
        for right, left in re.findall(r'class="drop" d="M([\d.]+) .*? ([\d.]+) [\d.]+Z"', str(svg))
    ]
    assert widths == pytest.approx([sankey.WIDTH / 2, sankey.WIDTH / 10], abs=0.11)


def test_conversations_have_a_card_that_shows_what_is_said_and_nothing_personal(tmp_path):
    said = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "Ask jane.doe@company.org."}]
    records = {"train": [{"messages": said, "tools": [HOSTILE]}], "validation": [], "preferences_train": []}
    quarantine = [{"step": "read", "reason": HOSTILE, "fault": "x" + HOSTILE, "beginning": HOSTILE}]
    step = {"name": "read", "documents_in": 2, "documents_out": 1, "dropped": {HOSTILE: 1}, "counts": {HOSTILE: 2}}
    metrics = {"records": {"train": 1, "validation": 0, "preferences_train": 0}, "steps": [step], HOSTILE: HOSTILE}
    chats.write(tmp_path, metrics, {"format": HOSTILE}, records, quarantine)
    page = Page((tmp_path / PAGE).read_text())
    assert not set(page.tags) & {"script", "link", "img"} and page.tags["style"] == 1
    assert "alert(1)" in page.text and "12831" not in page.text
    assert "[email]" in page.text and "jane.doe" not in page.text and "assistant" in page.text


def test_a_card_of_votes_names_no_annotator(tmp_path):
    votes = {f"i{n}": {"Jane Doe": "a", "jane.doe@example-mail.com": "b", "a": "b"} for n in range(3)}
    quarantine = [
        {"step": "decide", "reason": "tie", "place": item, "record": {"id": item, "prompt": "Which?"}, "votes": given}
        for item, given in votes.items()
    ]
    metrics = {
        "records": {"preferences_train": 1},
        "agreement": agreement.report(votes, agreement.NOMINAL),
        "disagreements": [{"item": item, "votes": given} for item, given in votes.items()],
        "by jane.doe@example-mail.com": "of john.doe@example-mail.com",
    }
    kept = {"prompt": [{"role": "user", "content": "Which?"}], "votes": {"a": 2, "b": 1, "tie": 0}}
    chats.write(tmp_path, metrics, {"rule": "by john.doe@example-mail.com"}, {"preferences_train": [kept]}, quarantine)
    page = Page((tmp_path / PAGE).read_text()).text
    assert not re.search(r"(?i)(jane|john).doe", page)
    assert (
        "annotator 2 and annotator 3" in page and '"annotator 1": "a", "annotator 3": "b", "annotator 2": "b"' in page
    )
    assert '{"a": 2, "b": 1, "tie": 0}' in page  # counts of labels, though an annotator is called a


def test_roles_and_keys_of_records_are_masked(tmp_path):
    personal = "jane.doe@example-mail.com"
    said = [{"role": personal, "content": [{personal: personal}]}]
    record = {"messages": said, f"messages of {personal}": said, f"key {personal}": {personal: 1}}
    dropped = {"step": "read", "reason": "bad", "fault": personal, **record}
    chats.write(tmp_path, {"records": {"train": 1}}, {}, {"train": [record]}, [dropped])
    page = (tmp_path / PAGE).read_text()
    assert "jane.doe" not in page and "[email], messages of [email]" in page and "key [email]" in page


# What is counted and shown


@given(st.integers(0, 10**12))
def test_a_length_lies_in_its_bin(length):
    place = bins.of_length(length)
    assert bins.length_from(place) <= length < bins.length_from(place + 1) or (length, place) == (0, -1)


@given(st.floats(-1e6, 1e6, allow_nan=False))
def test_a_score_lies_above_the_edge_of_its_bin(score):
    edge = bins.of_score(score)
    assert abs(edge - score) <= max(0.0501, abs(score) * 0.5)
    assert 0 <= edge <= score or not 0 <= score <= 1


def test_labels_of_any_number_are_counted_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(portrait, "MOST_LABELS", 3)
    step, totals = Portrait(), Counter()
    step.stat_update = lambda label, value: totals.update({label: value})
    documents = [Document("text", str(n), metadata={"kind": "prose", "language": str(n)}) for n in range(10)]
    assert len(list(step.run(iter(documents)))) == 10
    assert portrayed(totals)["language"] == {"0": 1, "1": 1, "2": 1, OTHER: 7}


def test_licences_of_any_number_are_counted_in_bounded_memory(monkeypatch):
    monkeypatch.setattr(engine_pieces, "MOST_NAMES", 3)
    step, totals = Tally(["source", "licence"]), Counter()
    step.stat_update = lambda label, value: totals.update({label: value})
    documents = [Document("text", str(n), metadata={"source": "s", "licence": str(n)}) for n in range(10)]
    assert len(list(step.run(iter(documents)))) == 10
    counted = {name: counts["documents"] for name, counts in tallied(totals).items()}
    assert counted == {("s", "0"): 1, ("s", "1"): 1, ("s", "2"): 1, ("s", VARIOUS): 7}
    monkeypatch.setattr(engine_documents, "MOST_NAMES", 2)
    tokens = {("s", str(n)): {"train": n} for n in range(5)}
    assert engine_documents.bounded(tokens) == {
        ("s", "4"): {"train": 4},
        ("s", "3"): {"train": 3},
        ("s", VARIOUS): {"train": 3},
    }


def pieces(directory: Path, *records: dict) -> list[Path]:
    directory.mkdir()
    file = directory / "00000.jsonl.zst"
    text = "".join(json.dumps({"id": str(n), "metadata": {}} | record) + "\n" for n, record in enumerate(records))
    file.write_bytes(zstandard.compress(text.encode()))
    return [file]


def test_nothing_personal_is_shown(tmp_path):
    secret = "Write to jane.doe@company.org, or call +44 20 8366 1177. " + "Other text. " * 30
    private = dropped(pieces(tmp_path / "a", {"text": secret, "step": "pii", "reason": "email", "id": secret}), True)
    assert private["email"][0].text is None and private["email"][0].id == ""
    (tagged,) = kept(pieces(tmp_path / "t", {"text": secret, "metadata": {"pii": {"email": 1}}}))
    assert tagged.text is None and tagged.id == ""
    for shown in (
        dropped(pieces(tmp_path / "b", {"text": secret, "step": "length", "reason": "short"}), False)["short"],
        kept(pieces(tmp_path / "c", {"text": secret})),
    ):
        assert "jane.doe" not in shown[0].text and "8366" not in shown[0].text and "[email]" in shown[0].text


def test_samples_are_the_same_whatever_the_order_of_the_documents(tmp_path):
    records = [{"id": str(n), "text": f"text {n}", "metadata": {"source": str(n % 3)}} for n in range(100)]
    one, other = kept(pieces(tmp_path / "a", *records)), kept(pieces(tmp_path / "b", *reversed(records)))
    assert one == other and {sample.source for sample in one} == {"0", "1", "2"}


def test_a_copy_is_shown_beside_what_it_is_a_copy_of(tmp_path):
    original = {"id": "first", "text": "A text.", "metadata": {"near_duplicates": 1}}
    copy = {"id": "second", "text": "A text!", "reason": "near_duplicate", "metadata": {"duplicate_of": "first"}}
    lost = {"id": "third", "text": "A test!", "reason": "near_duplicate", "metadata": {"duplicate_of": "elsewhere"}}
    (pair,) = pairs(pieces(tmp_path / "kept", original), pieces(tmp_path / "dropped", copy, lost))
    assert (pair.dropped.id, pair.kept.id) == ("second", "first")


@given(st.text())
def test_an_excerpt_is_short(text):
    shown = excerpt(text)
    assert len(shown) <= LENGTH + 2 and text.strip("\n").startswith(shown.removesuffix(" …"))
