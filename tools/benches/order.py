"""What an order costs that is a function: opening a stream of 10^12 tokens at any step, and drawing samples from it.

The corpora are sparse files: their indices are written out, their tokens are holes. So what is measured is everything
but the reading of tokens from a disk.
"""

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from conf.registry import register
from data_pipeline.artifact import MANIFEST, Artifact, sha256_of
from data_pipeline.loader import Loader
from data_pipeline.mixture import Mixture, MixtureData, MixtureSource, MixtureStage
from data_pipeline.shards import CHECKSUMMED_BYTES, CODES, HEADER, MAGIC, VERSION
from tools.ranks import run_ranks

GLOBAL_BATCH = 1024


@dataclass(frozen=True)
class Ids:
    """A tokenizer as far as opening a corpus needs one."""

    vocabulary: int = 65536
    pad: int = 1
    fingerprint: str = "bench"
    source: str = "bench"


@register("bench", "order")
@dataclass(frozen=True)
class OrderBench:
    """Open a mixture of sparse corpora somewhere in its run, and draw samples in the order of the run.

    Args:
        tokens: of all corpora together.
        documents: of all corpora together; an index takes 20 bytes of disk for each.
        corpora: how many share them.
        sequence_length: tokens per window.
        samples: positions whose source and window are found.
        made: of them, samples whose tokens are laid out as micro-batches.
        directory: where the corpora are written; empty for the system's temporary directory.
    """

    tokens: float = 1e12
    documents: float = 1e7
    corpora: int = 4
    sequence_length: int = 2048
    samples: int = 1_000_000
    made: int = 8192
    directory: str = ""

    def run(self) -> dict[str, float]:
        """Measure; returns figures by name, with their unit in it."""
        with tempfile.TemporaryDirectory(prefix="bench-", dir=self.directory or None) as name:
            paths = [Path(name) / f"corpus{number}" for number in range(self.corpora)]
            for path in paths:
                write_corpus(path, int(self.tokens) // self.corpora, int(self.documents) // self.corpora)
            return run_ranks(1, _measure, self, [str(path) for path in paths])[0]


def write_corpus(path: Path, tokens: int, documents: int, split: str = "train") -> None:
    """A corpus artifact of one split: documents of the same length, of tokens that are all 0 and take no room."""
    (path / "shards").mkdir(parents=True)
    stem, length = path / "shards" / split, tokens // documents
    with open(stem.with_suffix(".idx"), "wb") as index:
        index.write(HEADER.pack(MAGIC, VERSION, CODES[np.uint16], documents, documents + 1))
        index.write(np.full(documents, length, np.int32).tobytes())
        index.write((np.arange(documents, dtype=np.int64) * length * 2).tobytes())
        index.truncate(index.tell() + 8 * (documents + 1))  # bounds of documents, which nothing here reads
    with open(stem.with_suffix(".bin"), "wb") as stream:
        stream.truncate(documents * length * 2)
    files = {
        f"shards/{file.name}": {
            "bytes": file.stat().st_size,
            "sha256": sha256_of(file) if file.stat().st_size <= CHECKSUMMED_BYTES else "",
        }
        for file in (stem.with_suffix(".idx"), stem.with_suffix(".bin"))
    }
    splits = {split: {"documents": documents, "tokens": documents * length, "bytes": 0, "largest_token": 0}}
    facts = {"tokenizer": {"fingerprint": Ids.fingerprint, "vocabulary": Ids.vocabulary}}
    artifact = Artifact(path, "corpus", "", path.name, {}, {}, files, {"splits": splits}, facts, 0.0, 0.0)
    (path / MANIFEST).write_text(json.dumps({k: v for k, v in asdict(artifact).items() if k != "path"}))


def _measure(bench: OrderBench, paths: list[str]) -> dict[str, float]:
    half = bench.tokens / 2
    data = MixtureData(
        sources={str(n): MixtureSource(path, weight=n + 1, epochs=4.0) for n, path in enumerate(paths)},
        stages=[MixtureStage(half, {str(n): 1.0 for n in range(len(paths))})],
        sequence_length=bench.sequence_length,
    )
    (own, mapped), start = _resident(), time.perf_counter()
    samples = data.open("train", Ids(), seed=0)  # type: ignore[arg-type]
    assert isinstance(samples, Mixture)
    opened = time.perf_counter() - start
    step = int(half / bench.sequence_length) // GLOBAL_BATCH  # the one in which the weights change
    with Loader(samples, global_batch=GLOBAL_BATCH, micro_batches=1, dp_rank=0, dp_size=128, seed=0) as loader:
        loader.batch(step)
    first = time.perf_counter() - start
    at = step * GLOBAL_BATCH + np.arange(bench.samples)
    start = time.perf_counter()
    for ks in np.array_split(at, -(-bench.samples // GLOBAL_BATCH)):
        samples.drawn(ks)
    found = time.perf_counter() - start
    own_after, mapped_after = _resident()
    start = time.perf_counter()
    for ks in np.array_split(at[: bench.made], -(-bench.made // 16)):
        samples.micro_batch(ks.tolist())
    laid_out = time.perf_counter() - start
    return {
        "tokens": bench.tokens,
        "documents": bench.documents,
        "open (s)": opened,
        "open and have the first batch of a step in the middle (s)": first,
        "positions found (samples/s)": bench.samples / found,
        f"all {bench.samples:,} positions (s)": found,
        "memory that all this took (MB)": own_after - own,
        "pages of the files beside it (MB)": mapped_after - mapped,
        "micro-batches of 16 (samples/s)": bench.made / laid_out,
        "micro-batches of 16 (million tokens/s)": bench.made * bench.sequence_length / laid_out / 1e6,
    }


def _resident() -> tuple[float, float]:
    """Memory of this process in MB: its own, and pages of files that are mapped."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    own, mapped = (int(status[key].split()[0]) * 1024 / 1e6 for key in ("RssAnon", "RssFile"))
    return own, mapped
