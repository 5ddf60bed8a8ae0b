"""Tokenizers: ours (byte-level BPE, byte-level Unigram, WordPiece), or any Hugging Face tokenizer.json.

Byte-level ones (Radford et al. 2019) write every byte as one printable character, have all 256 in their vocabulary, and
give back every text as it was. BPE joins the most frequent pairs (Sennrich et al. 2016, arXiv:1508.07909); Unigram
keeps the pieces that explain the text best (Kudo 2018, arXiv:1804.10959). WordPiece is BERT's (Devlin et al. 2019,
arXiv:1810.04805): it works on characters, forgets white space and has an unknown token.

A `Tokenizer` has a fingerprint, which follows its tokens to shards, checkpoints and exports: ids of one tokenizer are
never given to a model of another. Saved directories load in transformers' AutoTokenizer with the same ids.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
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

UNKNOWN = "[UNK]"
"""What WordPiece gives for a word that it cannot spell; after the special tokens."""

BYTES = 256
LONGEST_WORD = 1000
"""Characters; WordPiece does not look into longer words, since it takes their length squared."""
UNLIMITED = 10**30
"""What transformers writes as model_max_length when there is none."""


def _byte_characters() -> tuple[str, ...]:
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in plain else next(others)) for byte in range(256))


BYTE_CHARACTERS = _byte_characters()
"""How byte-level tokenizers write each byte (GPT-2's table)."""
_BYTES_OF = {character: bytes([byte]) for byte, character in enumerate(BYTE_CHARACTERS)}


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

    @cached_property
    def unknown(self) -> int | None:
        """The id that stands for what has no id; None for tokenizers that need none."""
        model = json.loads(self.backend.to_str())["model"]
        if model["type"] == "Unigram":
            found: int | None = model["unk_id"]
            return found
        name = model.get("unk_token")
        return None if name is None else self.backend.token_to_id(name)

    @cached_property
    def lossless(self) -> bool:
        """Whether every text decodes to itself by construction: all bytes have an id, and nothing changes the text."""
        content = json.loads(self.backend.to_str())
        splitter, model, decoder = content["pre_tokenizer"] or {}, content["model"], content["decoder"] or {}
        last = splitter["pretokenizers"][-1] if splitter.get("type") == "Sequence" else splitter
        pieces = {piece for piece, _ in model["vocab"]} if model["type"] == "Unigram" else model["vocab"]
        return (
            content["normalizer"] is None
            and last.get("type") == decoder.get("type") == "ByteLevel"
            and not last["add_prefix_space"]
            and model["type"] in ("BPE", "Unigram")
            and not model.get("dropout")
            and not model.get("continuing_subword_prefix")
            and not model.get("end_of_word_suffix")
            and all(character in pieces for character in BYTE_CHARACTERS)
        )

    def loss(self, text: str, ids: Sequence[int]) -> str | None:
        """What of a document is lost in these ids.

        Returns:
            None if it decodes to itself; "normalised" if to what the tokenizer's own normalisation leaves of it, white
            space apart; "unknown_tokens" if a part has no id; "not_restored" if anything else is missing.
        """
        if self.lossless or (restored := self.decode(ids, skip_special=False)) == text:
            return None
        if self.unknown in ids:
            return "unknown_tokens"
        normaliser = self.backend.normalizer
        kept = normaliser.normalize_str(text) if normaliser is not None else text
        return "normalised" if _without_space(kept) == _without_space(restored) else "not_restored"

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

    def spelling(self, number: int) -> bytes:
        """What one id adds to a text, as bytes; empty for an id that no token has. The mark of a continued word
        (WordPiece) or of a space (SentencePiece) is left as it is."""
        token: str | None = self.backend.id_to_token(number)
        if token is None:
            return b""
        if self._byte_level and number not in self.special_ids:
            return b"".join(_BYTES_OF.get(character, character.encode()) for character in token)
        if match := re.fullmatch(r"<0x([0-9A-F]{2})>", token):  # SentencePiece's bytes of characters without an id
            return bytes.fromhex(match[1])
        return token.encode()

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in json.dumps(json.loads(self.backend.to_str())["decoder"])

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


def _without_space(text: str) -> str:
    """A text without white space, and without the character that SentencePiece writes for it."""
    return re.sub(r"[\s\u2581]+", "", text)


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
    from tokenizers import models, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        initial_alphabet=sorted(BYTE_CHARACTERS),
        show_progress=False,
    )
    return _trained_on_bytes(models.BPE(), trainer, texts, vocabulary, specials, chat_template)


def train_unigram(
    texts: Iterable[str],
    vocabulary: int,
    specials: Sequence[str] = SPECIALS,
    chat_template: str | None = None,
) -> Tokenizer:
    """Learn a Unigram model over bytes: every string can be encoded, and decodes to itself. Settings as `train_bpe`.

    The library sums in the order of a hash table, so that another process learns a slightly different vocabulary.

    Raises:
        TokenizerError: the vocabulary is too small, or the texts are too few to fill it.
    """
    from tokenizers import models, trainers

    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary,
        special_tokens=list(specials),
        initial_alphabet=sorted(BYTE_CHARACTERS),
        show_progress=False,
    )
    return _trained_on_bytes(models.Unigram(), trainer, texts, vocabulary, specials, chat_template)


def train_wordpiece(
    texts: Iterable[str],
    vocabulary: int,
    specials: Sequence[str] = SPECIALS,
    chat_template: str | None = None,
) -> Tokenizer:
    """Learn a cased WordPiece as BERT has it. Settings as `train_bpe`; [UNK] follows the special tokens.

    Lost are the kind and amount of white space (also around punctuation), control characters, and whatever contains a
    character that was not among the texts, which becomes [UNK].

    Raises:
        TokenizerError: the vocabulary is too small, or the texts are too few to fill it.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    texts = list(texts)
    normaliser = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    splitter = pre_tokenizers.BertPreTokenizer()

    def backend_of(vocab: dict[str, int]) -> Backend:
        model = models.WordPiece(vocab, unk_token=UNKNOWN, max_input_chars_per_word=LONGEST_WORD)
        backend = Backend(model)
        backend.normalizer, backend.pre_tokenizer, backend.decoder = normaliser, splitter, decoders.WordPiece()
        return backend

    # The library numbers characters in the order of a hash table, another one in every process, unless they are given.
    runs = {run for text in texts for run in normaliser.normalize_str(text).split()}
    words = {word for run in runs for word, _ in splitter.pre_tokenize_str(run)}
    alphabet = sorted({word[0] for word in words} | {f"##{character}" for word in words for character in word[1:]})
    first = [*specials, UNKNOWN]
    _check_room(vocabulary, len(alphabet), len(first))
    trainer = trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=first + alphabet, show_progress=False)
    trained = backend_of({})
    trained.train_from_iterator(texts, trainer)
    _check_filled(trained, vocabulary)
    backend = backend_of(trained.get_vocab())  # without the alphabet among its special tokens
    backend.add_special_tokens(first)
    eos, pad = specials[0], specials[1]
    return Tokenizer(backend, {"eos_token": eos, "pad_token": pad, "unk_token": UNKNOWN}, chat_template)


TRAINERS: dict[str, Callable[..., Tokenizer]] = {
    "bpe": train_bpe,
    "unigram": train_unigram,
    "wordpiece": train_wordpiece,
}
"""By the name that a configuration gives them."""


def _trained_on_bytes(
    model: "tokenizers.models.Model",
    trainer: "tokenizers.trainers.Trainer",
    texts: Iterable[str],
    vocabulary: int,
    specials: Sequence[str],
    chat_template: str | None,
) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, pre_tokenizers

    _check_room(vocabulary, BYTES, len(specials))
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        # Digits one by one: numbers of any length are read the same way.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(texts, trainer)
    _check_filled(backend, vocabulary)
    backend = Backend.from_str(backend.to_str())  # scores have fewer digits in a file; both must give the same ids
    return Tokenizer(backend, {"eos_token": specials[0], "pad_token": specials[1]}, chat_template)


def _check_room(vocabulary: int, alphabet: int, specials: int) -> None:
    if vocabulary < alphabet + specials:
        raise TokenizerError(
            f"A vocabulary of {vocabulary} cannot hold {alphabet} bytes or characters and {specials} special tokens; "
            f"give {alphabet + specials} or more."
        )


def _check_filled(backend: "tokenizers.Tokenizer", vocabulary: int) -> None:
    if (learned := backend.get_vocab_size()) != vocabulary:
        raise TokenizerError(
            f"The texts hold only enough repetition for {learned} tokens, {vocabulary} were asked for. "
            f"Give more text, or a vocabulary of at most {learned}."
        )
