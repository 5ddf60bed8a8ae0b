"""The corpus pipeline: every document accounted for, nothing done twice, a kill loses nothing."""

import errno
import io
import json
import multiprocessing
import os
import shutil
import signal
import tarfile
from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st

from conf import entry
from conf.errors import ConfigError, OccupiedError
from data_pipeline import shards
from data_pipeline.artifact import Artifact, ArtifactError, Draft, LiveRunError, locked
from data_pipeline.config import PipelineConfig
from data_pipeline.corpus import build as building
from data_pipeline.corpus.build import CorpusError, account, build, check
from data_pipeline.corpus.text import TextCorpus
from data_pipeline.engine.pieces import read_piece
from data_pipeline.engine.splitting import AssignSplit, position, split_of
from data_pipeline.executors.base import DiskFullError
from data_pipeline.page import Page
from data_pipeline.readers import streams
from data_pipeline.shards import ShardWriter
from data_pipeline.sources.base import Fields, SourceError
from data_pipeline.sources.files import Files
from data_pipeline.sources.huggingface import HuggingFace
from data_pipeline.sources.sdists import Sdists
from data_pipeline.sources.standard_library import StandardLibrary
from data_pipeline.steps.base import DocumentStep
from data_pipeline.steps.exact import Exact
from data_pipeline.steps.length import Length
from data_pipeline.steps.markup import Markup
from data_pipeline.steps.normalise import Normalise
from data_pipeline.templates import TemplateError, template
from data_pipeline.text import TextData
from data_pipeline.tokenizer import TRAINERS, Tokenizer
from tests.data import standard_library, tiny_tokenizer

PROSE = sorted({text[:3000] for text in topics.values() if len(text) > 500})[:30]
CODE = [text[:3000] for text in standard_library(10)[2:]]
STEPS = {"normalise": Normalise(), "markup": Markup(), "length": Length(), "exact": Exact()}
FIRST = "normalise-to-length"
CONF = Path(__file__).parent.parent.parent / "conf"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Prose, code, records; among them a copy, something short, and a broken line."""
    root = tmp_path_factory.mktemp("texts")
    for number, text in enumerate(PROSE):
        (root / f"{number:02}.md").write_text(text)
    for number, text in enumerate(CODE):
        (root / f"{number:02}.py").write_text(text)
    (root / "copy.md").write_text(PROSE[0] + "\r\n")
    (root / "short.txt").write_text("Too short.")
    records = [
        json.dumps({"text": "A record that mentions <|endoftext|>, to be read with the others. " * 9, "n": 1}),
        "{broken",
    ]
    (root / "records.jsonl").write_text("\n".join(records))
    return root


def corpus_of(root: Path, **changes) -> TextCorpus:
    settings = {"vocabulary": 400, "pieces": 2, "validation": 0.1, "test": 0.1, "steps": STEPS, "order": list(STEPS)}
    return TextCorpus(sources={"files": Files([str(root)])}, **(settings | changes))


def made(root: Path, directory: Path, workers: int = 1, **changes) -> Artifact:
    return build(corpus_of(root, **changes), directory, directory / "cache", workers)


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):
    return made(texts, tmp_path_factory.mktemp("runs") / "corpus")


def test_every_document_comes_out_or_is_in_quarantine_with_step_and_reason(corpus):
    steps = {step["name"]: step for step in corpus.metrics["steps"]}
    assert list(steps) == ["read", "normalise", "markup", "length", "exact", "tokenise"]
    assert steps["read"]["documents_in"] == len(PROSE) + len(CODE) + 2 + 2
    for before, after in zip(corpus.metrics["steps"], corpus.metrics["steps"][1:], strict=False):
        assert after["documents_in"] == before["documents_out"]
    in_manifest = {(step, reason): n for step in steps for reason, n in steps[step]["dropped"].items()}
    dropped = [d for file in (corpus.path / "quarantine").rglob("*.zst") for d in raw(file)]
    assert Counter((d["step"], d["reason"]) for d in dropped) == in_manifest
    assert in_manifest["read", "not_json"] == in_manifest["exact", "duplicate"] == 1
    assert in_manifest["length", "short"] >= 1
    assert all(d["metadata"]["source"] and d["metadata"]["licence"] for d in dropped)


def raw(file: Path) -> list[dict]:
    import zstandard

    with zstandard.open(file, "rb") as stream:
        return [json.loads(line) for line in io.BufferedReader(stream)]


def test_the_splits_hold_what_was_kept_and_open_for_training(corpus):
    tokenizer = Tokenizer.load(corpus.path / "tokenizer")
    assert tokenizer.vocabulary == 400
    for split, counts in corpus.metrics["splits"].items():
        windows = TextData(str(corpus.path), 32).open(split, tokenizer, seed=0)
        assert len(windows.shard.tokens_T) == counts["tokens"]
        texts = [tokenizer.decode(windows.shard.document(i)[:-1].tolist()) for i in range(windows.shard.documents)]
        assert all(split_of(text, 0.1, 0.1) == split for text in texts)
        assert sum(len(text.encode()) for text in texts) == counts["bytes"]
        assert all(windows.shard.document(i)[-1] == tokenizer.eos for i in range(windows.shard.documents))
    corpus.verify()


def test_a_rerun_does_nothing(corpus, texts, capsys):
    before = (corpus.path / "manifest.json").stat().st_mtime_ns
    assert made(texts, corpus.path).id == corpus.id
    assert (corpus.path / "manifest.json").stat().st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "redone"),
    [
        ({"vocabulary": 300}, ["tokenizer", "shards"]),
        ({"test": 0.2}, ["split", "tokenizer", "shards"]),
        ({"steps": STEPS | {"length": Length(least_characters=999)}}, [FIRST, "exact", "split", "tokenizer", "shards"]),
        ({"order": ["exact", "length"]}, ["exact", "length", "split", "tokenizer", "shards"]),
        ({"steps": STEPS | {"length": Length(gate=0.1)}, "readable": 0.1}, []),
        ({"steps": STEPS | {"unused": Length(gate=0.1)}}, []),
    ],
)
def test_one_changed_setting_redoes_only_what_depends_on_it(corpus, texts, tmp_path, capsys, change, redone):
    shutil.copytree(corpus.path, tmp_path / "corpus")
    again = made(texts, tmp_path / "corpus", **change)
    shown = capsys.readouterr().out.partition("corpus:")[0].splitlines()
    lines = [line.split()[:2] for line in shown if not line.startswith(" ")]
    assert [name for name, what in lines if what != "found"] == redone
    kept = {path.name.rpartition("-")[0] for path in (tmp_path / "corpus/steps").iterdir()}
    assert not lines or kept == {name for name, _ in lines}  # what nothing depends on any more is gone
    again.verify()


def test_a_changed_file_is_read_again_and_moves_no_other_document(texts, tmp_path):
    root = tmp_path / "texts"
    root.mkdir()
    for file in texts.glob("*.md"):
        (root / file.name).write_bytes(file.read_bytes())

    def splits(artifact):
        return {
            doc.id: split.name
            for split in artifact.path.glob("steps/split-*/t*")
            for f in split.iterdir()
            for doc in read_piece(f)
        }

    before = splits(made(root, tmp_path / "corpus"))
    (root / "new.md").write_text(PROSE[5] + PROSE[6])
    after = splits(made(root, tmp_path / "corpus"))
    assert len(after) == len(before) + 1
    assert {name: after[name] for name in before} == before


def test_the_number_of_processes_does_not_change_a_byte(corpus, texts, tmp_path):
    assert made(texts, tmp_path / "corpus", workers=2).id == corpus.id


def killed_at(target: type, method: str, call: int, root: Path, directory: Path) -> None:
    """Make the corpus in a process that gets SIGKILL in the given call of a method."""
    original, calls = getattr(target, method), Counter()

    def lethal(*args, **kwargs):
        calls["n"] += 1
        if calls["n"] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    def work():
        setattr(target, method, lethal)
        made(root, directory)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("target", "method", "call"),
    [
        (Length, "judge", 10),  # in the first piece
        (Length, "judge", 35),  # in the second, the first being complete
        (AssignSplit, "run", 2),
        (ShardWriter, "write", 4),
        (building.shutil, "copytree", 2),  # between the parts that are put in place
    ],
)
def test_a_killed_run_is_gone_on_with_and_ends_the_same(corpus, texts, tmp_path, target, method, call):
    killed_at(target, method, call, texts, tmp_path / "corpus")
    assert not (tmp_path / "corpus/manifest.json").exists()
    again = made(texts, tmp_path / "corpus")
    again.verify()
    assert again.id == corpus.id


def test_a_damaged_result_is_made_again(corpus, texts, tmp_path):
    shutil.copytree(corpus.path, tmp_path / "corpus")
    (tmp_path / "corpus/shards/train.bin").write_bytes(b"")
    again = made(texts, tmp_path / "corpus")
    again.verify()
    assert again.id == corpus.id


def test_a_second_builder_is_refused(texts, tmp_path):
    with locked(tmp_path / "corpus"), pytest.raises(LiveRunError, match="is being written by"):
        made(texts, tmp_path / "corpus")


def test_a_step_that_loses_too_much_stops_the_build_and_shows_what_it_dropped(texts, tmp_path):
    strict = STEPS | {"length": Length(gate=1.0)}
    expected = r"length: only \d+ of \d+ .* corpus.steps.length.gate asks for 100%.*short .*\n  short: .*: 'Too short"
    with pytest.raises(CorpusError, match=expected):
        made(texts, tmp_path / "corpus", steps=strict)
    with pytest.raises(CorpusError, match=r"length: no document is left; all \d+ were dropped: short \d+"):
        made(texts, tmp_path / "corpus", steps=STEPS | {"length": Length(least_characters=10**6)})
    assert not (tmp_path / "corpus/manifest.json").exists()


def test_a_document_that_vanishes_without_a_reason_stops_the_build(texts):
    step = {"name": "length", "documents_in": 5, "documents_out": 3, "dropped": {"short": 1}}
    with pytest.raises(CorpusError, match="of 5 documents 3 came out and 1 were dropped"):
        check([step], corpus_of(texts), Path())


def test_a_document_that_vanishes_between_steps_or_from_quarantine_stops_the_build(corpus, tmp_path):
    steps = deepcopy(corpus.metrics["steps"])
    quarantine = {file.name: file for file in (corpus.path / "quarantine").iterdir()}
    account(steps, quarantine)
    with pytest.raises(CorpusError, match="exact dropped duplicate 1, its quarantine holds nothing"):
        account(steps, {name: file for name, file in quarantine.items() if name != "exact"})
    steps[1]["documents_in"] -= 1
    with pytest.raises(CorpusError, match=r"read passed on (\d+) documents, \d+ came in at normalise"):
        account(steps, quarantine)


def test_a_step_that_drops_all_that_it_judges_stops_the_build_though_others_pass(texts, tmp_path):
    steps = {"length": Length(kinds=["code"], least_characters=10**6)}
    with pytest.raises(CorpusError, match=r"length: only 0 of \d+ documents were passed on"):
        made(texts, tmp_path / "corpus", steps=steps, order=["length"])


def test_a_directory_that_cannot_be_made_is_one_message(texts, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot be made a directory"):
        made(texts, tmp_path / "file" / "corpus")


@dataclass(frozen=True)
class Erase(DocumentStep):
    """A step that empties what it judges, and refuses the corpus where it counted enough."""

    most: int = 10**9

    def judge(self, page: Page) -> None:
        page.counts["seen"] += 2
        page.text = "  " if len(page.text) % 2 else page.text

    def conclude(self, totals: Counter[str]) -> list[str]:
        return [f"saw {totals['seen']}"] if totals["seen"] > self.most else []


def test_a_document_that_a_step_empties_is_in_quarantine_as_it_came(texts, tmp_path):
    corpus = made(texts, tmp_path / "corpus", steps={"erase": Erase(kinds=["prose"])}, order=["erase"])
    (step,) = [step for step in corpus.metrics["steps"] if step["name"] == "erase"]
    dropped = [d for file in (corpus.path / "quarantine/erase").iterdir() for d in raw(file)]
    assert step["dropped"] == {"empty": len(dropped)} and dropped
    assert all(len(d["text"]) % 2 and d["metadata"]["kind"] == "prose" for d in dropped)
    assert step["counts"] == {"seen": 2 * step["judged"]} and step["judged"] < step["documents_in"]
    assert step["characters_in"] - step["characters_out"] == sum(len(d["text"]) for d in dropped)


def test_a_step_can_refuse_the_corpus_as_a_whole(texts, tmp_path):
    with pytest.raises(CorpusError, match=r"erase: the corpus as a whole is refused:\n  saw \d+"):
        made(texts, tmp_path / "corpus", steps={"erase": Erase(most=3)}, order=["erase"])


def test_an_old_corpus_stays_whole_while_a_new_one_fails(corpus, texts, tmp_path):
    shutil.copytree(corpus.path, tmp_path / "corpus")
    with pytest.raises(CorpusError):
        made(texts, tmp_path / "corpus", steps=STEPS | {"length": Length(least_characters=10**6)})
    Artifact.read(tmp_path / "corpus", "corpus").verify()
    assert Artifact.read(tmp_path / "corpus").id == corpus.id


def test_an_empty_or_missing_set_is_refused(tmp_path):
    with pytest.raises(SourceError, match="does not exist"):
        made(tmp_path / "nothing", tmp_path / "corpus")
    (tmp_path / "texts").mkdir()
    with pytest.raises(SourceError, match=r"no file that ends in \.rst"):
        made(tmp_path / "texts", tmp_path / "corpus")
    (tmp_path / "texts/empty.md").write_text("")
    with pytest.raises(CorpusError, match="read: no document is left; all 1 were dropped: empty 1"):
        made(tmp_path / "texts", tmp_path / "corpus")


def test_an_existing_tokenizer_is_used_as_it_is(texts, tmp_path):
    given_one = tiny_tokenizer(450)
    given_one.save(tmp_path / "given")
    corpus = made(texts, tmp_path / "corpus", tokenizer=str(tmp_path / "given"))
    assert corpus.facts["tokenizer"] == {"fingerprint": given_one.fingerprint, "vocabulary": 450}
    TextData(str(corpus.path), 32).open("train", given_one, seed=0)


def test_an_end_of_text_token_of_another_name_makes_other_shards(texts, tmp_path):
    tiny_tokenizer(450).save(tmp_path / "given")
    first = made(texts, tmp_path / "corpus", tokenizer=str(tmp_path / "given"))
    file = tmp_path / "given" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<|im_end|>"}))
    second = made(texts, tmp_path / "corpus", tokenizer=str(tmp_path / "given"))
    assert second.id != first.id and Tokenizer.load(second.path / "tokenizer").eos == 3


def test_what_the_tokenizer_cannot_express_is_in_quarantine(texts, tmp_path):
    shutil.copytree(texts, tmp_path / "texts")
    (tmp_path / "texts/chinese.md").write_text(PROSE[3] + "\u5b57")
    TRAINERS["wordpiece"](PROSE + CODE, 600).save(tmp_path / "given")
    corpus = made(tmp_path / "texts", tmp_path / "corpus", tokenizer=str(tmp_path / "given"), encodable=0.5)
    step = corpus.metrics["steps"][-1]
    (dropped,) = [d for file in (corpus.path / "quarantine/tokenise").iterdir() for d in raw(file)]
    assert step["dropped"] == {"unknown_tokens": 1}
    assert dropped["reason"] == "unknown_tokens" and dropped["id"].endswith("chinese.md")
    assert corpus.metrics["tokenizer"]["round_trip"] == {"normalised": step["documents_out"]}
    with pytest.raises(CorpusError, match=r"tokenise: only .* corpus\.encodable asks for 100%.*\n.*chinese\.md"):
        made(tmp_path / "texts", tmp_path / "corpus", tokenizer=str(tmp_path / "given"), encodable=1.0)


@pytest.mark.parametrize("algorithm", ["unigram", "wordpiece"])
def test_other_tokenizers_are_trained_by_name(texts, tmp_path, algorithm):
    changes = {"algorithm": algorithm, "vocabulary": 600, "encodable": 0.5, "special_tokens": ["<|tool|>"]}
    corpus = made(texts, tmp_path / "corpus", **changes)
    tokenizer = Tokenizer.load(corpus.path / "tokenizer")
    assert tokenizer.vocabulary == 600 and tokenizer.chat_template
    assert tokenizer.lossless == (algorithm == "unigram")
    assert tokenizer.special("<|tool|>") in tokenizer.special_ids
    found = corpus.metrics["tokenizer"]
    assert found["all"]["tokens"] + found["all"]["documents"] == sum(
        counts["tokens"] for counts in corpus.metrics["splits"].values()
    )
    assert set(found["kind"]) == {"code", "prose"} and not found["language"]
    TextData(str(corpus.path), 32).open("train", tokenizer, seed=0)


def test_a_chat_template_by_name_brings_its_special_tokens(texts, tmp_path):
    corpus = made(texts, tmp_path / "corpus", chat_template="llama3", vocabulary=450)
    tokenizer = Tokenizer.load(corpus.path / "tokenizer")
    assert tokenizer.chat_template == template("llama3")
    assert tokenizer.special("<|eot_id|>") in tokenizer.special_ids and tokenizer.vocabulary == 450
    with pytest.raises(TemplateError, match=r"chat_template=llama3 needs special tokens"):
        tiny_tokenizer(450).save(tmp_path / "given")
        made(texts, tmp_path / "other", chat_template="llama3", tokenizer=str(tmp_path / "given"))


def test_an_artifact_of_another_kind_is_not_written_over(texts, tmp_path):
    (tmp_path / "run").mkdir()
    Draft(tmp_path / "run", "sft", {}, {}).publish()
    with pytest.raises(OccupiedError, match="holds a finished 'sft'"):
        made(texts, tmp_path / "run")
    assert Artifact.read(tmp_path / "run").kind == "sft"


@pytest.mark.parametrize("target", [shards, building.shutil])
def test_a_disk_that_is_full_is_told_and_a_rerun_ends_the_same(corpus, texts, tmp_path, monkeypatch, target):
    """While a piece is written; while the parts are put in place."""

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(target, "_write_index" if target is shards else "copytree", full)
        with pytest.raises(DiskFullError, match=r"no room is left.*run the same command again"):
            made(texts, tmp_path / "corpus")
    assert not (tmp_path / "corpus/manifest.json").exists()
    assert made(texts, tmp_path / "corpus").id == corpus.id


def test_a_corpus_without_a_training_document_is_refused(texts, tmp_path):
    with pytest.raises(CorpusError, match="no document is left to train on"):
        made(texts, tmp_path / "corpus", validation=0.5, test=0.49999)


# Sources


def packed(ending: str, content: bytes) -> bytes:
    import gzip

    import zstandard

    frames = [content[: len(content) // 2], content[len(content) // 2 :]]  # as `cat a.zst b.zst` makes them
    return {
        "": lambda: content,
        ".gz": lambda: b"".join(map(gzip.compress, frames)),
        ".zst": lambda: b"".join(map(zstandard.ZstdCompressor().compress, frames)),
    }[ending]()


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_lines_are_all_read_whatever_they_are_packed_in(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(streams, "BLOCK", 1000)
    expected = [f"{number} {position(str(number))}".encode() for number in range(2000)]
    (tmp_path / f"x.jsonl{ending}").write_bytes(packed(ending, b"\n".join(expected)))
    assert [line.content for line in streams.lines(tmp_path / f"x.jsonl{ending}")] == expected


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_of_a_packed_file_that_breaks_off_the_rest_is_read_and_the_fault_counted(tmp_path, ending):
    records = "\n".join(json.dumps({"text": text}) for text in PROSE)
    whole = packed(ending, records.encode())
    (tmp_path / f"x.jsonl{ending}").write_bytes(whole[: len(whole) * 3 // 4])
    (reader,) = Files([str(tmp_path)]).readers(tmp_path)
    *before, fault = reader.run()
    assert [doc.text for doc in before] == PROSE[: len(before)] and len(before) > len(PROSE) // 3
    assert fault.metadata["fault"] == "damaged" and fault.id == f"{tmp_path}/x.jsonl{ending}"


def test_excluded_records_are_not_read(tmp_path):
    (tmp_path / ".hidden").mkdir()
    for name in ("notes.jsonl", ".hidden/keys.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "x"}))
    assert [name for _, name, *_ in Files([str(tmp_path)]).state()] == ["notes.jsonl"]


def sdist(cache: Path, licence: str = "License-Expression: BSD-3-Clause") -> Sdists:
    """A source distribution in the cache, with members that must not be followed."""
    directory = cache / "sdists/Demo==1.0"
    directory.mkdir(parents=True)
    with tarfile.open(directory / "demo-1.0.tar.gz", "w:gz") as archive:
        members = {
            "demo-1.0/PKG-INFO": f"Metadata-Version: 2.4\nName: Demo\nVersion: 1.0\n{licence}\n\nText.",
            "demo-1.0/docs/guide.rst": PROSE[1],
            "demo-1.0/docs/latin.rst": b"caf\xe9 " * 100,
            "demo-1.0/tests/test_x.py": "assert True",
            "../../evil.rst": PROSE[2],
        }
        for name, content in members.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("demo-1.0/docs/passwd.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return Sdists(["Demo==1.0"])


def test_a_source_distribution_is_read_with_its_licence_and_without_unpacking(tmp_path):
    (reader,) = sdist(tmp_path / "cache").readers(tmp_path / "cache")
    documents = {doc.metadata["path"]: doc for doc in reader.run()}
    evil = "demo-1.0.tar.gz/../../evil.rst"
    assert set(documents) == {"docs/guide.rst", "docs/latin.rst", evil}
    assert documents["docs/guide.rst"].metadata["licence"] == "BSD-3-Clause"
    assert documents["docs/latin.rst"].metadata["fault"] == "not_utf8"
    assert documents[evil].metadata["fault"] == "unsafe_path"
    assert {file.name for file in tmp_path.rglob("*") if file.is_file()} == {"demo-1.0.tar.gz"}


def test_a_licence_that_is_not_accepted_is_refused(tmp_path):
    source = sdist(tmp_path, "Classifier: License :: OSI Approved :: GNU General Public License v3 (GPLv3)")
    with pytest.raises(SourceError, match=r"Demo==1\.0: GNU General Public License"):
        source.readers(tmp_path)


def test_a_damaged_archive_is_named(tmp_path):
    source = sdist(tmp_path)
    file = tmp_path / "sdists/Demo==1.0/demo-1.0.tar.gz"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(SourceError, match="is damaged"):
        source.readers(tmp_path)


def test_the_standard_library_is_a_source():
    (reader,) = StandardLibrary().readers(Path())
    names = [name for _, name, _ in reader.files]
    assert "ast.py" in names
    assert not [name for name in names if "/test/" in name or "site-packages" in name]


def test_rows_of_a_data_set_are_read_by_name(tmp_path):
    """A local directory in place of a hub: `datasets` opens both alike."""
    rows = [{"content": text} for text in PROSE[:5]] + [{"content": None}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (reader,) = HuggingFace(str(tmp_path), fields=Fields("content"), licence="PSF-2.0").readers(tmp_path)
    documents = list(reader.run())
    assert [doc.text for doc in documents[:5]] == PROSE[:5]
    assert documents[0].metadata["licence"] == "PSF-2.0"
    assert documents[5].metadata["fault"] == "no_text"


# Text


def judged(step: DocumentStep, text: str, kind: str = "prose") -> str:
    """The text as the step leaves it."""
    page = Page(text, "a", {"kind": kind})
    assert step.judge(page) is None
    return page.text


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("a :`<>_.\n\r\té\u0301\x00") | st.characters(exclude_categories=["Cs"])))
def test_normalising_keeps_lines_free_of_trailing_space_and_control_characters(text):
    result = judged(Normalise(), text)
    assert all(line == line.rstrip() for line in result.split("\n"))
    assert not {"\r", "\x00", "\ufeff"}.intersection(result)
    assert "\n\n\n\n" not in result
    assert judged(Normalise(), result) == result


def test_markup_is_reduced_to_what_a_reader_sees():
    rst = ".. _label:\n\nSee :ref:`the guide <guide>`, :class:`~a.B` and `site <http://x>`_; write ``x = 1``."
    assert judged(Markup(), rst) == "See the guide, a.B and site; write `x = 1`."


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        ({}, None),
        ({"least_characters": 31}, "short"),
        ({"most_characters": 29}, "long"),
        ({"least_characters": 30, "most_characters": 30}, None),
    ],
)
def test_length_keeps_its_bands_bounds_included(bounds, reason):
    assert Length(**{"least_characters": 0, **bounds}).judge(Page("x" * 30, "a", {"kind": "prose"})) == reason


def test_views_of_a_text_follow_it():
    page = Page("a\nb", "a", {})
    assert page.lines == ["a", "b"]
    page.text = "c"
    assert page.lines == ["c"]


@given(st.text(), st.floats(0, 0.5), st.floats(0, 0.4))
def test_growing_the_validation_split_takes_no_document_out_of_it(text, validation, more):
    if split_of(text, validation, 0.0) == "validation":
        assert split_of(text, validation + more, 0.1) == "validation"


# Configuration


@pytest.mark.parametrize("preset", sorted(file.stem for file in (CONF / "corpus").glob("*.yaml")))
def test_every_shipped_corpus_composes(preset):
    web = ["+corpus/source@corpus.sources.x=standard_library"]
    needed = {
        "web": web,
        "text": web,
        "files": ["corpus.paths=[x]"],
        "huggingface": ["corpus.sources.huggingface.dataset=x"],
    }
    needed |= {key: ["corpus.paths=[x]"] for key in ("exports", "html", "jsonl", "parquet", "repositories", "warc")}
    overrides = [f"corpus={preset}", *needed.get(preset, [])]
    with initialize_config_module("conf", version_base="1.3"):
        config = entry.typed(compose("data_pipeline", overrides=overrides), PipelineConfig)
    assert all(source.problems("x") == [] for source in config.corpus.sources.values())
    assert config.run_dir == "runs/corpus"
    assert config.corpus.ordered or preset in ("chats", "tasks")


def test_all_problems_are_found_at_once(texts):
    bad = replace(
        corpus_of(texts),
        vocabulary=100,
        validation=0.6,
        test=0.5,
        pieces=0,
        algorithm="words",
        special_tokens=["tool"],
        encodable=2.0,
        sources={"x": Sdists(["Flask"]), "y": Files([])},
        steps={"length": Length(gate=2), "form": Normalise(form="NFX")},
        order=["length", "form", "form", "none", "split"],
        readable=7,
    )
    with pytest.raises(ConfigError) as error:
        raise ConfigError(PipelineConfig(corpus=bad, workers=-1).problems())
    keys = {problem.key for problem in error.value.problems}
    assert keys == {
        "workers",
        "corpus.vocabulary",
        "corpus.test",
        "corpus.pieces",
        "corpus.algorithm",
        "corpus.special_tokens",
        "corpus.encodable",
        "corpus.sources.x.packages",
        "corpus.sources.y.paths",
        "corpus.steps.length.gate",
        "corpus.steps.form.form",
        "corpus.order",
        "corpus.steps",
        "corpus.readable",
    }
