import logging

import pytest
import torch

from conf.registry import OPTIONS
from data_pipeline.batch import IGNORED
from data_pipeline.chat import CHATML, ChatData, Conversation, TemplateError, encode, prompt, render
from data_pipeline.records import EmptySetError, RecordError
from tests.data_pipeline.chats import CONVERSATION, UNMARKED, tokenizer, write_jsonl

MARKED = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}"
    "{%- else %}{{- message['content'] + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
FORGETFUL = (
    "{%- for message in messages %}{{- message['role'] + ': ' }}"
    "{%- if loop.last or message['role'] != 'assistant' %}{{- message['content'] }}{%- endif %}"
    "{{- '<|im_end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"
)
"""Leaves out what the assistant said before the last turn, as reasoning models' templates do with their thoughts."""


def said(tokenizer, conversation: Conversation) -> str:
    tokens = [token for token, learned in zip(conversation.tokens, conversation.learned, strict=True) if learned]
    return tokenizer.decode(tokens, skip_special=False)


def chats(n: int) -> list:
    ask, answer = "What is the quick fox? " * 3, "It is brown. "
    return [
        {
            "messages": [
                {"role": "user", "content": ask[: 7 + i % 40]},
                {"role": "assistant", "content": answer * (1 + i % 3)},
            ]
        }
        for i in range(n)
    ]


def test_what_the_assistant_says_and_its_end_of_turn_are_learned_and_nothing_else():
    chatml = tokenizer(UNMARKED)
    assert said(chatml, encode(chatml, CONVERSATION)) == "It is quick.<|im_end|>Lazy, d'oh! Über<|im_end|>"


def test_marks_in_the_template_and_rendered_prefixes_find_the_same_tokens():
    assert encode(tokenizer(MARKED), CONVERSATION) == encode(tokenizer(UNMARKED), CONVERSATION)
    assert encode(tokenizer(MARKED), CONVERSATION) == encode(tokenizer(CHATML), CONVERSATION)


def test_earlier_turns_may_be_context_only():
    chatml = tokenizer(UNMARKED)
    assert said(chatml, encode(chatml, CONVERSATION, first=3)) == "Lazy, d'oh! Über<|im_end|>"
    assert said(chatml, encode(tokenizer(MARKED), CONVERSATION, first=3)) == "Lazy, d'oh! Über<|im_end|>"


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_a_turn_of_weight_0_is_context_and_one_of_weight_1_is_learned(template):
    chatml = tokenizer(template)
    weighted = [message | {"weight": int(number != 2)} for number, message in enumerate(CONVERSATION)]
    assert encode(chatml, weighted).tokens == encode(chatml, CONVERSATION).tokens
    assert said(chatml, encode(chatml, weighted)) == "Lazy, d'oh! Über<|im_end|>"


@pytest.mark.parametrize("content", ["\n\n\nWhat", "  Yes", "\n", "4", "é", "\t\n Yes"])
@pytest.mark.parametrize("template", [CHATML, UNMARKED], ids=["marked", "unmarked"])
def test_an_answer_that_starts_with_white_space_is_learned_whole(content, template):
    chatml = tokenizer(template)
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": content}]
    conversation = encode(chatml, messages)
    assert conversation.tokens == chatml.encode(render(chatml, messages))
    assert said(chatml, conversation).removeprefix("\n").endswith(content.lstrip("\n") + "<|im_end|>")


def test_the_prompt_is_where_the_answer_begins():
    chatml = tokenizer()
    conversation = encode(chatml, CONVERSATION)
    opening = prompt(chatml, CONVERSATION[:2])
    assert conversation.tokens[: len(opening)] == opening
    assert conversation.learned.index(True) == len(opening)


def test_a_template_that_rewrites_earlier_turns_is_refused_by_name():
    with pytest.raises(TemplateError, match=r"a test's tokenizer .*renders message 2 of 5 differently.*generation"):
        encode(tokenizer(FORGETFUL), CONVERSATION)
    assert any(encode(tokenizer(FORGETFUL), CONVERSATION[:3]).learned), "one assistant turn is fine"


def test_a_template_that_marks_too_little_is_refused():
    marks_last = MARKED.replace("message['role'] == 'assistant'", "message['role'] == 'assistant' and loop.last")
    with pytest.raises(TemplateError, match="marks 1 generations in a conversation of 2 assistant turns"):
        encode(tokenizer(marks_last), CONVERSATION)


def test_a_tokenizer_without_template_is_refused():
    with pytest.raises(TemplateError, match=r"a test's tokenizer is missing.*chat_template\.jinja"):
        render(tokenizer(None), CONVERSATION)


def test_what_a_template_objects_to_reaches_the_user():
    strict = "{{ raise_exception('system messages are not supported') }}"
    with pytest.raises(TemplateError, match=r"fails on a conversation of \[system, user.*not supported"):
        render(tokenizer(strict), CONVERSATION)


def test_a_template_cannot_leave_the_sandbox():
    with pytest.raises(TemplateError, match="unsafe"):
        render(tokenizer("{{ messages.__class__.__mro__ }}"), CONVERSATION)


def test_labels_are_the_following_token_of_the_assistant_and_the_rest_is_left_out():
    conversation = Conversation(tokens=[5, 6, 7, 8, 9, 10], learned=[False, False, True, True, False, False])
    assert conversation.inputs_and_labels(10) == ([5, 6, 7], [IGNORED, 7, 8])
    assert conversation.inputs_and_labels(2) == ([5, 6], [IGNORED, 7])
    assert conversation.inputs_and_labels(1) == ([], [])


def test_packed_windows_hold_every_conversation_once_each_as_a_document_of_its_own(tmp_path):
    chatml = tokenizer()
    records = chats(60)
    write_jsonl(tmp_path / "train.jsonl", records)
    samples = ChatData(path=str(tmp_path), sequence_length=128).open("train", chatml, seed=3)
    batch = samples.micro_batch(range(len(samples)))
    assert batch.tokens_BL.shape == (len(samples), 128) and len(samples) < 60
    found = []
    for row in range(len(samples)):
        documents_L = batch.documents_BL[row]
        for document in range(int(documents_L.max()) + 1):
            inside = documents_L == document
            assert batch.positions_BL[row, inside].tolist() == list(range(int(inside.sum())))
            found.append((batch.tokens_BL[row, inside].tolist(), batch.labels_BL[row, inside].tolist()))
    expected = [encode(chatml, record["messages"]).inputs_and_labels(128) for record in records]
    assert sorted(found) == sorted(expected)
    padding_BL = batch.documents_BL == -1
    assert (batch.labels_BL[padding_BL] == IGNORED).all() and (batch.tokens_BL[padding_BL] == chatml.pad).all()
    assert (batch.labels_BL != IGNORED).any(-1).all(), "no window is without labels"


def test_the_packing_is_a_function_of_records_and_seed(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", chats(60))
    data = ChatData(path=str(tmp_path), sequence_length=128)
    a, b, c = (data.open("train", tokenizer(), seed) for seed in (1, 1, 2))
    everything = range(len(a))
    assert torch.equal(a.micro_batch(everything).tokens_BL, b.micro_batch(everything).tokens_BL)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert data.open("train", tokenizer(MARKED), seed=1).fingerprint != a.fingerprint


def test_a_window_does_not_depend_on_those_it_is_batched_with(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", chats(60))
    samples = ChatData(path=str(tmp_path), sequence_length=64).open("train", tokenizer(), 0)
    together = samples.micro_batch([4, 0, 2])
    assert together.samples_B.tolist() == [4, 0, 2]
    assert torch.equal(together.labels_BL[2:], samples.micro_batch([2]).labels_BL)


def test_overlong_conversations_are_cut_or_dropped_and_counted(tmp_path, caplog):
    long = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "fox " * 200}]}
    mute = {"messages": [{"role": "user", "content": "What? " * 200}, {"role": "assistant", "content": "fox"}]}
    write_jsonl(tmp_path / "train.jsonl", [*chats(5), long, mute])
    data = {"path": str(tmp_path), "sequence_length": 96}
    with caplog.at_level(logging.WARNING):
        cut = ChatData(**data, overlong="truncate").open("train", tokenizer(), 0)
        ChatData(**data, overlong="drop").open("train", tokenizer(), 0)
    # Nothing is left to learn of the mute one.
    assert "of 7 conversations 1 were cut to data.sequence_length=96 and 1 dropped" in caplog.text
    assert "of 7 conversations 0 were cut to data.sequence_length=96 and 2 dropped" in caplog.text
    documents_BL = cut.micro_batch(range(len(cut))).documents_BL
    assert sum(int(row.max()) + 1 for row in documents_BL) == 6


def test_all_bad_records_are_reported_together_with_file_line_and_expectation(tmp_path):
    file = write_jsonl(
        tmp_path / "train.jsonl",
        [
            *chats(1),
            {"messages": [{"role": "user", "content": "What?"}]},
            {"prompt": "What?"},
            {"messages": [{"role": "robot", "content": 3}, {"role": "assistant", "content": " "}]},
            [1],
        ],
    )
    file.write_text(file.read_text() + "{broken\n")
    with pytest.raises(RecordError) as caught:
        ChatData(path=str(tmp_path)).open("train", tokenizer(), 0)
    message = str(caught.value)
    assert f"7 faults in {file}; nothing was started" in message
    for fault in (
        "train.jsonl:2: no assistant turn among [user]; expected at least one",
        "train.jsonl:3: messages is missing; expected a list of messages",
        "train.jsonl:4: messages[0].role is 'robot'; expected one of system, user, assistant, tool",
        "train.jsonl:4: messages[0].content is int 3; expected text",
        "train.jsonl:4: messages[1] is an empty assistant turn",
        "train.jsonl:5: a list; expected an object",
        "train.jsonl:6: not JSON",
    ):
        assert fault in message


def test_a_thousand_bad_records_make_a_short_message(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{}] * 1000)
    with pytest.raises(RecordError, match="and 980 more"):
        ChatData(path=str(tmp_path)).open("train", tokenizer(), 0)


def test_an_empty_or_absent_file_is_refused(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [])
    with pytest.raises(EmptySetError, match=r"train\.jsonl holds no record"):
        ChatData(path=str(tmp_path)).open("train", tokenizer(), 0)
    with pytest.raises(EmptySetError, match=r"test\.jsonl does not exist; the directory holds train\.jsonl"):
        ChatData(path=str(tmp_path)).open("test", tokenizer(), 0)


def test_conversations_that_all_drop_out_are_an_empty_set(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", chats(3))
    with pytest.raises(EmptySetError, match=r"data\.sequence_length=4 and 3 dropped; none is left"):
        ChatData(path=str(tmp_path), sequence_length=4).open("train", tokenizer(), 0)


def test_a_sample_with_nothing_to_learn_is_refused_by_line(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", chats(3))
    silent = MARKED.replace("{{- message['content'] + '<|im_end|>' }}", "{{- '' }}")
    with pytest.raises(EmptySetError, match="3 conversations have no token to learn, the first in line 1"):
        ChatData(path=str(tmp_path)).open("train", tokenizer(silent), 0)


def test_settings_that_cannot_work_are_problems():
    problems = OPTIONS["data", "chat"](sequence_length=1, overlong="fold").problems(None, 1)
    assert [p.key for p in problems] == ["data.path", "data.sequence_length", "data.overlong"]
