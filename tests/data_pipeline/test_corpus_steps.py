"""Steps that see the whole corpus, within a build: the same bytes whatever the processes and the kills."""

import json
import multiprocessing
import os
import random
import signal
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from data_pipeline.artifact import Artifact
from data_pipeline.corpus.build import CorpusError, build
from data_pipeline.corpus.text import TextCorpus
from data_pipeline.engine.contamination import Search, TallyItems
from data_pipeline.engine.duplicates import Cluster, Find, Sign
from data_pipeline.engine.pieces import read_records
from data_pipeline.sources.files import Files
from data_pipeline.steps.decontamination import Decontamination
from data_pipeline.steps.exact import Exact
from data_pipeline.steps.minhash import MinHashStep
from data_pipeline.steps.normalise import Normalise
from data_pipeline.steps.sentences import Sentences

TEXTS = sorted({" ".join(text.split())[:1800] for text in topics.values() if len(text) > 2500})[:24]
SHARED = " ".join(TEXTS[0].split()[20:110])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Documents, some of them twice, some nearly, some with a passage that others have too."""
    root, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for number, text in enumerate(TEXTS):
        (root / f"{number:02}.md").write_text(text)
    for number in range(4):
        (root / f"copy{number}.md").write_text(TEXTS[number])
        words = [word if draw.random() > 0.02 else "word" for word in TEXTS[number + 4].split()]
        (root / f"near{number}.md").write_text(" ".join(words))
        (root / f"part{number}.md").write_text(f"{TEXTS[number + 8][900:]} {SHARED} {TEXTS[number + 12][:900]}")
    return root


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    file = tmp_path_factory.mktemp("sets") / "exam.jsonl"
    records = [{"question": " ".join(TEXTS[number].split()[100:130]), "answer": "yes"} for number in (19, 20)]
    file.write_text("\n".join(map(json.dumps, [*records, {"question": "Nobody asks this anywhere, do they?"}])))
    return file


def made(root: Path, evaluation: Path, directory: Path, workers: int = 1, **changes) -> Artifact:
    steps = {
        "normalise": Normalise(),
        "exact": Exact(),
        "minhash": MinHashStep(),
        "sentences": Sentences(),
        "decontamination": Decontamination(sets=[str(evaluation)], action="cut", margin=20),
    } | changes
    corpus = TextCorpus(
        sources={"files": Files([str(root)])}, steps=steps, order=list(steps), vocabulary=300, pieces=3, validation=0.1
    )
    return build(corpus, directory, directory / "cache", workers)


@pytest.fixture(scope="module")
def corpus(texts, evaluation, tmp_path_factory):
    return made(texts, evaluation, tmp_path_factory.mktemp("runs") / "corpus")


def test_each_step_finds_its_kind_of_copy_and_says_so(corpus):
    steps = {step["name"]: step for step in corpus.metrics["steps"]}
    assert steps["exact"]["dropped"] == {"duplicate": 4}
    assert steps["minhash"]["dropped"] == {"near_duplicate": 4}
    assert steps["sentences"]["counts"]["sentences_removed"] > 3
    assert steps["decontamination"]["counts"] == {"exam: documents": 2, "exam: items": 2}
    copies = [
        r
        for name in ("exact", "minhash")
        for f in (corpus.path / f"quarantine/{name}").iterdir()
        for r in read_records(f)
    ]
    pairs = {r["id"].rsplit("/")[-1]: r["metadata"]["duplicate_of"].rsplit("/")[-1] for r in copies}
    assert pairs == {f"copy{n}.md": f"{n:02}.md" for n in range(4)} | {
        f"near{n}.md": f"{n + 4:02}.md" for n in range(4)
    }


@pytest.mark.slow
def test_the_number_of_processes_does_not_change_a_byte(corpus, texts, evaluation, tmp_path):
    assert made(texts, evaluation, tmp_path / "corpus", workers=2).id == corpus.id


@pytest.mark.parametrize(("target", "call"), [(Sign, 2), (Find, 1), (Cluster, 2), (Search, 3), (TallyItems, 1)])
@pytest.mark.slow
def test_a_killed_run_is_gone_on_with_and_ends_the_same(corpus, texts, evaluation, tmp_path, target, call):
    original, calls = target.run, Counter()

    def lethal(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    def work():
        target.run = lethal
        made(texts, evaluation, tmp_path / "corpus")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert made(texts, evaluation, tmp_path / "corpus").id == corpus.id


def test_a_step_that_calls_too_much_a_copy_stops_the_build(texts, evaluation, tmp_path):
    with pytest.raises(CorpusError, match=r"minhash: only \d+ of 32 .* asks for 95%.*\n  near_duplicate: .*near"):
        made(texts, evaluation, tmp_path / "corpus", minhash=MinHashStep(gate=0.95))
