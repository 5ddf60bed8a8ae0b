"""A document's way through the steps of a corpus, followed backwards and forwards in what the steps left behind.

A document stays in the piece that it was read into: once that is known, one piece is read of each step. What several
steps changed in one pass is not recorded; it is found by letting them judge the document again.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from omegaconf import OmegaConf

from conf.registry import OPTIONS
from data_pipeline.artifact import Artifact, ArtifactError
from data_pipeline.page import Page
from data_pipeline.shards import Shard
from data_pipeline.steps.base import DocumentStep
from data_pipeline.tokenizer import Tokenizer
from tools.inspect.errors import InspectError, NotFoundError

MOST_MATCHES = 20
"""Documents listed for a fragment of text."""
MOST_COPIES = 20
ENDS = ("read", "split", "tokenizer", "shards")
"""Steps of a corpus that are no curation."""


@dataclass(frozen=True)
class Place:
    """A document at one step.

    Args:
        step: its name.
        characters: length of the text that the step passed on, or of the one that it dropped; None where unknown.
        reason: why it was dropped; empty where it was passed on.
        note: what else is known.
    """

    step: str
    characters: int | None
    reason: str = ""
    note: str = ""


@dataclass
class Trail:
    """The way of one document.

    Args:
        id: of the document.
        metadata: as it is after the last step that is known.
        places: steps in order.
        text: the last text that is known.
        copies: ids of documents that were dropped as copies of it.
        split: where it ended; empty where it did not.
        number: in the shard of its split; -1 where it is in none.
        begin: its first token in that shard.
        tokens: how many it has there.
    """

    id: str
    metadata: dict[str, Any] = field(default_factory=dict)
    places: list[Place] = field(default_factory=list)
    text: str = ""
    copies: list[str] = field(default_factory=list)
    split: str = ""
    number: int = -1
    begin: int = 0
    tokens: int = 0

    @property
    def dropped(self) -> bool:
        return any(place.reason for place in self.places)


@dataclass(frozen=True)
class Match:
    """A document that holds a fragment of text.

    Args:
        id: of the document.
        source: where it comes from.
        where: what it was found in: the split, or the step and reason.
        around: the fragment with its surroundings.
    """

    id: str
    source: str
    where: str
    around: str


class Corpus:
    """A corpus with what its steps left.

    Args:
        path: its directory.

    Raises:
        ArtifactError: it is no finished corpus.
    """

    def __init__(self, path: Path):
        self.path = path
        self.artifact = Artifact.read(path, kind="corpus")
        self.steps = self._steps()

    def _steps(self) -> dict[str, Artifact]:
        """Those of this corpus that are still there, in order."""
        found = {}
        for directory in (self.path / "steps").glob("*"):
            try:
                step = Artifact.read(directory)
            except ArtifactError:
                continue  # one that is being made
            found[step.id] = step
        ids = self.artifact.facts.get("steps", {})
        return {name: found[id] for name, id in ids.items() if id in found}

    @property
    def splits(self) -> list[str]:
        return list(self.artifact.metrics["splits"])

    @property
    def dropping(self) -> list[str]:
        """Names of the steps that dropped something."""
        return [step["name"] for step in self.artifact.metrics["steps"] if step["dropped"]]

    def quarantine(self, step: str, piece: int | None = None) -> list[Path]:
        """Files of dropped documents: all of a step, or that of one piece."""
        files = sorted((self.path / "quarantine" / step).glob("*"))
        return [file for file in files if piece is None or number_of(file) == piece]

    def pieces(self, step: str) -> list[Path]:
        """Files of the documents that a step passed on; empty where they are gone."""
        return sorted((self.steps[step].path / "pieces").glob("*")) if step in self.steps else []

    def kept(self, split: str, piece: int | None = None) -> list[Path]:
        """Files of the documents of a split; empty where they are gone."""
        files = sorted((self.steps["split"].path / split).glob("*")) if "split" in self.steps else []
        return [file for file in files if piece is None or number_of(file) == piece]

    def listing(self, split: str) -> Path:
        """The list of the documents in a shard."""
        from data_pipeline.engine.documents import ENDING

        return self.path / "shards" / f"{split}{ENDING}"


def number_of(file: Path) -> int:
    """Of a piece, by its name."""
    return int(file.name.split(".")[0])


def holding(files: Sequence[Path], fragment: str, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(piece, record) of the records of which a field holds the fragment."""
    for piece, record in _with_bytes(files, orjson.dumps(fragment)[1:-1]):
        if fragment in record[key]:
            yield piece, record


def named(files: Sequence[Path], name: str) -> tuple[int, dict[str, Any]] | None:
    """(piece, record) of the document with this id."""
    return next(((piece, record) for piece, record in holding(files, name, "id") if record["id"] == name), None)


def search(corpus: Corpus, fragment: str) -> list[Match]:
    """Documents that hold a fragment: of those kept first, then of those dropped, then as they were read."""
    found: dict[str, Match] = {}
    for match in _matches(corpus, fragment):
        found.setdefault(match.id, match)
        if len(found) == MOST_MATCHES:
            break
    return list(found.values())


def _matches(corpus: Corpus, fragment: str) -> Iterator[Match]:
    for split in corpus.splits:
        if "split" in corpus.steps:
            for _, record in holding(corpus.kept(split), fragment, "text"):
                yield _match(record, split, fragment)
        else:
            yield from _decoded(corpus, split, fragment)
    for step in corpus.dropping:
        for _, record in holding(corpus.quarantine(step), fragment, "text"):
            yield _match(record, f"dropped by {step}: {record['reason']}", fragment)
    for _, record in holding(corpus.pieces("read"), fragment, "text"):
        yield _match(record, "as it was read", fragment)


def _match(record: dict[str, Any], where: str, fragment: str) -> Match:
    at = record["text"].index(fragment)
    around = record["text"][max(0, at - 40) : at + len(fragment) + 40]
    return Match(record["id"], record["metadata"].get("source", ""), where, " ".join(around.split()))


def _decoded(corpus: Corpus, split: str, fragment: str) -> Iterator[Match]:
    """Where the texts are gone, what the tokens say."""
    from data_pipeline.engine.documents import all_rows

    tokenizer = Tokenizer.load(corpus.path / "tokenizer")
    shard = Shard(corpus.path / "shards" / split)
    for number, (name, source, *_) in enumerate(all_rows(corpus.listing(split))):
        text = tokenizer.decode(shard.document(number).tolist())
        if fragment in text:
            yield _match({"id": name, "metadata": {"source": source}, "text": text}, split, fragment)


def follow(corpus: Corpus, name: str) -> Trail:
    """The way of the document with this id, as far as it is still there.

    Raises:
        NotFoundError: there is no such document.
    """
    trail = Trail(name)
    piece = _shard(corpus, trail)
    if "read" not in corpus.steps:
        return _without_steps(corpus, trail)
    read = [file for file in corpus.pieces("read") if piece in (None, number_of(file))]
    found = named(read, name)
    if found is None:
        unreadable = named(corpus.quarantine("read"), name)
        if unreadable is None:
            raise _unknown(corpus, name)
        _drop(trail, "read", unreadable[1])
        return trail
    piece, record = found
    _pass(trail, "read", record)
    for pass_name, step in corpus.steps.items():
        if pass_name in ENDS:
            continue
        members = [member for member, *_ in step.config["steps"]]
        after = named([file for file in corpus.pieces(pass_name) if number_of(file) == piece], name)
        stop = next(((m, at[1]) for m in members if (at := named(corpus.quarantine(m, piece), name)) is not None), None)
        if len(members) > 1:
            trail.places += replayed(step.config["steps"], record, stop[0] if stop else "")
        if stop:
            _drop(trail, *stop)
            break
        if after is None:
            raise InspectError(
                f"{name} came out of the step before {pass_name} and is neither in what that passed on nor in "
                f"quarantine: {step.path} is damaged. Delete it and build the corpus again."
            )
        record = after[1]
        note = trail.places.pop().note if len(members) > 1 else ""
        _pass(trail, members[-1], record, note)
    trail.copies = copies(corpus, name)
    return trail


def _shard(corpus: Corpus, trail: Trail) -> int | None:
    """Find the document in the shards; returns its piece."""
    import pyarrow.compute
    import pyarrow.parquet

    for split in corpus.splits:
        begin = 0
        if not corpus.listing(split).exists():
            continue
        with pyarrow.parquet.ParquetFile(corpus.listing(split)) as parquet:
            for group in range(parquet.num_row_groups):
                ids = parquet.read_row_group(group, ["id"])["id"]
                at = pyarrow.compute.index(ids, trail.id).as_py()
                if at >= 0:
                    (row,) = parquet.read_row_group(group).slice(at, 1).to_pylist()
                    shard = Shard(corpus.path / "shards" / split)
                    trail.split, trail.number = split, begin + at
                    trail.tokens = len(shard.document(trail.number))
                    trail.begin = int(shard.starts(trail.number, trail.number + 1)[0])
                    trail.metadata = {key: row[key] for key in ("source", "licence")}
                    return row["piece"]
                begin += len(ids)
    return None


def _without_steps(corpus: Corpus, trail: Trail) -> Trail:
    """What quarantine and shards still tell."""
    for step in corpus.dropping:
        if found := named(corpus.quarantine(step), trail.id):
            _drop(trail, step, found[1])
            return trail
    if not trail.split:
        raise _unknown(corpus, trail.id)
    tokenizer = Tokenizer.load(corpus.path / "tokenizer")
    trail.text = tokenizer.decode(Shard(corpus.path / "shards" / trail.split).document(trail.number)[:-1].tolist())
    trail.copies = copies(corpus, trail.id)
    return trail


def _unknown(corpus: Corpus, name: str) -> NotFoundError:
    return NotFoundError(
        f"{corpus.path} has no document {name!r}. Give an id as quarantine and samples show it, or a part of its text: "
        "text='...'."
    )


def _pass(trail: Trail, step: str, record: dict[str, Any], note: str = "") -> None:
    trail.places.append(Place(step, len(record["text"]), note=note))
    trail.text, trail.metadata = record["text"], record["metadata"]


def _drop(trail: Trail, step: str, record: dict[str, Any]) -> None:
    of = record["metadata"].get("duplicate_of")
    trail.places.append(Place(step, len(record["text"]), record["reason"], f"copy of {of}" if of else ""))
    trail.text, trail.metadata = record["text"], record["metadata"]


def replayed(steps: Sequence[Sequence[Any]], record: dict[str, Any], until: str) -> list[Place]:
    """What each step of a pass makes of a document, found by letting it judge again.

    Args:
        steps: name, class, settings and state of each.
        record: the document as it came.
        until: the step that is known to have dropped it, which is left out with those after it; empty for none.
    """
    known = {option.__name__: option for (group, _), option in OPTIONS.items() if group == "corpus/step"}
    page = Page(record["text"], record["id"], dict(record["metadata"]))
    places = []
    for name, kind, settings, *_ in steps:
        if name == until:
            break
        step = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(known[kind]), settings))
        assert isinstance(step, DocumentStep)  # others run alone
        reason = step.judge(page) if step.judges(page) else None
        note = "untouched: for other kinds" if not step.judges(page) else ""
        if reason:
            note = f"judged again it is dropped ({reason}): the code or its models changed since"
        places.append(Place(name, len(page.text), "", note))
    return places


def copies(corpus: Corpus, name: str) -> list[str]:
    """Ids of documents that were dropped as copies of this one."""
    found = []
    needle = b'"duplicate_of":' + orjson.dumps(name)
    for step in corpus.dropping:
        for _, record in _with_bytes(corpus.quarantine(step), needle):
            if record["metadata"].get("duplicate_of") == name:
                found.append(record["id"])
                if len(found) == MOST_COPIES:
                    return found
    return found


def _with_bytes(files: Sequence[Path], needle: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(piece, record) of the lines that hold these bytes; others are not parsed."""
    import zstandard

    for file in files:
        with zstandard.open(file, "rb") as stream:
            for line in io.BufferedReader(stream, 2**20):
                if needle in line:
                    yield number_of(file), orjson.loads(line)
