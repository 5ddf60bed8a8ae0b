"""Tokenizers: a byte-level BPE of ours (Sennrich et al. 2016; bytes as in GPT-2), or any Hugging Face tokenizer.json.

A `Tokenizer` has a fingerprint, which follows its tokens to shards, checkpoints and exports: ids of one tokenizer are
never given to a model of another. Saved directories load in transformers' AutoTokenizer with the same ids.
"""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import LongrunError
from data_pipeline.artifact import fingerprint

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIALS = (
    END_OF_TEXT,
    PAD,
    "<|im_start|>",
    "<|im_end|>",
    "<|mask|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
)
"""Our special tokens, from id 0 on."""

BYTES = 256
UNLIMITED = 10**30
"""What transformers writes as model_max_length when there is none."""


class TokenizerError(LongrunError):
    """A tokenizer cannot be read, lacks a token that is needed, or is not the one that made the tokens."""


class Tokenizer:
    """Text to ids and back.

    Args:
        backend: the `tokenizers` object that does the work.
        config: content of tokenizer_config.json: names of the special tokens, and what a foreign tokenizer brought.
        chat_template: Jinja source that renders a conversation; None where there is none.
        source: where it comes from, for messages.

    Raises:
        TokenizerError: no end-of-text token is named, or a named one is not in the vocabulary.
    """

    def __init__(
        self,
        backend: "tokenizers.Tokenizer",
        config: dict[str, Any],
        chat_template: str | None,
        source: str = "new tokenizer",
    ):
        self.backend = backend
        self.config = config
        self.chat_template = chat_template
        self.source = source
        self.special_tokens = {
            name: _content(config[name]) for name in config if name.endswith("_token") and config[name]
        }
        self.special_tokens = {name: token for name, token in self.special_tokens.items() if isinstance(token, str)}
        if "eos_token" not in self.special_tokens:
            raise TokenizerError(
                f"{source} names no end-of-text token, so documents cannot be separated. "
                'Add "eos_token" to its tokenizer_config.json.'
            )
        self.eos = self.special(self.special_tokens["eos_token"])
        self.pad = self.special(self.special_tokens.get("pad_token", self.special_tokens["eos_token"]))
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and chat_template.jinja: ours, or those of any Hugging Face model.

        Raises:
            TokenizerError: no tokenizer.json there, or it or its configuration cannot be read.
        """
        from tokenizers import Tokenizer as Backend

        directory = Path(directory)
        file = directory / "tokenizer.json"
        if not file.exists():
            raise TokenizerError(
                f"{directory} has no tokenizer.json. Give a tokenizer or model directory that has one; "
                "transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)` writes it for older formats."
            )
        try:
            backend = Backend.from_file(str(file))
        except Exception as error:  # the Rust library raises nothing narrower
            raise TokenizerError(f"{file} cannot be read ({error}); copy it again from where it came.") from error
        backend.no_truncation()
        backend.no_padding()
        config: dict[str, Any] = {}
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (directory / name).exists():
                try:
                    config |= json.loads((directory / name).read_text(encoding="utf-8"))
                except ValueError as error:  # not JSON, or not UTF-8
                    raise TokenizerError(
                        f"{directory / name} cannot be read ({error}); copy it again from where it came."
                    ) from error
        template = config.pop("chat_template", None)
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (directory / "chat_template.jinja").exists():
            template = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        return cls(backend, config, template, str(directory))

    def save(self, directory: str | Path) -> None:
        """Write what `load` and transformers read."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "tokenizer.json").write_text(self.backend.to_str(pretty=True), encoding="utf-8")
        config = {"model_max_length": UNLIMITED, "clean_up_tokenization_spaces": False, **self.config}
        if config.get("tokenizer_class") is None:
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        (directory / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        if self.chat_template is not None:
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    @cached_property
    def vocabulary(self) -> int:
        """Number of ids: the largest one plus one. A model needs at least as many rows."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides which ids a text becomes. Saving, loading, padding settings and chat
        templates do not change it."""
        content = json.loads(self.backend.to_str())
        model = content["model"]
        merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model.get("merges", [])]
        added = [[t["id"], t["content"], t["special"]] for t in content["added_tokens"]]
        parts = [model["type"], model["vocab"], merges, added, content["normalizer"], content["pre_tokenizer"]]
        return fingerprint(parts)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are recognised; nothing is added at either end."""
        return self.backend.encode(text, add_special_tokens=False).ids

    @cached_property
    def _plain(self) -> "tokenizers.Tokenizer":
        from tokenizers import Tokenizer as Backend

        plain = Backend.from_str(self.backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts of unknown origin: one that *mentions* a special token is spelt out, so that no document can
        end itself or open a chat turn. Nothing is added at either end; runs on all cores."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def special(self, name: str) -> int:
        """The id of a token by its text, such as `<|fim_prefix|>`.

        Raises:
            TokenizerError: the vocabulary has no such token.
        """
        found = self.backend.token_to_id(name)
        if found is None:
            raise TokenizerError(f"{self.source} has no token {name}; use one that has it, or add it to this one.")
        return found


def _content(token: Any) -> Any:
    """The text of a token that a configuration gives as text or as {"content": text, ...}."""
    return token.get("content") if isinstance(token, dict) else token


def train_bpe(
    texts: Iterable[str],
    vocabulary: int,
    specials: Sequence[str] = SPECIALS,
    chat_template: str | None = None,
) -> Tokenizer:
    """Learn a byte-level BPE: every string can be encoded, and decodes to itself.

    Args:
        texts: documents to learn merges from.
        vocabulary: number of ids, special tokens and the 256 bytes included.
        specials: special tokens, from id 0 on; the first ends a text, the second pads.
        chat_template: Jinja source stored with the tokenizer.

    Raises:
        TokenizerError: the vocabulary is too small, or the texts are too few to fill it.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    least = BYTES + len(specials)
    if vocabulary < least:
        raise TokenizerError(
            f"A vocabulary of {vocabulary} cannot hold {BYTES} bytes and {len(specials)} special tokens; "
            f"give {least} or more."
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        # Digits one by one: numbers of any length are read the same way.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if (learned := backend.get_vocab_size()) != vocabulary:
        raise TokenizerError(
            f"The texts hold only enough repetition for {learned} tokens, {vocabulary} were asked for. "
            f"Give more text, or a vocabulary of at most {learned}."
        )
    eos, pad = specials[0], specials[1]
    return Tokenizer(backend, {"eos_token": eos, "pad_token": pad}, chat_template)
