"""Deduplication: datatrove's answer, whatever the pieces, the processes and the memory; every copy says of what."""

import random
from collections import Counter, defaultdict
from itertools import cycle
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.sentence_dedup import (
    SentDedupConfig,
    SentenceDedupFilter,
    SentenceDedupSignature,
    SentenceFindDedups,
)
from datatrove.utils.text import simplify_text, split_into_words
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.engine import duplicates
from data_pipeline.engine.duplicates import join, roots
from data_pipeline.engine.pieces import PieceReader, execute, pieces_of, read_piece, writer
from data_pipeline.engine.survey import Survey
from data_pipeline.page import Page
from data_pipeline.shingles import MinHash, Words
from data_pipeline.steps.base import CODE, CorpusStep
from data_pipeline.steps.exact import Exact
from data_pipeline.steps.minhash import MinHashStep
from data_pipeline.steps.sentences import Sentences

WORDS = Words()
Found = dict[str, tuple[str | None, Page]]
TEXTS = sorted({text.strip()[:2500] for text in topics.values() if len(text) > 800})[:24]


def near_copy(text: str, share: float, draw: random.Random) -> str:
    """The text with a share of its words exchanged for others."""
    return " ".join("word" if draw.random() < share else word for word in text.split(" "))


def documents(seed: int = 0) -> list[tuple[str, str]]:
    """(id, text), shuffled: some without a copy, some with exact and near copies, copies of copies, something short."""
    draw, made = random.Random(seed), []
    for number, text in enumerate(TEXTS):
        versions = [text]
        for _ in range(number % 4):
            versions.append(near_copy(versions[-1], 0.03, draw))
        versions += [text] * (number % 3 == 2)
        made += [(f"{draw.randrange(10**6):06}-{number}", version) for version in versions]
    made += [("short", "Two words."), ("blank", "."), ("far", near_copy(TEXTS[0], 0.5, draw))]
    draw.shuffle(made)
    return made


def written(rows: list[tuple[str, str]], directory: Path, count: int) -> list[Path]:
    """The documents dealt to pieces."""
    ranks = cycle(range(count))
    with writer(directory) as stream:
        for name, text in rows:
            stream.write(Document(text, name, metadata={"kind": "prose"}), next(ranks))
    return pieces_of(directory, count)


def judged(
    step: CorpusStep, pieces: list[Path], directory: Path, workers: int = 1
) -> dict[str, tuple[str | None, Page]]:
    """Id -> the step's verdict, and the page after it."""
    step.survey(Survey(pieces, directory / "survey", directory / "logs", workers))
    found = {}
    for rank, piece in enumerate(pieces):
        judge = step.verdicts(directory / "survey", rank)
        for number, document in enumerate(read_piece(piece)):
            page = Page(document.text, document.id, document.metadata)
            found[page.id] = (judge(number, page) if step.judges(page) else None, page)
    return found


def clusters(found: Found) -> set[frozenset[str]]:
    """Ids of copies, each set with the one that was kept."""
    members = defaultdict(set)
    for name, (reason, page) in found.items():
        if reason:
            members[page.metadata["duplicate_of"]] |= {name, page.metadata["duplicate_of"]}
    return {frozenset(ids) for ids in members.values()}


def datatroves_clusters(pieces: list[Path], directory: Path, config: MinhashConfig) -> set[frozenset[str]]:
    signatures, buckets, out = (str(directory / name) for name in ("signatures", "buckets", "out"))
    execute([PieceReader(pieces), MinhashDedupSignature(signatures, config)], directory / "1", len(pieces), 1)
    execute([MinhashDedupBuckets(signatures, buckets, config=config)], directory / "2", config.num_buckets, 1)
    execute([MinhashDedupCluster(buckets, out, config, save_cluster_id=True)], directory / "3", 1, 1)
    members = defaultdict(set)
    for rank, piece in enumerate(pieces):
        ids = [document.id for document in read_piece(piece)]
        if (file := directory / f"out/{rank:06}.clusters").exists():
            for number, cluster in np.fromfile(file, dtype="<u4").reshape(-1, 2):
                members[int(cluster)].add(ids[number])
    return {frozenset(ids) for ids in members.values()}


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60) | st.text("aé1.,'\"-_/ \n\t()@’´\u0301٣", max_size=60))
def test_words_are_compared_as_datatrove_compares_them(text):
    assert [word.decode() for word in WORDS.of(text)] == split_into_words(simplify_text(text))


@pytest.mark.parametrize("changes", [{}, {"n": 3, "bands": 4, "rows": 2, "seed": 7}])
def test_signatures_are_those_of_datatrove(changes, tmp_path):
    ours, words = MinHash(**changes), Words()
    config = MinhashConfig(n_grams=ours.n, num_buckets=ours.bands, hashes_per_bucket=ours.rows, seed=ours.seed)
    theirs = MinhashDedupSignature(str(tmp_path), config)
    for text in TEXTS:
        assert ours.signature(words.of(text)).tolist() == theirs.get_signature(theirs.get_shingles(text))
    assert ours.signature(words.of("Two words.")) is None


@pytest.mark.parametrize("pieces", [1, 3])
def test_near_duplicates_are_those_of_datatrove(pieces, tmp_path):
    files = written(documents(), tmp_path / "pieces", pieces)
    found = judged(MinHashStep(), files, tmp_path / "ours")
    theirs = datatroves_clusters(files, tmp_path / "theirs", MinhashConfig())
    assert clusters(found) == theirs
    assert len(theirs) > 10 and max(map(len, theirs)) > 3


def test_a_copy_says_of_what_and_what_is_kept_says_how_many(tmp_path):
    for step, reason in ((Exact(), "duplicate"), (MinHashStep(), "near_duplicate")):
        found = judged(step, written(documents(), tmp_path / reason / "pieces", 3), tmp_path / reason)
        dropped = Counter(page.metadata["duplicate_of"] for verdict, page in found.values() if verdict)
        kept = {name: page.metadata for name, (verdict, page) in found.items() if not verdict}
        assert dropped == {name: metadata[f"{reason}s"] for name, metadata in kept.items() if f"{reason}s" in metadata}
        assert {verdict for verdict, _ in found.values()} == {None, reason}


def test_of_equal_texts_one_stays(tmp_path):
    rows = documents()
    found = judged(Exact(), written(rows, tmp_path / "pieces", 3), tmp_path)
    kept = {name for name, (reason, _) in found.items() if not reason}
    first = {text: min(name for name, other in rows if other == text) for _, text in rows}
    assert kept == set(first.values())


@pytest.mark.parametrize("step", [Exact(), MinHashStep()])
def test_which_copy_stays_depends_on_nothing_but_the_documents(step, tmp_path):
    def kept(seed: int, pieces: int) -> dict[str, str | None]:
        rows, directory = documents(), tmp_path / f"{seed}-{pieces}"
        random.Random(seed).shuffle(rows)
        found = judged(step, written(rows, directory / "pieces", pieces), directory)
        return {name: page.metadata.get("duplicate_of") for name, (_, page) in found.items()}

    assert kept(1, 1) == kept(2, 3) == kept(3, 7)
    assert any(kept(4, 2).values())


def test_what_exceeds_memory_is_found_in_parts(tmp_path, monkeypatch):
    files = written(documents(), tmp_path / "pieces", 3)
    steps = {"exact": Exact(), "minhash": MinHashStep(), "sentences": Sentences()}

    def outcome(directory: Path) -> dict[str, list]:
        found = {name: judged(step, files, directory / name) for name, step in steps.items()}
        return {
            step: [(name, reason, page.text, page.metadata) for name, (reason, page) in pages.items()]
            for step, pages in found.items()
        }

    whole = outcome(tmp_path / "whole")
    monkeypatch.setattr(duplicates, "RUN", 5)
    monkeypatch.setattr(duplicates, "PART", 70)
    assert outcome(tmp_path / "parts") == whole
    assert len(list((tmp_path / "parts/minhash/survey/runs").iterdir())) > 9
    assert len(list((tmp_path / "parts/minhash/survey/repeats").iterdir())) > 9


def test_other_kinds_of_documents_are_neither_compared_nor_dropped(tmp_path):
    found = judged(Exact(kinds=CODE), written(documents(), tmp_path / "pieces", 2), tmp_path)
    assert not any(reason for reason, _ in found.values())


def test_nothing_is_found_in_an_empty_corpus(tmp_path):
    for step in (Exact(), MinHashStep(), Sentences()):
        assert judged(step, pieces_of(tmp_path / "none", 2), tmp_path / type(step).__name__) == {}


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=40))
def test_clusters_are_the_connected_components(edges):
    parents = np.arange(21)
    for part in (edges[::2], edges[1::2]):
        one, other = np.array(part, dtype=int).reshape(-1, 2).T
        join(parents, one, other)
    reached = {node: {node} for node in range(21)}
    for a, b in edges:
        union = reached[a] | reached[b]
        for node in union:
            reached[node] = union
    assert roots(parents, np.arange(21)).tolist() == [min(reached[node]) for node in range(21)]


def with_shared_sentences(seed: int = 0) -> list[tuple[str, str]]:
    """(id, text): paragraphs that some documents share, within them too, and documents that are nothing else."""
    draw = random.Random(seed)
    paragraphs = [" ".join(text.split())[:700] for text in TEXTS]
    rows = []
    for number in range(30):
        own = " ".join(near_copy(draw.choice(paragraphs), 0.5, draw) for _ in range(2))
        parts = [own, *draw.choices(paragraphs, k=number % 3)]
        draw.shuffle(parts)
        rows.append((f"{number:02}", "\n\n".join(parts)))
    return [*rows, ("whole", paragraphs[0]), ("again", paragraphs[0]), ("Short.", "Short. Text.")]


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("changes", [{}, {"span": 2, "least_words": 0, "least_sentences": 0}, {"least_words": 150}])
def test_texts_without_repeated_sentences_are_those_of_datatrove(pieces, changes, tmp_path):
    files = written(with_shared_sentences(), tmp_path / "pieces", pieces)
    step = Sentences(**changes)
    ours = {name: page.text for name, (reason, page) in judged(step, files, tmp_path / "ours").items() if not reason}
    config = SentDedupConfig(
        n_sentences=step.span, min_doc_words=step.least_words, min_num_sentences=step.least_sentences
    )
    signatures, repeats = str(tmp_path / "signatures"), str(tmp_path / "repeats")
    execute([PieceReader(files), SentenceDedupSignature(signatures, config=config)], tmp_path / "1", pieces, 1)
    execute([SentenceFindDedups(signatures, repeats, config=config)], tmp_path / "2", 1, 1)
    keep = [PieceReader(files), SentenceDedupFilter(repeats, config), writer(tmp_path / "out")]
    execute(keep, tmp_path / "3", pieces, 1)
    theirs = {d.id: d.text for file in pieces_of(tmp_path / "out", pieces) for d in read_piece(file)}
    assert ours == theirs
    before = {document.id: document.text for file in files for document in read_piece(file)}
    assert len(ours) < len(before) or changes.get("least_words") == 0
    assert sum(text != before[name] for name, text in ours.items()) > 5


def test_a_document_left_too_short_says_whose_sentences_it_repeated(tmp_path):
    rows = [("a", TEXTS[0]), ("b", TEXTS[1]), ("c", TEXTS[0])]
    reason, page = judged(Sentences(), written(rows, tmp_path / "pieces", 1), tmp_path)["c"]
    assert (reason, page.metadata["duplicate_of"]) == ("repeated_sentences", "a")
    assert page.counts["sentences_removed"] > 3
