"""A small tokenizer and conversations for tests of chat data."""

import json
from functools import cache
from pathlib import Path

from data_pipeline.chat import CHATML
from data_pipeline.tokenizer import SPECIALS, Tokenizer, train_bpe

TEXT = "the quick brown fox jumps over the lazy dog. What is 2 + 2? It is 4.\n\n  Über naïve café, d'oh!\tYes, sir.\n"

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the fox?"},
    {"role": "assistant", "content": "It is quick."},
    {"role": "user", "content": "And the dog?"},
    {"role": "assistant", "content": "Lazy, d'oh! Über"},
]

UNMARKED = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML as most models bring it: without a mark around what the assistant says."""


@cache
def _trained() -> Tokenizer:
    return train_bpe([TEXT * 3], vocabulary=300, specials=SPECIALS, chat_template=CHATML)


def tokenizer(template: str | None = CHATML) -> Tokenizer:
    trained = _trained()
    return Tokenizer(trained.backend, trained.config, template, "a test's tokenizer")


def write_jsonl(file: Path, records: list) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file
