"""Raw text to token shards, as a chain of cached steps.

    read -> clean -> split -> tokenizer -> shards

Each step is an artifact of its own in `steps/`, made from the one before. What a change of one setting does not reach
is found made, and a step that was cut goes on with the pieces it lacks. At the end `tokenizer/`, `shards/` and
`quarantine/` are put in place, and the corpus's manifest is written over them.
"""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import LongrunError
from data_pipeline.artifact import MANIFEST, Artifact, Draft, check_kind, fingerprint, finished, locked, recipe_of
from data_pipeline.chat import CHATML
from data_pipeline.tokenizer import Tokenizer, train_bpe

if TYPE_CHECKING:
    from data_pipeline.corpus.text import TextCorpus

SPLITS = ("train", "validation", "test")
Names = tuple[str, ...]


class CorpusError(LongrunError):
    """A step lost more documents than it may, or documents went missing without a reason."""


def build(corpus: "TextCorpus", directory: Path, cache: Path, workers: int) -> Artifact:
    """Make the corpus, or find it made.

    Args:
        corpus: what is made.
        directory: becomes the artifact.
        cache: where downloads are kept.
        workers: processes; the result does not depend on it.

    Raises:
        SourceError: text cannot be had.
        CorpusError: a step lost more than it may.
        TokenizerError: there is too little text for the vocabulary, or the given tokenizer cannot be read.
        LiveRunError: another process is making it.
        OccupiedError: the directory holds an artifact of another kind.
    """
    settings = asdict(corpus)
    del settings["paths"], settings["gates"]  # the first is in the sources, the second changes no document
    settings["states"] = {name: source.state() for name, source in corpus.sources.items()}
    if corpus.tokenizer:
        given = Tokenizer.load(corpus.tokenizer)  # its end-of-text token and chat template count too
        settings["tokenizer"] = fingerprint([given.fingerprint, given.config, given.chat_template])
    with locked(directory):
        made = finished(directory, "corpus", settings, {})
        if made is not None and intact(made):
            check(made.metrics["steps"], corpus)
            print(f"corpus: {directory} is made already, nothing to do")
            return made
        check_kind(directory, "corpus")
        steps = make_steps(corpus, settings, directory / "steps", cache, workers)
        artifact = publish(directory, settings, steps)
    splits = ", ".join(f"{split} {counts['tokens']:,}" for split, counts in artifact.metrics["splits"].items())
    print(f"corpus: {directory} is made; tokens: {splits}")
    return artifact


def make_steps(
    corpus: "TextCorpus", settings: Mapping[str, Any], root: Path, cache: Path, workers: int
) -> dict[str, Artifact]:
    """Every step, made or found made, by name."""
    done: dict[str, Artifact] = {}

    def step(
        name: str, keys: tuple[str, ...], inputs: tuple[str, ...], make: Callable[[Draft], None], *files: str
    ) -> None:
        config = {key: settings[key] for key in keys}
        done[name] = cached(root, name, config, {other: done[other] for other in inputs}, make, *files)
        check(done[name].metrics["steps"], corpus)

    def path(name: str) -> Path:
        return done[name].path

    def read(draft: Draft) -> None:
        from data_pipeline.corpus.steps.pieces import Tally, execute, quarantine, tallied, writer
        from data_pipeline.corpus.steps.reading import Usable

        readers = [reader for source in corpus.sources.values() for reader in source.readers(cache)]
        usable = Usable(quarantine(draft.path / "quarantine", "read"))
        tally = Tally(["source", "version", "licence", "url"])
        pipeline = [*readers, usable, tally, writer(draft.path / "pieces")]
        totals = execute(pipeline, draft.path / "logs", corpus.pieces, workers)
        draft.metrics["steps"] = [counted("read", totals[usable.name])]
        draft.metrics["sources"] = [
            {"name": name, "version": version, "licence": licence, "url": url, **counts}
            for (name, version, licence, url), counts in sorted(tallied(totals[tally.name]).items())
        ]

    def clean(draft: Draft) -> None:
        from data_pipeline.corpus.steps.cleaning import Normalise, Quality
        from data_pipeline.corpus.steps.pieces import PieceReader, execute, pieces_of, quarantine, writer

        quality = Quality(corpus.rules, quarantine(draft.path / "quarantine", "quality"))
        normalise = Normalise(corpus.strip_markup)
        reader = PieceReader(pieces_of(path("read") / "pieces", corpus.pieces))
        pipeline = [reader, normalise, quality, writer(draft.path / "pieces")]
        totals = execute(pipeline, draft.path / "logs", corpus.pieces, workers)
        draft.metrics["steps"] = [
            counted("normalise", totals[normalise.name]),
            counted("quality", totals[quality.name]),
        ]

    def split(draft: Draft) -> None:
        from data_pipeline.corpus.steps.pieces import pieces_of, tallied
        from data_pipeline.corpus.steps.splitting import deduplicate_and_split

        pieces = pieces_of(path("clean") / "pieces", corpus.pieces)
        kept, splits = deduplicate_and_split(pieces, draft.path, corpus.validation, corpus.test, workers)
        draft.metrics["steps"] = [counted("deduplicate", kept, "duplicate")]
        draft.metrics["splits"] = {name: counts for (name,), counts in tallied(splits).items()}
        if draft.metrics["splits"] and "train" not in draft.metrics["splits"]:
            raise CorpusError(
                "split: no document is left to train on, all are in validation or test. Give more text, or lower "
                "corpus.validation and corpus.test."
            )

    def tokenizer(draft: Draft) -> None:
        from data_pipeline.corpus.steps.tokenising import sample

        if corpus.tokenizer:
            Tokenizer.load(corpus.tokenizer).save(draft.path)
        else:
            share = corpus.tokenizer_bytes / done["split"].metrics["splits"]["train"]["bytes"]
            train_bpe(sample(path("split") / "train", share), corpus.vocabulary, chat_template=CHATML).save(draft.path)
        draft.metrics["steps"] = []

    def shards(draft: Draft) -> None:
        from data_pipeline.corpus.steps.pieces import pieces_of
        from data_pipeline.corpus.steps.tokenising import write_shards

        splits, documents = {}, 0
        pieces = {name: pieces_of(path("split") / name, corpus.pieces) for name in SPLITS}
        for name, shard in write_shards(pieces, draft.path, path("tokenizer"), workers).items():
            largest = max((int(chunk.max()) for chunk in shard.chunks()), default=-1)
            splits[name] = {"documents": shard.documents, "tokens": len(shard.tokens_T), "largest_token": largest}
            documents += shard.documents
        draft.metrics["splits"] = splits
        kept = done["split"].metrics["steps"][-1]["documents_out"]
        draft.metrics["steps"] = [{"name": "tokenise", "documents_in": kept, "documents_out": documents, "dropped": {}}]

    step("read", ("sources", "states", "pieces"), (), read, "pieces/*", "quarantine/*")
    step("clean", ("strip_markup", "rules"), ("read",), clean, "pieces/*", "quarantine/*")
    step("split", ("validation", "test"), ("clean",), split, *(f"{name}/*" for name in SPLITS), "quarantine/*")
    if corpus.tokenizer:
        step("tokenizer", ("tokenizer",), (), tokenizer, "*.json", "*.jinja")
    else:
        step("tokenizer", ("vocabulary", "tokenizer_bytes"), ("split",), tokenizer, "*.json", "*.jinja")
    step("shards", (), ("split", "tokenizer"), shards, "*.bin", "*.idx")
    return done


def cached(
    root: Path,
    name: str,
    config: dict[str, Any],
    inputs: dict[str, Artifact],
    make: Callable[[Draft], None],
    *files: str,
) -> Artifact:
    """A step's artifact: found whole, or made; what a cut run left of it is gone on with.

    Args:
        root: holds one directory per step and recipe.
        name: of the step.
        config: settings that it depends on.
        inputs: steps that it reads.
        make: does the work in the draft's directory and fills in its metrics.
        files: patterns of what it writes; all else in its directory is deleted once it is made.
    """
    kind = f"corpus-{name}"
    path = root / f"{name}-{recipe_of(kind, config, inputs)}"
    made = finished(path, kind, config, inputs)
    if made is not None:
        if intact(made):
            print(f"{name:10} found made", flush=True)
            return made
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    draft = Draft(path, kind, config, inputs)
    make(draft)
    artifact = draft.publish(*files)
    kept = {Path(file).parts[0] for file in artifact.files} | {MANIFEST}
    for leftover in path.iterdir():
        if leftover.name not in kept:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    lines = "; ".join(described(step) for step in artifact.metrics["steps"])
    print(f"{name:10} {lines or 'made'} in {artifact.duration_s:.1f} s", flush=True)
    return artifact


def publish(directory: Path, settings: dict[str, Any], steps: Mapping[str, Artifact]) -> Artifact:
    """Put the results in place under one manifest, and delete steps of other recipes.

    Whatever was there stays valid until here; from here on there is no manifest until all is in place.
    """
    (directory / MANIFEST).unlink(missing_ok=True)
    parts = {"tokenizer": steps["tokenizer"].path, "shards": steps["shards"].path}
    parts |= {f"quarantine/{name}": steps[name].path / "quarantine" for name in ("read", "clean", "split")}
    for name in ("tokenizer", "shards", "quarantine"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name, source in parts.items():
        if source.exists():
            shutil.copytree(source, directory / name, copy_function=_link, ignore=shutil.ignore_patterns(MANIFEST))
    tokenizer = Tokenizer.load(directory / "tokenizer")
    splits = {}
    for name in SPLITS:
        shard = steps["shards"].metrics["splits"][name]
        size = steps["split"].metrics["splits"].get(name, {"documents": 0, "bytes": 0})
        if size["documents"] != shard["documents"]:
            raise CorpusError(f"{name}: {size['documents']} documents were split off, {shard['documents']} tokenised.")
        splits[name] = {**shard, "bytes": size["bytes"]}
    draft = Draft(directory, "corpus", settings, {})
    draft.metrics = {
        "sources": steps["read"].metrics["sources"],
        "steps": [counts for step in steps.values() for counts in step.metrics["steps"]],
        "splits": splits,
    }
    draft.facts = {
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocabulary": tokenizer.vocabulary},
        "steps": {name: step.id for name, step in steps.items()},
        "seconds": {name: round(step.duration_s, 1) for name, step in steps.items()},
    }
    artifact = draft.publish("tokenizer/*", "shards/*", "quarantine/*/*")
    current = {step.path for step in steps.values()}
    for path in (directory / "steps").iterdir():
        if path not in current:
            shutil.rmtree(path)
    return artifact


def intact(artifact: Artifact) -> bool:
    """Whether every recorded file is there with its size."""
    files = ((artifact.path / name, record["bytes"]) for name, record in artifact.files.items())
    return all(file.exists() and file.stat().st_size == size for file, size in files)


def counted(name: str, totals: Counter[str], reason: str = "") -> dict[str, Any]:
    """What went into a step, came out of it and was dropped, from datatrove's statistics.

    Args:
        name: of the step.
        totals: label -> count.
        reason: why documents are dropped, where the step has one reason only.
    """
    passed = totals["forwarded"] if "forwarded" in totals or "dropped" in totals else totals["total"]
    dropped = {label.removeprefix("dropped_"): n for label, n in sorted(totals.items()) if label.startswith("dropped_")}
    if reason and totals["dropped"]:
        dropped = {reason: totals["dropped"]}
    return {"name": name, "documents_in": totals["total"], "documents_out": passed, "dropped": dropped}


def check(steps: list[dict[str, Any]], corpus: "TextCorpus") -> None:
    """Every document is accounted for, and no step lost more than it may.

    Raises:
        CorpusError: says which step, and for what reasons documents were dropped.
    """
    gates = asdict(corpus.gates)
    for step in steps:
        name, given, passed, dropped = step["name"], step["documents_in"], step["documents_out"], step["dropped"]
        if given != passed + sum(dropped.values()):
            raise CorpusError(
                f"{name}: of {given} documents {passed} came out and {sum(dropped.values())} were dropped."
            )
        if given == 0 or passed == 0:
            why = f"all {given} were dropped: {reasons(dropped)}" if given else "none came in"
            raise CorpusError(f"{name}: no document is left; {why}. Give other text, or relax corpus.rules.")
        if passed / given < gates.get(name, 0):
            raise CorpusError(
                f"{name}: only {passed} of {given} documents were passed on, {passed / given:.0%}; corpus.gates.{name} "
                f"asks for {gates[name]:.0%}. Dropped: {reasons(dropped)}. Look into steps/*/quarantine; mend the text "
                "or the rules, or lower the gate."
            )


def reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))


def described(step: Mapping[str, Any]) -> str:
    dropped = f" (dropped: {reasons(step['dropped'])})" if step["dropped"] else ""
    return f"{step['name']} {step['documents_out']:,} of {step['documents_in']:,} documents{dropped}"


def _link(source: str, destination: str) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
