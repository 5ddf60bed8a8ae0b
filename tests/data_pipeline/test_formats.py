"""Formats: what each record becomes, and what is said of those that are none."""

import json

import pytest

from data_pipeline.examples import Ledger, Source, convert
from data_pipeline.formats.base import FORMATS, recognised
from data_pipeline.records import RecordError
from tests.data_pipeline.chats import write_jsonl
from tests.data_pipeline.conversations import ONE_CALL, TOOLS, TWO_CALLS, WEATHER, answers, asks, call, result

TALK = [asks("What?"), answers("Yes.")]
SYSTEM = {"role": "system", "content": "Be brief."}
HH = "\n\nHuman: What?\n\nAssistant: A fox.\n\nHuman: Why?\n\nAssistant:"
PAIR = {"prompt": TALK[:1], "chosen": TALK[1:], "rejected": [answers("No.")]}

CASES = {
    "messages": ({"messages": TALK, "source": "mine"}, [{"messages": TALK, "source": "mine"}]),
    "messages in parts": (
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "Be "}, "brief."]}, *TALK]},
        [{"messages": [SYSTEM, *TALK]}],
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Yes."}], "id": "7"},
        [{"messages": TALK, "id": "7"}],
    ),
    "sharegpt with a system and roles of OpenAI": (
        {"system": "Be brief.", "conversations": TALK},
        [{"messages": [SYSTEM, *TALK]}],
    ),
    "sharegpt that calls": (
        {
            "tools": json.dumps([WEATHER["function"]]),
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Ulm"}}'},
                {"from": "observation", "value": "no"},
                {"from": "gpt", "value": "No."},
            ],
        },
        [
            {
                "messages": [asks("Rain?"), answers("", call("weather", city="Ulm")), result("no"), answers("No.")],
                "tools": [WEATHER],
            }
        ],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 2", "output": "4"},
        [{"messages": [asks("Add.\n\n2 and 2"), answers("4")]}],
    ),
    "alpaca with a history": (
        {"instruction": "Why?", "input": "", "output": "So.", "system": "Be brief.", "history": [["What?", "Yes."]]},
        [{"messages": [SYSTEM, *TALK, asks("Why?"), answers("So.")]}],
    ),
    "completion": ({"prompt": "What?", "completion": "Yes."}, [{"messages": TALK}]),
    "completion of messages": (
        {"prompt": [SYSTEM, *TALK[:1]], "completion": TALK[1:]},
        [{"messages": [SYSTEM, *TALK]}],
    ),
    "preference": ({"prompt": "What?", "chosen": "Yes.", "rejected": "No.", "margin": 2}, [{**PAIR, "margin": 2}]),
    "preference of messages": (PAIR, [PAIR]),
    "preference with the prompt on both sides": (
        {"prompt": "What?", "chosen": TALK, "rejected": [TALK[0], answers("No.")]},
        [PAIR],
    ),
    "preference of whole conversations": (
        {"chosen": [*TALK, asks("Why?"), answers("So.")], "rejected": [*TALK, asks("Why?"), answers("Ask.")]},
        [{"prompt": [*TALK, asks("Why?")], "chosen": [answers("So.")], "rejected": [answers("Ask.")]}],
    ),
    "preference of hh-rlhf": (
        {"chosen": f"{HH} It is red.", "rejected": f"{HH} Go away.\n\nOr stay."},
        [
            {
                "prompt": [asks("What?"), answers("A fox."), asks("Why?")],
                "chosen": [answers("It is red.")],
                "rejected": [answers("Go away.\n\nOr stay.")],
            }
        ],
    ),
    "preference of hh-rlhf with its prompt": (
        {"prompt": HH, "chosen": " It is red.", "rejected": "Go away."},
        [
            {
                "prompt": [asks("What?"), answers("A fox."), asks("Why?")],
                "chosen": [answers(" It is red.")],
                "rejected": [answers("Go away.")],
            }
        ],
    ),
    "kto": (
        {"prompt": "What?", "completion": "Yes.", "label": 1},
        [{"prompt": TALK[:1], "completion": TALK[1:], "label": True}],
    ),
    "ranked": (
        {"prompt": "What?", "ranked": ["Yes.", "No.", "Fox."]},
        [
            PAIR,
            {**PAIR, "rejected": [answers("Fox.")]},
            {**PAIR, "chosen": [answers("No.")], "rejected": [answers("Fox.")]},
        ],
    ),
    "ranking by scores, of which equal ones say nothing": (
        {"prompt": "What?", "responses": ["No.", "Yes.", "Fox."], "scores": [1, 4.5, 1]},
        [PAIR, {**PAIR, "rejected": [answers("Fox.")]}],
    ),
    "ranking by ranks": ({"prompt": "What?", "responses": ["No.", "Yes."], "ranks": [2, 1]}, [PAIR]),
    "ranking of answers that are there twice": (
        {"prompt": "What?", "responses": ["Yes.", "No.", "Yes.", "No."], "scores": [3, 1, 2, 1]},
        [PAIR],
    ),
    "ranking with scores inside": (
        {"prompt": "What?", "responses": [{"text": "No.", "score": 0}, {"text": "Yes.", "score": 1}]},
        [PAIR],
    ),
}

BAD = {
    "unknown": ({"question": "What?"}, "has question; expected those of alpaca: instruction, output; comple"),
    "no object": ([1], "list [1]; expected an object of one of the formats"),
    "no text": ({"instruction": 3, "output": " "}, "instruction is int 3; expected text that is not empty"),
    "two faults": ({"instruction": 3, "output": " "}, 'output is str " "; expected text that is not empty'),
    "history": ({"instruction": "a", "output": "b", "history": ["x"]}, "history[0] is str"),
    "no history": ({"instruction": "a", "output": "b", "history": 3}, "history is int 3; expected a list of"),
    "no turns": ({"conversations": 3}, "conversations is int 3; expected a list of messages"),
    "turn": ({"conversations": [3]}, 'conversations[0] is int 3; expected {"from": ..., "value": ...}'),
    "role": ({"conversations": [{"from": "dog", "value": "x"}]}, "messages[0].role is 'dog'"),
    "call": ({"conversations": [{"from": "function_call", "value": "{"}]}, "conversations[0].value: not JSON"),
    "no call": ({"conversations": [{"from": "function_call", "value": "[3]"}]}, "conversations[0].value is no call"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content has a part dict"),
    "label": (
        {"prompt": "What?", "completion": "Yes.", "label": "good"},
        'label is str "good"; expected true or false',
    ),
    "alike": ({"prompt": "What?", "chosen": "Yes.", "rejected": "Yes."}, "chosen and rejected are equal"),
    "no prompt": ({"chosen": "Yes.", "rejected": "No."}, "share no turn and there is no prompt"),
    "parted early": (
        {"chosen": [*TALK, asks("Why?"), answers("So.")], "rejected": [*TALK, asks("Who?"), answers("He.")]},
        "chosen goes on with a turn of the user where it parts from the prompt",
    ),
    "one answer": ({"prompt": "What?", "ranked": ["Yes."]}, "1 answers; expected at least 2"),
    "ties": (
        {"prompt": "What?", "responses": ["Yes.", "No."], "scores": [1, 1]},
        "all answers are alike or ranked alike",
    ),
    "scores": ({"prompt": "What?", "responses": ["Yes.", "No."], "scores": [1]}, "expected a list of 2 numbers"),
    "ambiguous": (
        {"prompt": "What?", "completion": "Yes.", "chosen": "Yes.", "rejected": "No."},
        "has the keys of completion and of preference; expected those of one, or corpus.format set to either",
    ),
    "ambiguous instruction": (
        {"instruction": "What?", "output": "Yes.", "chosen": "Yes.", "rejected": "No."},
        "has the keys of alpaca and of preference",
    ),
    "no label": ({"prompt": "What?", "completion": "Yes.", "label": None}, "label is missing; format kto has it"),
    "number": ({"prompt": "What?", "responses": ["Yes.", "No."], "scores": [1, "2"]}, "scores[1] is str"),
    "scores and ranks": (
        {"prompt": "What?", "responses": [{"text": "No.", "rank": 2}, {"text": "Yes.", "score": 1}]},
        'responses[0] is dict {"text": "No.", "rank": 2}; expected {"content": ..., "score": ...} as every answer',
    ),
    "contradiction": (
        {"prompt": "What?", "ranked": ["Yes.", "No.", "Yes."]},
        "all answers are alike or ranked alike",
    ),
    "weight": ({"messages": [TALK[0], TALK[1] | {"weight": 0.5}]}, "messages[1].weight is float 0.5; expected 0 or 1"),
    "no weight": ({"messages": [TALK[0], TALK[1] | {"weight": 0}]}, "no assistant turn of a weight other than 0"),
    "no score": ({"prompt": "What?", "responses": ["Yes.", "No."]}, 'responses[0] is str "Yes."; expected {"content"'),
}


def converted(tmp_path, records, form: str = "", **rename) -> list[dict]:
    file = write_jsonl(tmp_path / "train.jsonl", records)
    return [example.record for example in convert([Source(file, None, "train")], form, rename, False, Ledger())]


@pytest.mark.parametrize("case", CASES)
def test_a_record_is_recognised_and_becomes_one_of_ours(case, tmp_path):
    record, expected = CASES[case]
    assert recognised(record) == [case.split()[0]]
    before = json.dumps(record)
    assert converted(tmp_path, [record]) == expected
    assert json.dumps(record) == before


@pytest.mark.parametrize("form", FORMATS)
def test_names_of_our_own_shapes_that_a_format_does_not_use_do_not_go_along(form, tmp_path):
    record, expected = next(CASES[case] for case in CASES if case.split()[0] == form)
    foreign = {"prompt": "Else?", "completion": "Else.", "label": 1}
    foreign |= {key: [asks("Else?"), answers("Else.")] for key in ("messages", "chosen", "rejected")}
    if form == "preference":  # a prompt is part of it
        del foreign["prompt"]
    assert converted(tmp_path, [foreign | record], form=form) == expected


def test_ultrachat_is_its_messages(tmp_path):
    record = {"prompt": "What?", "prompt_id": "7", "messages": TALK}
    assert converted(tmp_path, [record]) == [{"messages": TALK, "prompt_id": "7"}]


def test_every_format_is_among_the_cases():
    assert {case.split()[0] for case in CASES} == set(FORMATS)


@pytest.mark.parametrize("case", CASES)
def test_what_a_conversion_yields_is_its_own_conversion(case, tmp_path):
    for record in CASES[case][1]:
        assert converted(tmp_path, [record]) in ([record], [{"messages": record.get("prompt", []) + TALK[1:]}])


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_is_told_with_line_and_expectation(case, tmp_path):
    record, fault = BAD[case]
    with pytest.raises(RecordError) as caught:
        converted(tmp_path, [{"messages": TALK}, record])
    message = str(caught.value)
    assert fault in message and "train.jsonl:2: " in message and "train.jsonl:1: " not in message
    assert "corpus.bad=quarantine" in message


def test_nulls_of_tables_are_as_if_absent(tmp_path):
    record = {"prompt": "What?", "completion": "Yes.", "chosen": None, "rejected": None, "tools": None}
    assert converted(tmp_path, [record]) == [{"messages": TALK}]
    nulls = {"tool_calls": None, "tool_call_id": None}
    assert converted(tmp_path, [{"messages": [turn | nulls for turn in TALK]}]) == [{"messages": TALK}]


def test_fields_may_go_by_other_names_and_a_format_be_given(tmp_path):
    record = {"question": "What?", "answer": "Yes.", "prompt": "not this"}
    assert converted(tmp_path, [record], prompt="question", completion="answer") == [{"messages": TALK}]
    both = {"messages": TALK, "prompt": "What?", "completion": "No."}
    assert converted(tmp_path, [both], form="messages")[0]["messages"] == TALK
    with pytest.raises(RecordError, match="instruction is missing; format alpaca has it"):
        converted(tmp_path, [both], form="alpaca")


@pytest.mark.parametrize(("messages", "tools"), [(ONE_CALL, TOOLS), (TWO_CALLS, TOOLS), (TWO_CALLS, None)])
def test_arguments_within_text_become_objects(messages, tools, tmp_path):
    def texts(message: dict) -> dict:
        if "tool_calls" not in message:
            return message
        functions = [one["function"] for one in message["tool_calls"]]
        calls = [
            one | {"function": {**function, "arguments": json.dumps(function["arguments"])}}
            for one, function in zip(message["tool_calls"], functions, strict=True)
        ]
        return message | {"content": message["content"] or None, "tool_calls": calls}

    declared = {"tools": tools} if tools else {}
    assert converted(tmp_path, [{"messages": [texts(message) for message in messages], **declared}]) == [
        {"messages": messages, **declared}
    ]
