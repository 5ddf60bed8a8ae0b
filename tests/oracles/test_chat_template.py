"""Our chat rendering against transformers' apply_chat_template, on the same saved directory."""

import pytest

from data_pipeline.chat import CHATML, encode, prompt, render
from tests.data_pipeline.chats import CONVERSATION, UNMARKED, tokenizer
from tests.data_pipeline.test_chat import MARKED

LLAMA_LIKE = (
    "{{- eos_token }}{%- for m in messages %}"
    "{{- '[' + m.role + ']\\n\\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '[assistant]\\n\\n' }}{% endif %}"
)
INDENTED = """
{%- for m in messages %}
    {%- if m.role == 'system' %}
        {%- continue %}
    {%- endif %}
    <|im_start|>{{ m | tojson }}
    {{ m.content }}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}
    <|im_start|>{{ {'role': 'assistant'} | tojson }}
{% endif %}
"""
"""Block trimming, loop controls, tojson."""


@pytest.fixture
def reloaded(tmp_path):
    from transformers import AutoTokenizer

    def load(template):
        tokenizer(template).save(tmp_path)
        return AutoTokenizer.from_pretrained(tmp_path)

    return load


@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE, INDENTED], ids=["chatml", "llama", "indented"])
def test_ids_equal_those_of_transformers(template, reloaded):
    theirs, ours = reloaded(template), tokenizer(template)
    whole = theirs.apply_chat_template(CONVERSATION, tokenize=True, return_dict=True)["input_ids"]
    opening = theirs.apply_chat_template(
        CONVERSATION[:-1], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    assert ours.encode(render(ours, CONVERSATION)) == whole
    assert prompt(ours, CONVERSATION[:-1]) == opening


def test_the_mask_equals_that_of_transformers_where_the_template_marks(reloaded):
    theirs = reloaded(MARKED).apply_chat_template(
        CONVERSATION, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ours = encode(tokenizer(MARKED), CONVERSATION)
    assert ours.tokens == theirs["input_ids"]
    assert ours.learned == [bool(mark) for mark in theirs["assistant_masks"]]
    assert encode(tokenizer(UNMARKED), CONVERSATION).learned == ours.learned
