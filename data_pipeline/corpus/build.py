"""Raw text to token shards, as a chain of cached steps.

    read -> curation steps, in `corpus.order` -> split -> tokenizer -> shards

Each step is an artifact of its own in `steps/`, made from the one before; curation steps that judge documents one by
one run together, in one pass. What a change of one setting does not reach is found made, and a step that was cut goes
on with the pieces it lacks. At the end `tokenizer/`, `shards/` and `quarantine/` are put in place, and the corpus's
manifest is written over them.
"""

import functools
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from conf.errors import LongrunError
from data_pipeline.artifact import MANIFEST, Artifact, Draft, check_kind, fingerprint, finished, locked, recipe_of
from data_pipeline.card import page as card
from data_pipeline.chat import CHATML
from data_pipeline.executors.base import Executor, roomy
from data_pipeline.executors.local import LOCAL
from data_pipeline.shards import Shard
from data_pipeline.steps.base import CorpusStep, Step
from data_pipeline.templates import with_template
from data_pipeline.tokenizer import TRAINERS, Tokenizer
from data_pipeline.tokenizer_report import Sizes, report, table

if TYPE_CHECKING:
    from data_pipeline.corpus.text import TextCorpus

FORMAT = 2
"""Raised when steps write other files or counts than before, so that those of an older version are made again."""
SPLITS = ("train", "validation", "test")
EXAMPLES = 3
"""Dropped documents shown where a step drops too many."""


class CorpusError(LongrunError):
    """A step lost more documents than it may, or documents went missing without a reason."""


def build(corpus: "TextCorpus", directory: Path, cache: Path, workers: int, executor: Executor = LOCAL) -> Artifact:
    """Make the corpus, or find it made.

    Args:
        corpus: what is made.
        directory: becomes the artifact.
        cache: where downloads are kept.
        workers: most pieces that are worked on at the same time; the result does not depend on it.
        executor: where they are worked on.

    Raises:
        SourceError: text cannot be had.
        CorpusError: a step lost more than it may.
        TokenizerError: there is too little text for the vocabulary, or the given tokenizer cannot be read.
        TemplateError: the given tokenizer lacks special tokens of the chat template.
        PieceError: the process that worked on a piece died.
        DiskFullError: there is no room for the result.
        LiveRunError: another process is making it.
        OccupiedError: the directory holds an artifact of another kind.
    """
    settings = recipe_settings(corpus)
    if corpus.tokenizer:
        given = Tokenizer.load(corpus.tokenizer)  # its end-of-text token and chat template count too
        settings["tokenizer"] = fingerprint([given.fingerprint, given.config, given.chat_template])
    with roomy(f"corpus: {directory}"), locked(directory):
        made = finished(directory, "corpus", settings, {})
        if made is not None and intact(made):
            check(made.metrics["steps"], corpus, directory / "quarantine")
            print(f"corpus: {directory} is made already, nothing to do")
            return made
        check_kind(directory, "corpus")
        steps = make_steps(corpus, settings, directory / "steps", cache, workers, executor)
        artifact = publish(directory, settings, steps)
    splits = ", ".join(f"{split} {counts['tokens']:,}" for split, counts in artifact.metrics["splits"].items())
    print(f"corpus: {directory} is made; tokens: {splits}")
    print(table(artifact.metrics["tokenizer"]))
    return artifact


def recipe_settings(corpus: "TextCorpus") -> dict[str, Any]:
    """What decides the result, as plain values: steps that do not run, and gates, decide nothing."""
    settings = {"format": FORMAT, **{f.name: getattr(corpus, f.name) for f in fields(corpus)}}
    del settings["paths"], settings["readable"], settings["encodable"], settings["order"]
    settings["sources"] = {
        name: [type(source).__name__, asdict(source), source.state()] for name, source in corpus.sources.items()
    }
    settings["steps"] = [[name, *decisive(step)] for name, step in corpus.ordered.items()]
    return settings


def decisive(step: Step) -> list[Any]:
    settings = asdict(step)  # type: ignore[call-overload]  # all steps are dataclasses
    del settings["gate"]
    return [type(step).__name__, settings, step.state()]


def passes(steps: Mapping[str, Step]) -> list[dict[str, Step]]:
    """Which steps run together: a step that must survey the corpus runs alone."""
    groups = itertools.groupby(steps.items(), lambda item: item[0] if isinstance(item[1], CorpusStep) else "")
    return [dict(members) for _, members in groups]


def make_steps(
    corpus: "TextCorpus",
    settings: Mapping[str, Any],
    root: Path,
    cache: Path,
    workers: int,
    executor: Executor,
) -> dict[str, Artifact]:
    """Every step, made or found made, by name."""
    done: dict[str, Artifact] = {}

    def step(
        name: str, config: dict[str, Any], inputs: tuple[str, ...], make: Callable[[Draft], None], *files: str
    ) -> None:
        done[name] = cached(root, name, config, {other: done[other] for other in inputs}, make, *files)
        check(done[name].metrics["steps"], corpus, done[name].path / "quarantine")

    def chosen(*keys: str) -> dict[str, Any]:
        return {key: settings[key] for key in keys}

    def path(name: str) -> Path:
        return done[name].path

    def read(draft: Draft) -> None:
        from data_pipeline.engine.chain import Curate, curated
        from data_pipeline.engine.pieces import Tally, execute, tallied, writer
        from data_pipeline.engine.portrait import Portrait, portrayed
        from data_pipeline.readers.reading import Usable, passed_over

        readers = [reader for source in corpus.sources.values() for reader in source.readers(cache)]
        usable = Curate({"read": Usable()}, draft.path, draft.path / "quarantine")
        tally = Tally(["source", "version", "licence", "home"])
        portrait = Portrait()
        pipeline = [*readers, usable, tally, portrait, writer(draft.path / "pieces")]
        totals = execute(pipeline, draft.path / "logs", corpus.pieces, workers, executor)
        draft.metrics["steps"] = curated(["read"], totals[usable.name])
        draft.metrics["portrait"] = portrayed(totals[portrait.name])
        draft.metrics["passed_over"] = passed_over(totals)
        draft.metrics["sources"] = [
            {"name": name, "version": version, "licence": licence, "url": url, **counts}
            for (name, version, licence, url), counts in sorted(tallied(totals[tally.name]).items())
        ]

    def curate(draft: Draft, steps: dict[str, Step], before: str) -> None:
        from data_pipeline.engine.chain import Curate, curated
        from data_pipeline.engine.pieces import PieceReader, execute, pieces_of, writer
        from data_pipeline.engine.survey import Survey

        pieces = pieces_of(path(before) / "pieces", corpus.pieces)
        survey = draft.path / "survey"
        for member in steps.values():
            if isinstance(member, CorpusStep):
                survey.mkdir(exist_ok=True)
                member.survey(Survey(pieces, survey, draft.path / "logs", workers, executor))
        judge = Curate(steps, survey, draft.path / "quarantine")
        pipeline = [PieceReader(pieces), judge, writer(draft.path / "pieces")]
        totals = execute(pipeline, draft.path / "logs" / "judge", corpus.pieces, workers, executor)
        draft.metrics["steps"] = curated(list(steps), totals[judge.name])

    def split(draft: Draft, before: str) -> None:
        from data_pipeline.engine import splitting
        from data_pipeline.engine.pieces import pieces_of

        pieces = pieces_of(path(before) / "pieces", corpus.pieces)
        draft.metrics["steps"] = []
        draft.metrics["splits"], draft.metrics["portrait"] = splitting.split(
            pieces, draft.path, corpus.validation, corpus.test, workers, executor
        )
        if "train" not in draft.metrics["splits"]:
            raise CorpusError(
                "split: no document is left to train on, all are in validation or test. Give more text, or lower "
                "corpus.validation and corpus.test."
            )

    def tokenizer(draft: Draft) -> None:
        from data_pipeline.engine.tokenising import sample

        if corpus.tokenizer:
            made = with_template(Tokenizer.load(corpus.tokenizer), corpus.chat_template)
        else:
            share = corpus.tokenizer_bytes / done["split"].metrics["splits"]["train"]["bytes"]
            texts = sample(path("split") / "train", share)
            made = TRAINERS[corpus.algorithm](texts, corpus.vocabulary, corpus.specials, CHATML)
            made = with_template(made, corpus.chat_template)
        made.save(draft.path)
        draft.metrics["steps"] = []

    def shards(draft: Draft) -> None:
        from data_pipeline.engine.documents import contents
        from data_pipeline.engine.pieces import pieces_of
        from data_pipeline.engine.tokenising import NAME, write_shards

        pieces = {name: pieces_of(path("split") / name, corpus.pieces) for name in SPLITS}
        used = Tokenizer.load(path("tokenizer"))
        dropped, kept, sizes = write_shards(pieces, draft.path, path("tokenizer"), workers, executor)
        counts_V = np.zeros(used.vocabulary, np.int64)
        splits = {}
        for name in SPLITS:
            shard, largest = Shard(draft.path / name), -1
            for chunk in shard.chunks():
                largest = max(largest, int(chunk.max()))
                counts_V += np.bincount(chunk, minlength=used.vocabulary)
            size = sum((its for (split, *_), its in sizes.items() if split == name), start=Sizes())
            splits[name] = {
                "documents": shard.documents,
                "tokens": len(shard.tokens_T),
                "largest_token": largest,
                "bytes": size.bytes,
            }
            counts_V[used.eos] -= shard.documents
        draft.metrics["splits"] = splits
        draft.metrics |= contents(draft.path, SPLITS)
        draft.metrics["tokenizer"] = {**report(used, sizes, counts_V), "round_trip": kept}
        given = sum(counts["documents"] for counts in done["split"].metrics["splits"].values())
        passed = sum(counts["documents"] for counts in splits.values())
        draft.metrics["steps"] = [
            {"name": NAME, "documents_in": given, "documents_out": passed, "dropped": dropped, "counts": kept}
        ]

    step("read", chosen("format", "sources", "pieces"), (), read, "pieces/*", "quarantine/*/*")
    before = "read"
    decisions = {name: decision for name, *decision in settings["steps"]}
    for group in passes(corpus.ordered):
        name = "-".join(group) if len(group) == 1 else f"{next(iter(group))}-to-{list(group)[-1]}"
        config = {"steps": [[member, *decisions[member]] for member in group]}
        make = functools.partial(curate, steps=group, before=before)
        step(name, config, (before,), make, "pieces/*", "quarantine/*/*")
        before = name
    make = functools.partial(split, before=before)
    step("split", chosen("validation", "test"), (before,), make, *(f"{name}/*" for name in SPLITS))
    if corpus.tokenizer:
        step("tokenizer", chosen("tokenizer", "chat_template"), (), tokenizer, "*.json", "*.jinja")
    else:
        training = chosen("algorithm", "vocabulary", "tokenizer_bytes", "special_tokens", "chat_template")
        step("tokenizer", training, ("split",), tokenizer, "*.json", "*.jinja")
    step("shards", {}, ("split", "tokenizer"), shards, "*.bin", "*.idx", "*.parquet", "quarantine/*/*")
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
    print(f"{name:10} made in {artifact.duration_s:.1f} s", flush=True)
    for step in artifact.metrics["steps"]:
        print(f"  {described(step)}", flush=True)
    return artifact


def publish(directory: Path, settings: dict[str, Any], steps: Mapping[str, Artifact]) -> Artifact:
    """Put the results in place under one manifest, and delete steps of other recipes.

    Whatever was there stays valid until here; from here on there is no manifest until all is in place.
    """
    counts = [step for made in steps.values() for step in made.metrics["steps"]]
    account(
        counts, {dropped.name: dropped for made in steps.values() for dropped in (made.path / "quarantine").glob("*")}
    )
    (directory / MANIFEST).unlink(missing_ok=True)
    parts = {"tokenizer": steps["tokenizer"].path, "shards": steps["shards"].path}
    for step in steps.values():
        parts |= {f"quarantine/{dropped.name}": dropped for dropped in (step.path / "quarantine").glob("*")}
    for name in ("tokenizer", "shards", "quarantine"):
        shutil.rmtree(directory / name, ignore_errors=True)
    for name, source in parts.items():
        shutil.copytree(source, directory / name, copy_function=_link, ignore=shutil.ignore_patterns(MANIFEST))
    tokenizer = Tokenizer.load(directory / "tokenizer")
    draft = Draft(directory, "corpus", settings, {})
    draft.metrics = {
        "sources": steps["read"].metrics["sources"],
        "passed_over": steps["read"].metrics["passed_over"],
        "steps": counts,
        "portrait": {"read": steps["read"].metrics["portrait"], "kept": steps["split"].metrics["portrait"]},
        **{key: steps["shards"].metrics[key] for key in ("splits", "tokens", "lengths", "tokenizer")},
    }
    draft.facts = {
        "tokenizer": {"fingerprint": tokenizer.fingerprint, "vocabulary": tokenizer.vocabulary},
        "steps": {name: step.id for name, step in steps.items()},
        "seconds": {name: round(step.duration_s, 1) for name, step in steps.items()},
    }
    card.write(directory, draft.metrics, settings, sorted((steps["split"].path / "train").iterdir()))
    artifact = draft.publish("tokenizer/*", "shards/*", "quarantine/*/*", card.PAGE)
    current = {step.path for step in steps.values()}
    for path in (directory / "steps").iterdir():
        if path not in current:
            shutil.rmtree(path)
    return artifact


def account(steps: list[dict[str, Any]], quarantine: Mapping[str, Path]) -> None:
    """Nothing vanished: what a step passed on came in at the next, and what it dropped is in quarantine.

    Args:
        steps: their counts, in order.
        quarantine: step -> directory of the documents that it dropped.

    Raises:
        CorpusError: documents are missing, or there are more than there should be.
    """
    from data_pipeline.engine.pieces import read_records

    for before, after in itertools.pairwise(steps):
        if before["documents_out"] != after["documents_in"]:
            raise CorpusError(
                f"{before['name']} passed on {before['documents_out']} documents, {after['documents_in']} came in at "
                f"{after['name']}. Delete steps/ and build the corpus again."
            )
    for step in steps:
        files = quarantine[step["name"]].iterdir() if step["name"] in quarantine else ()
        found = Counter(record["reason"] for file in files for record in read_records(file))
        if found != Counter(step["dropped"]):
            raise CorpusError(
                f"{step['name']} dropped {reasons(step['dropped']) or 'nothing'}, its quarantine holds "
                f"{reasons(found) or 'nothing'}. Delete steps/ and build the corpus again."
            )


def intact(artifact: Artifact) -> bool:
    """Whether every recorded file is there with its size."""
    files = ((artifact.path / name, record["bytes"]) for name, record in artifact.files.items())
    return all(file.exists() and file.stat().st_size == size for file, size in files)


def check(steps: list[dict[str, Any]], corpus: "TextCorpus", quarantine: Path) -> None:
    """Every document is accounted for, and no step lost more than it may.

    Args:
        steps: their counts.
        corpus: whose gates hold.
        quarantine: where the dropped documents are, a directory per step.

    Raises:
        CorpusError: says which step, for what reasons documents were dropped, and shows some.
    """
    for step in steps:
        name, given, passed, dropped = step["name"], step["documents_in"], step["documents_out"], step["dropped"]
        if given != passed + sum(dropped.values()):
            raise CorpusError(
                f"{name}: of {given} documents {passed} came out and {sum(dropped.values())} were dropped."
            )
        if given == 0:
            raise CorpusError(f"{name}: no document came in. Give other text.")
        if passed == 0:
            raise CorpusError(
                f"{name}: no document is left; all {given} were dropped: {reasons(dropped)}."
                f"{examples(quarantine / name)}\nGive other text, relax corpus.steps.{name}, or leave it out."
            )
        judged = step.get("judged", given)
        gates = {"read": (corpus.readable, "readable"), "tokenise": (corpus.encodable, "encodable")}
        gate, key = gates.get(name, (0.0, ""))
        if name in corpus.ordered:
            gate, key = corpus.ordered[name].gate, f"steps.{name}.gate"
        kept = judged - sum(dropped.values())
        if kept < gate * judged:
            raise CorpusError(
                f"{name}: only {kept} of {judged} documents were passed on, {kept / judged:.0%}; corpus.{key} asks for "
                f"{gate:.0%}. Dropped: {reasons(dropped)}.{examples(quarantine / name)}\nLook into "
                f"{quarantine / name}; mend the text or the settings, or lower the gate."
            )
        if name in corpus.ordered and (faults := corpus.ordered[name].conclude(Counter(step["counts"]))):
            raise CorpusError(f"{name}: the corpus as a whole is refused:\n  " + "\n  ".join(faults))


def examples(quarantine: Path) -> str:
    """The first documents in quarantine: reason, id and beginning of each."""
    from data_pipeline.engine.pieces import ENDING, read_records

    files = sorted(quarantine.glob(f"*{ENDING}"))
    records = itertools.islice((record for file in files for record in read_records(file)), EXAMPLES)
    return "".join(f"\n  {record['reason']}: {record['id']}: {record['text'][:80]!r}" for record in records)


def reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(dropped.items(), key=lambda item: -item[1]))


def described(step: Mapping[str, Any]) -> str:
    dropped = f"   dropped: {reasons(step['dropped'])}" if step["dropped"] else ""
    return f"{step['name']:18} {step['documents_out']:>9,} of {step['documents_in']:>9,} documents{dropped}"


def _link(source: str, destination: str) -> None:
    """The same file under a second name; a copy where the file system has no hard links."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copy2(source, destination)
