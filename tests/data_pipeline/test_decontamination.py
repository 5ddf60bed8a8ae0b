"""Decontamination: evaluation items in any form are found in any form, and what is found is counted."""

import gzip
import json
import random
from collections import Counter
from itertools import cycle
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import zstandard
from datatrove.data import Document
from datatrove.pipeline.decont.n_grams import NGramsDecontConfig, NGramsDecontFilter, NGramsDecontIndexer
from datatrove.utils.text import TextNormConfig

from data_pipeline.artifact import Draft
from data_pipeline.config import PipelineConfig
from data_pipeline.corpus.chats import Chats
from data_pipeline.corpus.tasks import Tasks
from data_pipeline.engine.pieces import pieces_of, read_piece, writer
from data_pipeline.engine.survey import Survey
from data_pipeline.evaluation_sets import EvaluationSetError, Item, read_set, set_name
from data_pipeline.overlap import Index, Match
from data_pipeline.page import Page
from data_pipeline.steps.decontamination import Decontamination, cut

TEXTS = sorted({text.strip()[:3000] for text in topics.values() if len(text) > 1500})[:30]
MATCH = Match(n=13, shortest=5, queries=True, crossing=True, numbers=False, share=0.0)
QUESTION = "Which of the two travellers had left the lamp burning in the window, and for whose sake was it?"
ANSWER = "The elder sister, so that the ferryman would find the landing in the fog."


def set_of(path: Path, *records) -> str:
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def judged(step: Decontamination, texts: list[str], directory: Path, pieces: int = 2, workers: int = 1):
    """The step's verdict on each text, and the page after it."""
    ranks = cycle(range(pieces))
    with writer(directory / "pieces") as stream:
        for number, text in enumerate(texts):
            stream.write(Document(text, str(number), metadata={"kind": "prose"}), next(ranks))
    files = pieces_of(directory / "pieces", pieces)
    step.survey(Survey(files, directory / "survey", directory / "logs", workers))
    found = {}
    for rank, piece in enumerate(files):
        judge = step.verdicts(directory / "survey", rank)
        for number, document in enumerate(read_piece(piece)):
            page = Page(document.text, document.id, document.metadata)
            found[int(page.id)] = (judge(number, page), page)
    return [found[number] for number in range(len(texts))]


def with_inside(text: str, part: str) -> str:
    return f"{text[:1500]} {part} {text[1500:]}"


def test_an_item_is_found_however_it_is_set(tmp_path):
    path = set_of(tmp_path / "riddles.jsonl", {"question": QUESTION, "answer": ANSWER})
    told = [
        TEXTS[0],
        with_inside(TEXTS[1], QUESTION.upper().replace(" ", "\n")),
        with_inside(TEXTS[2], "the elder sister — so that the *ferryman* would find the “landing”, in the fog"),
        with_inside(TEXTS[3], "Which of the two travellers had left the lamp burning in the inn?"),
        with_inside(TEXTS[4], "for whose sake was it? The elder sister, so that the ferryman would come."),
    ]
    found = judged(Decontamination(sets=[path]), told, tmp_path)
    assert [reason for reason, _ in found] == [None, "contaminated", "contaminated", None, "contaminated"]
    assert found[1][1].metadata["contaminated_by"] == ["riddles"]
    assert found[2][1].metadata["contaminated_text"].startswith("the elder sister — so")


@pytest.mark.parametrize(
    ("changes", "contaminated"),
    [
        ({"queries": False}, [False, True, True]),
        ({"crossing": False}, [True, True, False]),
        ({"queries": False, "crossing": False}, [False, True, False]),
        ({"share": 0.5}, [False, False, True]),
        ({"share": 0.5, "crossing": False}, [True, False, False]),
        ({"n": 25, "queries": False}, [False, False, False]),
        ({"n": 24, "queries": False}, [False, False, True]),
        ({"n": 60}, [True, False, False]),
    ],
)
def test_what_counts_as_contamination_is_a_setting(changes, contaminated, tmp_path):
    path = set_of(tmp_path / "riddles.jsonl", {"question": QUESTION, "answer": ANSWER})
    border = " ".join([*QUESTION.split()[-12:], *ANSWER.split()[:12]])
    told = [with_inside(TEXTS[number], part) for number, part in enumerate((QUESTION, ANSWER, border))]
    found = judged(Decontamination(sets=[path], **changes), told, tmp_path)
    assert [reason is not None for reason, _ in found] == contaminated


def test_an_item_of_few_words_is_found_as_a_whole_and_only_so(tmp_path):
    path = set_of(tmp_path / "short.jsonl", {"question": "Is 4821 even or odd?", "answer": "odd"}, "none of these")
    told = ["Say, is 4821 even or odd? odd", "Is 4822 even or odd? even", "None of these are odd."]
    found = judged(Decontamination(sets=[path]), told, tmp_path)
    assert [reason for reason, _ in found] == ["contaminated", None, None]
    found = judged(Decontamination(sets=[path], numbers=True), told, tmp_path / "numbers")
    assert [reason for reason, _ in found] == ["contaminated", "contaminated", None]


@pytest.mark.parametrize(("queries", "crossing"), [(False, True), (True, True), (False, False)])
def test_what_is_found_is_what_datatrove_finds(queries, crossing, tmp_path):
    draw = random.Random(0)
    words = [text.split() for text in TEXTS]
    items = [
        Item(" ".join(w[40:62]), (" ".join(w[62 : 62 + length]),)) for w, length in zip(words, cycle((3, 3, 30, 30)))
    ]
    config = NGramsDecontConfig(12, queries, crossing, norm_config=TextNormConfig())
    hashes = NGramsDecontIndexer.compute_hashes
    indexer = NGramsDecontFilter(str(tmp_path / "index"), config)  # the indexer proper asks for lighteval
    known = [value for item in items[::2] for value in hashes(indexer, item.labels[0], item.query)]
    (tmp_path / "index").mkdir()
    np.array(known, dtype="<u8").tofile(tmp_path / "index/set.index.hashes")
    index = Index.of(items[::2], Match(12, 12, queries, crossing, numbers=True, share=0.0))
    told = [" ".join(w[(begin := draw.randrange(100)) : begin + draw.randrange(12, 60)]) for w in words * 8]
    ours = [bool(index.find(text.split()).items) for text in told]
    assert ours == [indexer.filter(Document(text, "")) is not True for text in told]
    assert 10 < sum(ours) < len(told) - 10


def test_what_is_found_is_counted_per_set_each_item_once(tmp_path):
    one = set_of(tmp_path / "one.jsonl", *({"text": text[:400]} for text in TEXTS[:4]))
    two = set_of(tmp_path / "two.jsonl", {"text": TEXTS[0][200:500]}, {"text": TEXTS[9][:300]})
    told = [TEXTS[0], TEXTS[0] + " Again.", TEXTS[2], TEXTS[6]]

    def counts(pieces: int, workers: int = 1) -> Counter:
        step = Decontamination(sets=[one, two])
        found = judged(step, told, tmp_path / f"{pieces}-{workers}", pieces, workers)
        return sum((page.counts for _, page in found), Counter())

    expected = {"one: documents": 3, "one: items": 2, "two: documents": 2, "two: items": 1}
    assert counts(1) == counts(3) == expected
    assert {name: state["items"] for name, state in Decontamination(sets=[one, two]).state().items()} == {
        "one": 4,
        "two": 2,
    }


def test_cutting_takes_out_the_run_with_its_margin_and_leaves_the_rest(tmp_path):
    path = set_of(tmp_path / "riddles.jsonl", {"question": QUESTION, "answer": ANSWER})
    step = Decontamination(sets=[path], action="cut", margin=50)
    (reason, page), (other, _) = judged(step, [with_inside(TEXTS[0], QUESTION), f"Read: {QUESTION}"], tmp_path)
    before, after = page.text.split("\n\n")[0], page.text[-1000:]
    assert (reason, other) == (None, "contaminated")
    assert TEXTS[0].startswith(before) and TEXTS[0].endswith(after)
    assert "travellers" not in page.text and len(TEXTS[0]) - 160 < len(page.text) < len(TEXTS[0])
    assert judged(Decontamination(sets=[path]), [page.text], tmp_path / "again", 1)[0][0] is None


def test_what_was_cut_out_does_not_stay_in_the_metadata_of_what_is_kept(tmp_path):
    question = f"{QUESTION} Write to jane.doe@company.org if you know the answer to this old riddle of theirs."
    step = Decontamination(sets=[set_of(tmp_path / "riddles.jsonl", {"question": question})], action="cut")
    (reason, kept), (other, lost) = judged(step, [with_inside(TEXTS[0], question), question], tmp_path)
    assert (reason, other) == (None, "contaminated")
    assert kept.metadata["contaminated_by"] == ["riddles"] and "jane.doe" not in f"{kept.metadata} {kept.text}"
    assert lost.metadata["contaminated_text"].startswith("Which of the two travellers")


def test_too_many_cuts_leave_nothing():
    text = "word " * 2000
    spans = [(start, start + 50) for start in range(300, 9000, 800)]
    assert cut(text, spans[:9], 100).count("\n\n") == 8  # what comes before the first is too short
    assert cut(text, spans, 100) == ""


def test_sets_are_read_in_the_forms_that_they_come_in(tmp_path):
    forms = {
        "mmlu.jsonl": {"question": "Q", "choices": ["a", "b"], "answer": 1},
        "letters.jsonl": {"question": "Q", "choices": ["a", "b"], "answer": "B"},
        "arc.jsonl": {"question": "Q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        "hellaswag.jsonl": {"ctx": "Q", "endings": ["a", "b"], "label": "1"},
        "squad.jsonl": {"context": "long", "question": "Q", "answers": {"text": ["b"], "answer_start": [1]}},
        "logged.jsonl": {"doc_id": 0, "doc": {"question": "Q", "answer": "b"}, "target": "b"},
        "bigbench.json": {"name": "x", "examples": [{"input": "Q", "target_scores": {"a": 0, "b": 1}}]},
        "splits.json": {"train": [{"input": "no", "target": "no"}], "test": [{"input": "Q", "target": "b"}]},
        "list.json": [{"input": "Q", "output": "b"}],
        "chat.jsonl": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "b"}]},
        "pairs.jsonl": {
            "prompt": [{"role": "user", "content": "Q"}],
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "a"}],
        },
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(json.dumps(content) + "\n")
        assert read_set(tmp_path / name) == [Item("Q", ("b",))], name
    line = json.dumps({"text": "b"}).encode()
    (tmp_path / "set.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "set.jsonl.zst").write_bytes(zstandard.compress(line))
    assert read_set(tmp_path / "set.jsonl.gz") == read_set(tmp_path / "set.jsonl.zst") == [Item("", ("b",))]
    (tmp_path / "plain.txt").write_text("One.\n\nTwo\nlines.\n")
    assert read_set(tmp_path / "plain.txt") == [Item("", ("One.",)), Item("", ("Two\nlines.\n",))]
    assert [set_name(f"sets/{name}") for name in ("v1.2", "set.jsonl.gz")] == ["v1.2", "set"]


def test_the_artifacts_of_a_lifecycle_are_sets_without_their_training_splits(tmp_path):
    tasks = Tasks(tasks=["parity"], train=8, validation=3, test=2, pairs=4, small_talk=0)
    tasks.run(PipelineConfig(corpus=tasks, run_dir=str(tmp_path / "tasks")), {"corpus": {}})
    (tmp_path / "own").mkdir()
    for split, question in (("train", TEXTS[5]), ("validation", QUESTION)):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ANSWER}]
        set_of(tmp_path / f"own/{split}.jsonl", {"messages": messages})
    chats = Chats(path=str(tmp_path / "own"))
    chats.run(PipelineConfig(corpus=chats, run_dir=str(tmp_path / "chats")), {"corpus": {}})
    step = Decontamination(sets=[str(tmp_path / "tasks"), str(tmp_path / "chats")])
    assert {name: len(items) for name, items in step.read().items()} == {"tasks": 3 + 2 + 3, "chats": 1}
    question = step.read()["tasks"][0].query
    found = judged(step, [f"They asked: {question}", QUESTION, TEXTS[5]], tmp_path)
    assert [page.metadata.get("contaminated_by") for _, page in found] == [["tasks"], ["chats"], None]


def test_what_is_no_evaluation_set_is_refused_with_a_reason(tmp_path):
    for name, content, message in (
        ("fields.jsonl", '{"a": 1, "b": 2}', r"fields.jsonl, record 1: found the fields a, b; expected"),
        ("broken.jsonl", '{"question": "Q"}\n{"quest', r"broken.jsonl, line 2: not JSON"),
        ("broken.json", "[1, ", r"broken.json, line 1: not JSON"),
        ("number.json", "[1]", r"record 1: found a int"),
        ("deep.json", "[" * 100_000, r"deep.json, line 1: not JSON"),
        ("empty.jsonl", "", r"holds no item"),
        ("archive.jsonl.gz", "no gzip", r"cannot be read"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(EvaluationSetError, match=message):
            read_set(tmp_path / name)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(EvaluationSetError, match="cannot be read"):
        read_set(tmp_path / "latin.txt")
    with pytest.raises(EvaluationSetError, match="nothing does not exist"):
        read_set(tmp_path / "nothing")
    (tmp_path / "model").mkdir()
    Draft(tmp_path / "model", "model", {}, {}).publish()
    with pytest.raises(EvaluationSetError, match="holds a 'model'"):
        read_set(tmp_path / "model")
    (tmp_path / "only").mkdir()
    set_of(tmp_path / "only/train.jsonl", {"text": "t"})
    with pytest.raises(EvaluationSetError, match="other than those of a training split"):
        read_set(tmp_path / "only")


def test_settings_that_cannot_work_are_reported_together(tmp_path):
    step = Decontamination(sets=["no/such.jsonl", "no/such.json"], n=0, share=2, action="burn", margin=-1)
    found = [problem.key for problem in step.problems("corpus.steps.decontamination")]
    keys = ["sets", "n", "margin", "share", "action"]
    assert found == [f"corpus.steps.decontamination.{key}" for key in keys]


def test_changed_items_are_another_state_and_other_spellings_of_a_file_are_not(tmp_path):
    path = set_of(tmp_path / "set.jsonl", {"question": QUESTION, "answer": ANSWER})
    before = Decontamination(sets=[path]).state()
    set_of(tmp_path / "set.jsonl", {"answer": ANSWER, "id": 3, "question": QUESTION})
    assert Decontamination(sets=[path]).state() == before
    set_of(tmp_path / "set.jsonl", {"question": QUESTION, "answer": "Nobody."})
    assert Decontamination(sets=[path]).state() != before
