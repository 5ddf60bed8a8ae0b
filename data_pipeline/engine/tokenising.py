"""From documents to a tokenizer and to token shards."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer

from data_pipeline.engine import documents
from data_pipeline.engine.documents import ListDocuments
from data_pipeline.engine.pieces import ENDING, PieceReader, execute, read_piece
from data_pipeline.engine.splitting import position
from data_pipeline.shards import Shard, merge
from data_pipeline.tokenizer import Tokenizer

if TYPE_CHECKING:
    import tokenizers

BATCH = 500
"""Documents encoded together; bounds memory."""


def sample(directory: Path, share: float) -> Iterator[str]:
    """Texts of a split, about this share of the documents, drawn by hash."""
    for file in sorted(directory.glob(f"*{ENDING}")):
        for document in read_piece(file):
            # Another hash than the one that chose the split, under which the train split is no uniform sample.
            if position("sample " + document.text) < share:
                yield document.text


class WriteTokens(MegatronDocumentTokenizer):
    """datatrove's Megatron writer. Documents that mention a special token are spelt out; each ends with end-of-text.

    Args:
        directory: gets `<piece>_tokens.bin` and `.idx`.
        tokenizer: directory of the tokenizer.
        end_of_text: its end-of-text token.
    """

    def __init__(self, directory: Path, tokenizer: Path, end_of_text: str):
        super().__init__(
            str(directory),
            tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
            eos_token=end_of_text,
            batch_size=BATCH,
        )

    @cached_property
    def tokenizer(self) -> "tokenizers.Tokenizer":
        backend = super().tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend


def write_shards(
    pieces: Mapping[str, Sequence[Path]], directory: Path, tokenizer: Path, workers: int
) -> dict[str, Shard]:
    """Tokenise every split into `<directory>/<split>.bin`, `.idx`, and list its documents beside it.

    Args:
        pieces: split -> files of documents.
        directory: of the shards.
        tokenizer: directory of the tokenizer.
        workers: processes.
    """
    end_of_text = Tokenizer.load(tokenizer).special_tokens["eos_token"]
    files = [file for split in pieces.values() for file in split]
    parts = directory / "parts"
    step = WriteTokens(parts, tokenizer, end_of_text)
    listing = ListDocuments(parts, [number for its_files in pieces.values() for number in range(len(its_files))])
    execute([PieceReader(files), listing, step], directory / "logs", len(files), workers)
    listed = (parts / f"{rank:05d}{documents.ENDING}" for rank in range(len(files)))
    written = (Shard(parts / f"{rank:05d}_tokens") for rank in range(len(files)))
    for split, its_files in pieces.items():
        merge([next(written) for _ in its_files], directory / split)
        documents.merge([next(listed) for _ in its_files], directory / f"{split}{documents.ENDING}")
    return {split: Shard(directory / split) for split in pieces}
