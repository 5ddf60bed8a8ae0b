"""Records on their way into an artifact: nothing vanishes, and no prompt is in two splits."""

import json

import pytest

from conf.errors import ConfigError
from data_pipeline.artifact import Artifact
from data_pipeline.chat import ChatData
from data_pipeline.examples import Drop, Example, Ledger, LostExamplesError, SharedPromptError, split
from data_pipeline.formats.base import CHAT, KTO
from data_pipeline.kto import kto_faults
from data_pipeline.preference import PreferenceData
from data_pipeline.prompts import normalised, opening
from data_pipeline.publishing import QUARANTINE
from data_pipeline.records import RecordError
from tests.data_pipeline.chats import tokenizer, write_jsonl
from tests.data_pipeline.conversations import answers, asks
from tests.data_pipeline.test_chats import TALK, make, records


def question(n: int) -> str:
    return f"What is {n}?"


def mixed(n: int) -> list[dict]:
    """One prompt in every kind of record and in different spellings."""
    return [
        {"messages": [asks(question(n)), answers("Yes."), asks("Why?"), answers("So.")]},
        {"instruction": f"  WHAT is\t{n}? ", "output": "It is."},
        {"system": "Be brief.", "prompt": question(n).upper(), "chosen": "Yes.", "rejected": "No."},
        {"prompt": question(n), "completion": "No.", "label": False},
        {"prompt": question(n), "ranked": ["Yes.", "No.", "Fox."]},
    ]


def quarantined(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / QUARANTINE).read_text().splitlines()]


def counts_add_up(run_dir) -> None:
    for step in Artifact.read(run_dir).metrics["steps"]:
        assert step["documents_in"] == step["documents_out"] + sum(step["dropped"].values())


def test_all_kinds_are_recognised_in_one_file_and_none_of_their_prompts_is_in_two_splits(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", [record for n in range(300) for record in mixed(n)])
    make(tmp_path / "mine.jsonl", tmp_path / "run", validation=0.1, test=0.1)
    found: dict[str, set] = {split: set() for split in ("train", "validation", "test")}
    numbers = {}
    for prefix in ("", "preferences_", "kto_"):
        for name, prompts in found.items():
            rows = records(tmp_path / "run", prefix + name)
            prompts |= {opening(row) for row in rows}
            numbers[prefix] = numbers.get(prefix, 0) + len(rows)
    assert numbers == {"": 600, "preferences_": 300 * 4, "kto_": 300}
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 300
    assert all(15 <= len(found[name]) <= 45 for name in ("validation", "test"))
    assert not any(kto_faults(row) for row in records(tmp_path / "run", "kto_train"))
    for data in (ChatData, PreferenceData):
        assert len(data(str(tmp_path / "run"), 256).open("train", tokenizer(), 0)) > 0
    steps = Artifact.read(tmp_path / "run").metrics["steps"]
    assert steps[0]["documents_in"] == steps[0]["documents_out"] == 1500 and steps[0]["counts"]["examples"] == 2100
    assert steps[0]["counts"]["ranked"] == 300


def test_a_prompt_is_what_the_user_says_first():
    talk = [asks("What?"), answers("Yes."), asks("Why?"), answers("So.")]
    system = {"role": "system", "content": "Be brief."}
    assert opening({"messages": talk}) == opening({"messages": [system, *talk[:2]]}) == "what?"
    assert opening({"prompt": talk[:3], "chosen": talk[3:]}) == "what?"
    assert opening({"messages": [answers("Hello."), *talk]}) == "what?"
    assert opening({"messages": [asks("A"), asks("B"), answers("C")]}) == "a b"
    assert opening({"messages": [system, answers("Hello.")]}) == "be brief. hello."


def test_normalised_prompts_differ_in_nothing_a_person_would_see():
    assert normalised("  ＡＢ\u00a0ﬁx\n STRASSE ") == normalised("ab fix straße") == "ab fix strasse"
    assert normalised("1+1") != normalised("1-1")


def test_splits_that_share_a_prompt_are_refused_with_the_places(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK)
    rows = [{"prompt": "WHAT is  7?", "chosen": "Yes.", "rejected": "No."}]
    write_jsonl(tmp_path / "mine" / "preferences_validation.jsonl", rows)
    write_jsonl(tmp_path / "mine" / "validation.jsonl", [{"messages": [asks("Who?"), answers("He.")]}, TALK[3]])
    with pytest.raises(SharedPromptError) as caught:
        make(tmp_path / "mine", tmp_path / "run")
    assert "2 prompts in several splits" in str(caught.value)
    assert '"what is 3?" in train.jsonl:4 and validation.jsonl:2' in str(caught.value)
    assert '"what is 7?" in preferences_validation.jsonl:1 and train.jsonl:8' in str(caught.value)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_prompt_that_one_file_places_is_there_for_all_kinds(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK[:50])
    write_jsonl(tmp_path / "mine" / "validation.jsonl", TALK[50:60])
    pairs = [{"prompt": question(n), "chosen": "Yes.", "rejected": "No."} for n in range(60)]
    write_jsonl(tmp_path / "mine" / "preferences_train.jsonl", pairs)
    # Whole kinds are split by the others' splits, and prompts that only they have by hash.
    make(tmp_path / "mine", tmp_path / "run")
    held_out = {opening(row) for row in records(tmp_path / "run", "preferences_validation")}
    assert held_out == {normalised(question(n)) for n in range(50, 60)}


def test_where_a_prompt_goes_depends_on_nothing_but_the_prompt():
    made = [Example(CHAT, {"messages": [asks(question(n)), answers("a")]}, "", "train") for n in range(200)]
    whole = split(made, 0.2, 0.2)
    for half in (made[::2], made[1::2]):
        for name, rows in split(half, 0.2, 0.2).items():
            assert all(row in whole[name] for row in rows)


def test_bad_records_of_all_files_are_told_together_or_go_to_quarantine(tmp_path, capsys):
    write_jsonl(tmp_path / "mine" / "train.jsonl", [*TALK, {"messages": []}, {"what": 1}])
    file = write_jsonl(tmp_path / "mine" / "preferences_train.jsonl", [mixed(n)[2] for n in range(100)] + [TALK[0]])
    file.write_bytes(file.read_bytes() + b'{"prompt": "\xff"}\n{"prom')
    with pytest.raises(RecordError, match=r"5 faults in .*mine; nothing was started"):
        make(tmp_path / "mine", tmp_path / "run")
    make(tmp_path / "mine", tmp_path / "run", bad="quarantine", validation=0.1)
    dropped = quarantined(tmp_path / "run")
    assert [(row["place"], row["reason"]) for row in dropped] == [
        ("preferences_train.jsonl:101", "wrong_shape"),
        ("preferences_train.jsonl:102", "not_utf8"),
        ("preferences_train.jsonl:103", "not_json"),
        ("train.jsonl:201", "wrong_shape"),
        ("train.jsonl:202", "unknown_format"),
    ]
    assert "a record of format messages in a file whose name says preference" in dropped[0]["fault"]
    assert dropped[0]["record"] == TALK[0] and dropped[2]["beginning"] == '{"prom'
    counts_add_up(tmp_path / "run")
    assert Artifact.read(tmp_path / "run").metrics["steps"][0]["dropped"] == {
        "not_json": 1, "not_utf8": 1, "unknown_format": 1, "wrong_shape": 2,
    }  # fmt: skip
    assert "5 are in" in capsys.readouterr().out


def test_fields_of_other_names_are_said_on_the_command_line(tmp_path):
    write_jsonl(tmp_path / "mine.jsonl", [{"question": question(n), "answer": "Yes."} for n in range(60)])
    make(
        tmp_path / "mine.jsonl",
        tmp_path / "run",
        "+corpus.rename={prompt: question, completion: answer}",
        validation=0.2,
    )
    assert records(tmp_path / "run", "train")[0]["messages"][1] == answers("Yes.")


def test_files_whose_names_say_no_split_are_mentioned(tmp_path, capsys):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK)
    write_jsonl(tmp_path / "mine" / "more.jsonl", TALK)
    make(tmp_path / "mine", tmp_path / "run")
    assert "not read, for their names say no split: more.jsonl" in capsys.readouterr().out


def test_a_step_whose_counts_do_not_add_up_is_a_bug_that_is_told():
    example = Example(KTO, {}, "train.jsonl:1", "train")
    ledger = Ledger()
    assert ledger.sift("judge", [example, example], {0: Drop("low_score", "score 1")}) == [example]
    with pytest.raises(LostExamplesError, match="judge was given 3, kept 1 and dropped 1"):
        ledger.enter("judge", 3, 1, [{"reason": "low_score"}])


def test_settings_that_cannot_work_are_problems(tmp_path):
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, tmp_path / "run", format="vicuna", bad="ignore")
    assert "corpus.format=vicuna: one of alpaca, completion" in str(caught.value)
    assert "corpus.bad=ignore: one of refuse, quarantine" in str(caught.value)
