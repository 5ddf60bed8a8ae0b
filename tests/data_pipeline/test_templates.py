"""Our chat templates: what they render, what they mark, and for which tokenizers."""

import logging

import pytest
from tokenizers import Regex, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from data_pipeline.chat import ChatData, encode, prompt, render
from data_pipeline.preference import PreferenceData
from data_pipeline.records import EmptySetError
from data_pipeline.templates import NAMES, TemplateError, special_tokens, template, template_problems, with_template
from data_pipeline.tokenizer import SPECIALS, Tokenizer, train_bpe
from tests.data_pipeline.chats import CONVERSATION, TEXT, UNMARKED, tokenizer, write_jsonl
from tests.data_pipeline.conversations import BY_NAME, ONE_CALL, TOOLS, TWO_CALLS, answers, asks

SYSTEM, QUESTION, ANSWER, MORE, LAST = (message["content"] for message in CONVERSATION)


@pytest.fixture(scope="module")
def trained():
    """A tokenizer that has the special tokens of all templates."""
    specials = [*SPECIALS, *special_tokens("llama3"), "<|begin_of_text|>"]
    trained = train_bpe([TEXT * 3], vocabulary=310, specials=specials)
    return Tokenizer(trained.backend, {**trained.config, "bos_token": "<|begin_of_text|>"}, None, "a test's")


@pytest.fixture(scope="module")
def speaking(trained):
    """By the name of a template, a tokenizer that keeps ends of lines together, as Llama's does."""
    backend = Backend.from_str(trained.backend.to_str())
    lines = pre_tokenizers.Split(Regex(r"\s*[\r\n]+"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    kept = Tokenizer(backend, trained.config, None, "a test's")
    return lambda name: with_template(kept, name)


def said(speaking, conversation) -> str:
    tokens = [token for token, learned in zip(conversation.tokens, conversation.learned, strict=True) if learned]
    return speaking.decode(tokens, skip_special=False)


def test_these_are_the_templates():
    assert NAMES == ("chatml", "llama3", "plain", "qwen")


@pytest.mark.parametrize("conversation", BY_NAME)
@pytest.mark.parametrize("name", NAMES)
def test_ids_and_marks_equal_those_of_transformers(name, conversation, speaking, tmp_path):
    messages, tools = BY_NAME[conversation]
    if (name, conversation) == ("llama3", "two_calls"):
        pytest.skip("Llama 3 says one call in a turn")
    ours = speaking(name)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    settings = {"tools": tools, "tokenize": True, "return_dict": True}
    whole = theirs.apply_chat_template(messages, return_assistant_tokens_mask=True, **settings)
    encoded = encode(ours, messages, tools=tools)
    assert encoded.tokens == whole["input_ids"]
    assert encoded.learned == [bool(mark) for mark in whole["assistant_masks"]]
    assert 0 < sum(encoded.learned) < len(encoded.learned)
    opening = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, **settings)["input_ids"]
    assert prompt(ours, messages[:-1], tools) == opening == encoded.tokens[: len(opening)]
    assert encoded.learned[len(opening)] and not encoded.learned[len(opening) - 1], "learning begins behind the prompt"


@pytest.mark.parametrize(
    ("name", "end"),
    [("chatml", "<|im_end|>"), ("qwen", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("plain", "<|endoftext|>")],
)
def test_answers_and_their_ends_are_learned_and_nothing_else(name, end, speaking):
    ours = speaking(name)
    assert said(ours, encode(ours, CONVERSATION)) == f"{ANSWER}{end}{LAST}{end}"


@pytest.mark.parametrize("name", ["chatml", "qwen"])
def test_calls_are_learned_and_results_are_not(name, speaking):
    ours = speaking(name)
    calls = (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "dog"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
    )
    assert said(ours, encode(ours, TWO_CALLS, tools=TOOLS)) == f"Lazy.\n{calls}<|im_end|>It is 4.<|im_end|>"


def test_chatml_renders_plain_turns_as_before_it_had_marks(speaking):
    ours = speaking("chatml")
    expected = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CONVERSATION)
    assert render(ours, CONVERSATION) == expected
    assert encode(tokenizer(UNMARKED), CONVERSATION) == encode(tokenizer(template("chatml")), CONVERSATION)


def test_llama3_renders_as_its_model_card_says(speaking):
    def turn(role: str, content: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"

    turns = [turn(m["role"], m["content"]) for m in CONVERSATION]
    opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert render(speaking("llama3"), CONVERSATION) == "<|begin_of_text|>" + "".join(turns)
    assert render(speaking("llama3"), CONVERSATION[:2], generation_prompt=True) == (
        "<|begin_of_text|>" + "".join(turns[:2]) + opening
    )


def test_llama3_declares_tools_in_the_first_user_turn_and_quotes_results(speaking):
    text = render(speaking("llama3"), ONE_CALL, TOOLS)
    system, user, called, heard, *_ = text.split("<|eot_id|>")
    assert system == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n"
        "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\nBe brief."
    )
    assert user.startswith("<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond")
    assert '\n\n{\n    "type": "function",\n    "function": {\n        "name": "weather",' in user
    assert user.endswith("}\n\nWhat of Über?")
    assert called.endswith('<|end_header_id|>\n\n{"name": "weather", "parameters": {"city": "Über", "days": 2}}')
    assert heard == '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"sky\\": \\"blue\\"}"'


def test_llama3_refuses_what_it_cannot_say(speaking):
    with pytest.raises(TemplateError, match="either text or one call"):
        render(speaking("llama3"), TWO_CALLS, TOOLS)
    with pytest.raises(TemplateError, match="declares tools in a user turn"):
        render(speaking("llama3"), [answers("It is 4.")], TOOLS)


def test_qwen_renders_tools_calls_and_results_as_the_model_knows_them(speaking):
    assert render(speaking("qwen"), [{"role": "system", "content": "Be brief."}, *TWO_CALLS], TOOLS[1:]) == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
        "\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}}\n'
        "</tools>\n\nFor each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWhat of the dog?<|im_end|>\n"
        '<|im_start|>assistant\nLazy.\n<tool_call>\n{"name": "weather", "arguments": {"city": "dog"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\nover\n</tool_response>\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIt is 4.<|im_end|>\n"
    )


def test_plain_needs_no_special_token_but_the_end_of_text(speaking):
    assert special_tokens("plain") == []
    assert render(speaking("plain"), [asks("What?"), answers("It is 4.")]) == (
        "User:\nWhat?\n\nAssistant:\nIt is 4.<|endoftext|>\n\n"
    )
    assert '\nCall: {"name": "clock", "arguments": {}}<|endoftext|>' in render(speaking("plain"), TWO_CALLS, TOOLS)


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused_with_those_that_fit():
    with pytest.raises(TemplateError, match=r"lacks: <\|end_header_id\|>, .*Take chatml or plain or qwen"):
        with_template(tokenizer(), "llama3")
    assert with_template(tokenizer(), "").chat_template == tokenizer().chat_template


def test_a_prompt_that_is_other_tokens_once_it_is_answered_is_told(trained, speaking, caplog):
    with caplog.at_level(logging.WARNING):
        for name in NAMES:
            speaking(name)
        assert not caplog.records
        with_template(trained, "llama3")
    assert "chat_template=llama3: a test's joins the white space that ends a prompt differently" in caplog.text


def test_data_take_the_template_that_they_name(tmp_path):
    pair = {"prompt": [asks("What?")], "chosen": [answers("Yes")], "rejected": [answers("fox")]}
    write_jsonl(tmp_path / "train.jsonl", [{"messages": TWO_CALLS, "tools": TOOLS}])
    write_jsonl(tmp_path / "preferences_train.jsonl", [pair])
    for data in (ChatData, PreferenceData):
        opened = [data(str(tmp_path), 2048, chat_template=t).open("train", tokenizer(), 0) for t in ("plain", "qwen")]
        assert opened[0].fingerprint != opened[1].fingerprint
        text = tokenizer().decode(opened[0].micro_batch([0]).tokens_BL[0].tolist())
        assert "Assistant:" in text and "assistant" not in text
    assert [str(p) for p in template_problems("data.chat_template", "vicuna")] == [
        "data.chat_template=vicuna: one of chatml, llama3, plain, qwen, or empty for the tokenizer's own"
    ]


def test_an_answer_of_a_pair_that_leaves_nothing_to_learn_is_refused_by_line(tmp_path):
    pair = {"prompt": [asks("What?")], "chosen": [answers("Yes")], "rejected": [answers("fox")]}
    write_jsonl(tmp_path / "preferences_train.jsonl", [pair])
    mute = template("chatml").replace("{{- message.content }}", "").replace("{{- '<|im_end|>' }}", "")
    with pytest.raises(EmptySetError, match="1 pairs have an answer with no token to learn, the first in line 1"):
        PreferenceData(str(tmp_path)).open("train", tokenizer(mute), 0)
