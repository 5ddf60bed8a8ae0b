"""Examples that are there twice, nearly twice, or in an evaluation set."""

import pytest

from conf.errors import ConfigError
from data_pipeline.artifact import Artifact
from data_pipeline.examples import Example
from data_pipeline.formats.base import CHAT, KTO, PREFERENCE
from data_pipeline.repeats import contaminated, duplicates, near_duplicates, read_sets
from tests.data_pipeline.chats import write_jsonl
from tests.data_pipeline.conversations import TOOLS, answers, asks, call
from tests.data_pipeline.test_chats import TALK, make, records
from tests.data_pipeline.test_examples import counts_add_up, quarantined

LONG = "Please explain to me in a few simple words why the sky over the sea is blue on a clear day in summer"


def chat(question: str, *said: dict, split: str = "train", **others) -> Example:
    return Example(CHAT, {"messages": [asks(question), *(said or [answers("Yes.")])], **others}, question, split)


def pair(question: str, chosen: str, rejected: str) -> Example:
    record = {"prompt": [asks(question)], "chosen": [answers(chosen)], "rejected": [answers(rejected)]}
    return Example(PREFERENCE, record, f"{question}{chosen}{rejected}", "train")


def dropped(drops: dict, examples: list[Example]) -> list[int]:
    assert all(examples[number] and drop.reason and drop.fault for number, drop in drops.items())
    return sorted(drops)


def test_equal_prompts_and_answers_are_one_whatever_case_and_white_space():
    one = chat("What is it?")
    same = [chat("  WHAT is\nit? "), chat("What is it?", answers(" Yes. ")), chat("What is it?", source="theirs")]
    other = [
        chat("What is it?", answers("yes.")),
        chat("What was it?"),
        chat("What is it?", answers("Yes."), asks("Why?"), answers("So.")),
        chat("What is it?", tools=TOOLS),
        chat("What is it?", answers("Yes.", call("clock"))),
        pair("What is it?", "Yes.", "No."),
        pair("What is it?", "No.", "Yes."),
        Example(KTO, {"prompt": [asks("Is it?")], "completion": [answers("Yes.")], "label": True}, "good", "train"),
        Example(KTO, {"prompt": [asks("Is it?")], "completion": [answers("Yes.")], "label": False}, "bad", "train"),
    ]
    examples = [one, *other, *same]
    assert dropped(duplicates(examples), examples) == [10, 11, 12]
    assert duplicates(examples)[10].fault == "the same as What is it?"


def test_conversations_of_which_other_turns_are_learned_are_two():
    said = [answers("Yes."), asks("Why?"), answers("So.")]
    examples = [chat("What is it?", *said), chat("What is it?", said[0] | {"weight": 0}, *said[1:])]
    assert not duplicates(examples)


def test_what_is_held_out_stays_and_its_copy_for_training_goes():
    examples = [chat("What is it?"), chat("What is it ?"), Example(CHAT, chat("What is it?").record, "held", "test")]
    assert duplicates(examples)[0].fault == "the same as held"
    examples = [chat(f"{LONG}."), chat(f"{LONG} now?", split="validation")]
    assert dropped(near_duplicates(examples, 0.8), examples) == [0]


def test_prompts_that_are_nearly_the_same_are_one_and_all_answers_to_one_prompt_stay():
    examples = [
        chat(LONG),
        chat(LONG, answers("Otherwise.")),
        pair(LONG, "Yes.", "No."),
        chat(f"{LONG}!"),
        chat(LONG.replace("summer", "winter")),
        chat(LONG.replace("blue", "green").replace("simple", "long").replace("clear", "dark")),
        chat("Why?"),
        chat("Why not?"),
    ]
    assert dropped(near_duplicates(examples, 0.8), examples) == [3, 4]
    assert dropped(near_duplicates(examples, 1.0), examples) == [3]
    assert near_duplicates(examples, 0.8)[4].fault.startswith(f"the prompt is that of {LONG} by 0.9")


def test_numbers_tell_prompts_apart():
    asked = [chat(f"Tell me step by step and in simple words how much {n} times {n + 1} is, please") for n in range(50)]
    assert not near_duplicates(asked, 0.8)


def test_a_chain_of_likenesses_does_not_drop_what_is_unlike_all_that_stay():
    words = [f"w{n}" for n in range(40)]
    slide = [chat(" ".join(words[start : start + 30])) for start in range(0, 10)]
    assert dropped(near_duplicates(slide, 0.8), slide) == [1, 2, 3, 5, 6, 7, 9], "those like 0, like 4, like 8"


@pytest.fixture
def sets(tmp_path):
    write_jsonl(tmp_path / "sky.jsonl", [{"question": LONG, "answer": "For air scatters the short waves most."}])
    write_jsonl(tmp_path / "capitals.jsonl", [{"question": "What is the capital of Bhutan?", "answer": "Thimphu"}])
    return [str(tmp_path / "sky.jsonl"), str(tmp_path / "capitals.jsonl")]


def test_examples_for_training_that_hold_an_evaluation_item_are_dropped(sets):
    examples = [
        chat(f"Hello. {LONG.upper()}! Thanks."),
        chat("What is the capital of Bhutan?", answers("Thimphu")),
        chat("Which one is the capital of Nepal?", answers("Kathmandu")),
        chat(f"Hello. {LONG}! Thanks.", split="test"),
        pair("Ask me.", LONG, "No."),
        chat(" ".join(LONG.split()[:12])),
    ]
    drops = contaminated(examples, read_sets(sets), 13)
    assert dropped(drops, examples) == [0, 1, 4]
    assert drops[0].fault == "holds 1 items of sky" and drops[1].fault == "holds 1 items of capitals"
    assert 5 in contaminated(examples, read_sets(sets), 12)


def test_a_build_sifts_in_order_and_counts_add_up(tmp_path, sets):
    questions = [asks(f"{LONG}, part {n}?") for n in range(3)]
    rows = [*TALK, *TALK[:20], {"messages": [asks("What is the capital of Bhutan?"), answers("Thimphu")]}]
    write_jsonl(tmp_path / "mine" / "train.jsonl", [*rows, *({"messages": [q, answers("So.")]} for q in questions)])
    settings = {"validation": 0.1, "evaluation_sets": f"[{','.join(sets)}]"}
    make(tmp_path / "mine", tmp_path / "run", deduplicate="near", **settings)
    reasons = [(row["step"], row["reason"]) for row in quarantined(tmp_path / "run")]
    assert reasons == [
        *[("deduplicate", "duplicate")] * 20,
        *[("near_duplicates", "near_duplicate")] * 2,
        *[("decontaminate", "contaminated")] * 2,
    ]
    assert sorted(
        records(tmp_path / "run", "train") + records(tmp_path / "run", "validation"), key=lambda row: str(row)
    ) == sorted(TALK, key=lambda row: str(row))
    counts_add_up(tmp_path / "run")
    names = [step["name"] for step in Artifact.read(tmp_path / "run").metrics["steps"]]
    assert names == ["convert", "deduplicate", "near_duplicates", "decontaminate"]


def test_another_evaluation_set_is_another_recipe(tmp_path, sets, capsys):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK)
    make(tmp_path / "mine", tmp_path / "run", evaluation_sets=f"[{sets[0]}]")
    make(tmp_path / "mine", tmp_path / "run", evaluation_sets=f"[{sets[0]}]")
    assert "nothing to do" in capsys.readouterr().out
    write_jsonl(tmp_path / "sky.jsonl", [{"question": TALK[3]["messages"][0]["content"] * 3, "answer": "It is 3."}])
    make(tmp_path / "mine", tmp_path / "run", evaluation_sets=f"[{sets[0]}]")
    assert "is done" in capsys.readouterr().out


def test_settings_that_cannot_work_are_problems(tmp_path):
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, tmp_path / "run", deduplicate="some", similarity=0, overlap=0, evaluation_sets="[gone/a,gone/a]")
    for key in ("corpus.deduplicate=some", "corpus.similarity=0", "corpus.overlap=0", "corpus.evaluation_sets=gone/a"):
        assert key in str(caught.value)
