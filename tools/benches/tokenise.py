"""Tokenise and shard on one core, against datatrove's own step, with the same tokenizer and documents.

Both sides write the Megatron pair of one piece, each in the library's single-threaded mode; the tokens must be the same
bytes. Text: the Python sources and the prose of the running standard library.
"""

import hashlib
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conf.registry import register


@register("bench", "tokenise")
@dataclass(frozen=True)
class TokeniseBench:
    """Turn documents into a token shard, by our step and by datatrove's.

    Args:
        megabytes: of text, in MB.
        vocabulary: ids of the byte-level BPE that is trained for it.
        algorithm: "bpe" or "unigram" as `corpus.algorithm` has them; wordpiece has no words of bytes to remember.
        rounds: times that each side runs, by turns; the best of each counts.
    """

    megabytes: int = 20
    vocabulary: int = 32768
    algorithm: str = "bpe"
    rounds: int = 3

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the library starts its threads
        from datatrove.data import Document
        from datatrove.pipeline.tokens.megatron_tokenizer import MegatronDocumentTokenizer
        from loguru import logger

        from data_pipeline.engine.tokenising import BATCH, WriteTokens
        from data_pipeline.shards import Shard
        from data_pipeline.tokenizer import TRAINERS, Tokenizer

        logger.remove()
        texts = self.texts()
        metadata = {"split": "train", "kind": "code", "source": "standard_library"}
        size = sum(len(text.encode()) for text in texts) / 1e6
        with tempfile.TemporaryDirectory(prefix="bench-") as name:
            root = Path(name)
            TRAINERS[self.algorithm](texts[::2], self.vocabulary).save(root / "tokenizer")
            eos = Tokenizer.load(root / "tokenizer").special_tokens["eos_token"]

            def documents() -> list[Document]:
                return [Document(text, str(number), metadata=dict(metadata)) for number, text in enumerate(texts)]

            def ours() -> None:
                step = WriteTokens(root / "ours", root / "tokenizer", root / "quarantine")
                list(step.run(iter(documents())))

            def theirs() -> None:
                step = MegatronDocumentTokenizer(
                    str(root / "theirs"), None, str(root / "tokenizer/tokenizer.json"), eos, batch_size=BATCH
                )
                step.tokenizer.encode_special_tokens = True  # as ours: a text that mentions one is spelt out
                step.run(iter(documents()))

            best = {"ours": float("inf"), "theirs": float("inf")}
            for _ in range(self.rounds):
                best["ours"] = min(best["ours"], _seconds(ours))
                best["theirs"] = min(best["theirs"], _seconds(theirs))
            same = [
                hashlib.sha256((root / "ours" / f"00000.{end}").read_bytes()).digest()
                == hashlib.sha256((root / "theirs" / f"00000_tokens.{end}").read_bytes()).digest()
                for end in ("bin", "idx")
            ]
            tokens = len(Shard(root / "ours/00000").tokens_T) / 1e6
        return {
            "text (MB)": size,
            "tokens (millions)": tokens,
            "ours (MB/s per core)": size / best["ours"],
            "datatrove (MB/s per core)": size / best["theirs"],
            "ours / datatrove": best["theirs"] / best["ours"],
            "same bytes in .bin and .idx (1 = yes)": float(all(same)),
        }

    def texts(self) -> list[str]:
        """Files of the standard library and of what is installed beside it, the same ones every time."""
        root, found, size = Path(sysconfig.get_path("stdlib")), [], 0
        for file in sorted(root.rglob("*.py")):
            text = file.read_text(encoding="utf-8", errors="ignore")
            if "site-packages" in file.parts or not text.strip():
                continue
            found.append(text)
            size += len(text)
            if size >= self.megabytes * 1e6:
                break
        return found


def _seconds(work: Callable[[], None]) -> float:
    """Of the processor, so that whatever else runs here slows neither side."""
    start = time.process_time()
    work()
    return time.process_time() - start
