"""Votes at a terminal: each pair once, on disk at once, in an order that favours neither answer."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.records import RecordError
from data_pipeline.votes import read_items, read_votes
from tests.data_pipeline.chats import write_jsonl
from tools.annotate import AnnotateConfig, main, order_of, shown

ROOT = Path(__file__).parent.parent.parent
ITEMS = [{"id": f"i{n}", "prompt": f"What is {n}?", "responses": [f"good {n}", f"bad {n}"]} for n in range(6)]


@pytest.fixture
def config(tmp_path) -> AnnotateConfig:
    write_jsonl(tmp_path / "items.jsonl", ITEMS)
    return AnnotateConfig(str(tmp_path / "items.jsonl"), str(tmp_path / "votes" / "ann.jsonl"), "ann")


def typed(monkeypatch, config: AnnotateConfig, keys: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in keys)))
    assert main(config, {}) == 0


def votes(config: AnnotateConfig) -> list[dict]:
    return [json.loads(line) for line in Path(config.votes).read_text().splitlines()]


def test_what_is_typed_is_the_vote_whichever_answer_is_shown_first(config, monkeypatch, capsys):
    typed(monkeypatch, config, "120x1")
    out = capsys.readouterr().out
    first = votes(config)
    assert (
        len(first) == 4 and "'x' is none of these" in out and "4 votes of ann added" in out and "2 of 6 are left" in out
    )
    for key, vote in zip("1201", first, strict=True):
        order = order_of("ann", vote["item"])
        assert vote["label"] == {"1": order[0], "2": order[1], "0": "tie"}[key]
        block = out.partition(f"=== {vote['item']}\n")[2]
        assert block.index("good" if order[0] == "a" else "bad") < block.index("bad" if order[0] == "a" else "good")
    typed(monkeypatch, config, "s1")
    assert votes(config)[:4] == first and len({vote["item"] for vote in votes(config)}) == 5
    typed(monkeypatch, config, "q")
    assert len(votes(config)) == 5
    items = read_items(Path(config.items))
    assert sum(map(len, read_votes([Path(config.votes)], items).values())) == 5


def test_neither_answer_is_favoured_by_its_place():
    first = [order_of("ann", f"i{n}")[0] for n in range(1000)]
    assert 420 < first.count("a") < 580
    assert first != [order_of("bob", f"i{n}")[0] for n in range(1000)]


def test_text_cannot_steer_the_terminal():
    assert shown("a\x1b[2Jb\r\n\tc\u202e") == "a\ufffd[2Jb\ufffd\n\tc\ufffd"
    assert shown([{"role": "user", "content": "What?"}]) == "[user] What?"


def test_damaged_votes_are_refused_before_anything_is_asked(config, monkeypatch):
    write_jsonl(Path(config.votes), [{"item": "i9", "annotator": "ann", "label": "a"}])
    with pytest.raises(RecordError, match="item i9 is not among the items"):
        typed(monkeypatch, config, "1")


@pytest.mark.parametrize(
    ("item", "fault"),
    [
        ({"prompt": 5}, "prompt is int 5; expected text or messages"),
        ({"prompt": None}, "prompt is missing; expected text or messages"),
        ({"prompt": [{"from": "human", "value": "What?"}]}, "prompt[0].role is None; expected one of system"),
        ({"responses": ["good", 3]}, "responses[1] is int 3; expected text or messages"),
        ({"responses": ["good", [{"role": "assistant", "content": 3}]]}, "responses[1][0].content is int 3"),
    ],
)
def test_an_item_that_cannot_be_shown_is_refused_by_line(item, fault, config, monkeypatch):
    write_jsonl(Path(config.items), [ITEMS[0], ITEMS[1] | item])
    with pytest.raises(RecordError) as caught:
        typed(monkeypatch, config, "1")
    assert f"items.jsonl:2: {fault}" in str(caught.value)


def test_it_runs_as_a_command(config):
    arguments = [f"items={config.items}", f"votes={config.votes}", "annotator=ann"]
    ran = subprocess.run(
        [sys.executable, "-m", "tools.annotate", *arguments], input="1\n", capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0 and "1 votes of ann added" in ran.stdout and len(votes(config)) == 1
