"""corpus=votes: what annotators decide becomes preferences, and what they do not is in quarantine."""

import json
import random

import pytest
from hydra import compose, initialize_config_module

from conf import entry
from conf.errors import ConfigError
from data_pipeline.artifact import Artifact
from data_pipeline.config import PipelineConfig
from data_pipeline.preference import PreferenceData
from data_pipeline.publishing import QUARANTINE
from data_pipeline.records import RecordError
from tests.data_pipeline.chats import tokenizer, write_jsonl
from tests.data_pipeline.conversations import answers, asks
from tests.data_pipeline.test_chats import records


def items(count: int) -> list[dict]:
    return [{"id": f"i{n}", "prompt": f"What is {n}?", "responses": [f"It is {n}.", "Go away."]} for n in range(count)]


def vote(item: int, **labels: str) -> list[dict]:
    return [{"item": f"i{item}", "annotator": name, "label": label} for name, label in labels.items()]


def make(tmp_path, votes: list[dict], count: int, **settings) -> None:
    write_jsonl(tmp_path / "items.jsonl", items(count))
    write_jsonl(tmp_path / "votes.jsonl", votes)
    overrides = [
        "corpus=votes",
        f"run_dir={tmp_path / 'run'}",
        f"corpus.items={tmp_path / 'items.jsonl'}",
        f"corpus.votes=[{tmp_path / 'votes.jsonl'}]",
    ]
    with initialize_config_module("conf", version_base="1.3"):
        node = compose("data_pipeline", overrides=overrides + [f"corpus.{k}={v}" for k, v in settings.items()])
    config = entry.typed(node, PipelineConfig)
    assert config.corpus.run(config, {}) == 0


def agreed(count: int, **skill: float) -> list[dict]:
    """Votes on items of which a is the better answer, by annotators who say so with a given probability."""
    draw = random.Random(0)
    return [
        row
        for n in range(count)
        for row in vote(n, **{name: "a" if draw.random() < p else "b" for name, p in skill.items()})
    ]


def test_the_majority_decides_and_the_votes_go_along(tmp_path):
    decided = vote(0, A="a", B="a", C="b") + vote(1, A="b", B="b")
    undecided = vote(2, A="a", B="b") + vote(3, A="a") + vote(4, A="tie", B="tie", C="a")
    more = [row for n in range(6, 80) for row in vote(n, A="a", B="a")]
    make(tmp_path, decided + undecided + more, 80, validation=0.1)
    rows = records(tmp_path / "run", "preferences_train") + records(tmp_path / "run", "preferences_validation")
    by_id = {row["id"]: row for row in rows}
    assert by_id["i0"] == {
        "prompt": [asks("What is 0?")],
        "chosen": [answers("It is 0.")],
        "rejected": [answers("Go away.")],
        "id": "i0",
        "votes": {"a": 2, "b": 1, "tie": 0},
    }
    assert by_id["i1"]["chosen"] == [answers("Go away.")]
    assert len(PreferenceData(str(tmp_path / "run")).open("train", tokenizer(), 0)) > 0
    dropped = [json.loads(line) for line in (tmp_path / "run" / QUARANTINE).read_text().splitlines()]
    assert [(row["place"], row["reason"]) for row in dropped] == [
        ("i2", "no_majority"),
        ("i3", "too_few_votes"),
        ("i4", "tie"),
        ("i5", "too_few_votes"),
    ]
    assert dropped[0]["votes"] == {"A": "a", "B": "b"}
    metrics = Artifact.read(tmp_path / "run").metrics
    assert [row["item"] for row in metrics["disagreements"]] == ["i0", "i2", "i4"]
    assert metrics["steps"][0]["documents_in"] == 80 == len(rows) + len(dropped)


def test_unanimity_takes_only_what_all_say(tmp_path):
    make(tmp_path, agreed(200, A=0.9, B=0.9, C=0.9), 200, rule="unanimity", validation=0.1)
    rows = records(tmp_path / "run", "preferences_train")
    assert rows and all(sorted(row["votes"].values()) == [0, 0, 3] for row in rows)


def test_a_weak_annotator_is_named_and_can_be_left_out(tmp_path, capsys):
    votes = agreed(200, A=0.95, B=0.95, C=0.95, D=0.5)
    make(tmp_path, votes, 200, validation=0.1)
    assert "D agrees with the others' majority on" in capsys.readouterr().out
    assert all(sum(row["votes"].values()) == 4 for row in records(tmp_path / "run", "preferences_train"))
    make(tmp_path, votes, 200, validation=0.1, leave_out_weak=True)
    assert all(sum(row["votes"].values()) == 3 for row in records(tmp_path / "run", "preferences_train"))
    found = {
        one["annotator"]: one["weak"] for one in Artifact.read(tmp_path / "run").metrics["agreement"]["annotators"]
    }
    assert found == {"A": False, "B": False, "C": False, "D": True}


def test_bad_votes_and_items_are_told_together(tmp_path):
    bad = [*vote(0, A="a"), *vote(0, A="b"), *vote(7, A="a"), {"item": "i0", "annotator": "", "label": 3}, [1]]
    with pytest.raises(RecordError) as caught:
        make(tmp_path, bad, 2)
    for fault in (
        "votes.jsonl:2: A voted a on i0 before; expected one vote",
        "votes.jsonl:3: item i7 is not among the items",
        'votes.jsonl:4: annotator is str ""; expected text',
        "votes.jsonl:4: label is int 3; expected one of a, b, tie",
        "votes.jsonl:5: list [1]; expected",
    ):
        assert fault in str(caught.value)
    with pytest.raises(RecordError, match="3 faults"):
        from data_pipeline.votes import read_items

        read_items(write_jsonl(tmp_path / "bad.jsonl", [*items(1), *items(1), {"id": "x", "responses": ["a"]}]))


def test_settings_that_cannot_work_are_problems(tmp_path):
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, [], 1, rule="loudest", least=0, items="gone.jsonl")
    for problem in ("corpus.items=gone.jsonl: a file that exists", "corpus.rule=loudest", "corpus.least=0"):
        assert problem in str(caught.value)
