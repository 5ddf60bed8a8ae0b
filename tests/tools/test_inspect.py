"""From documents to samples and back: what is shown is what the steps and the runs do."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from conf import entry
from conf.checkpoints import CHECKPOINTS
from conf.errors import ConfigError
from conf.registry import OPTIONS
from data_pipeline.batch import IGNORED
from data_pipeline.engine.pieces import read_records
from data_pipeline.loader import Loader
from data_pipeline.shards import Shard
from data_pipeline.steps.base import DocumentStep
from data_pipeline.tokenizer import Tokenizer
from tests.data_pipeline.chats import CONVERSATION, tokenizer, write_jsonl
from tests.data_pipeline.test_corpus import made, texts  # noqa: F401  a fixture
from tools.inspect import show
from tools.inspect.__main__ import InspectConfig, main, only
from tools.inspect.errors import InspectError
from tools.inspect.run import Run
from tools.inspect.trail import Corpus, follow, replayed, search
from train.checkpoint.committed import TRAINER, path_of
from train.config import RunConfig
from train.progress import Progress
from train.rundir import with_options, write_config


@pytest.fixture(scope="module")
def corpus(texts, tmp_path_factory):  # noqa: F811
    made(texts, tmp_path_factory.mktemp("runs") / "corpus")
    return Corpus(tmp_path_factory.getbasetemp() / next(tmp_path_factory.getbasetemp().glob("runs*/corpus")))


def run_of(directory, *settings: str) -> Run:
    """A run that was configured, and has yet to begin."""
    directory.mkdir(parents=True)
    with initialize_config_module("conf", version_base="1.3"):
        node = compose("train", overrides=["model=smoke", "stage.steps=20", *settings])
    config = entry.typed(node, RunConfig)
    write_config(directory, with_options(config, OmegaConf.to_container(node, resolve=True)))
    return Run(directory)


@pytest.fixture
def run(corpus, tmp_path):
    return run_of(
        tmp_path / "run",
        f"data.path={corpus.path}",
        "data.sequence_length=64",
        "stage.global_batch=8",
        "stage=pretrain",
    )


def documents(corpus: Corpus, split: str = "train") -> list[dict]:
    return [record for file in corpus.kept(split) for record in read_records(file)]


# A document's way


def test_every_document_is_followed_to_where_it_ended(corpus):
    own = Tokenizer.load(corpus.path / "tokenizer")
    steps = [step["name"] for step in corpus.artifact.metrics["steps"]]
    for split in corpus.splits:
        shard = Shard(corpus.path / "shards" / split)
        for number, record in enumerate(documents(corpus, split)):
            way = follow(corpus, record["id"])
            assert (way.split, way.number, way.tokens) == (split, number, len(shard.document(number)))
            assert [place.step for place in way.places] == steps[:-1] and not way.dropped
            tokens = shard.tokens_T[way.begin : way.begin + way.tokens - 1]
            assert own.decode(tokens.tolist()) == record["text"] == way.text
    for step in corpus.artifact.metrics["steps"]:
        for file in corpus.quarantine(step["name"]):
            for record in read_records(file):
                way = follow(corpus, record["id"])
                assert way.places[-1].step == step["name"] and way.places[-1].reason == record["reason"]
                assert not way.split and sum(bool(place.reason) for place in way.places) == 1


def test_changes_of_length_are_told_step_by_step(corpus):
    way = follow(corpus, next(record["id"] for record in documents(corpus) if record["id"].endswith("00.md")))
    assert [place.characters for place in way.places][-1] == len(way.text)
    copy = follow(corpus, next(r["id"] for f in corpus.quarantine("exact") for r in read_records(f)))
    read, normalised = copy.places[:2]
    assert read.characters - normalised.characters >= 1  # it ended with a line


def test_every_step_that_judges_by_itself_can_judge_again():
    kinds = [kind for (group, _), kind in OPTIONS.items() if group == "corpus/step" and issubclass(kind, DocumentStep)]
    steps = [[kind.__name__, kind.__name__, asdict(kind()), None] for kind in kinds if kind.__name__ != "Perplexity"]
    record = {"id": "x", "text": "Nothing.", "metadata": {"kind": "prose"}}
    assert [place.step for place in replayed(steps, record, "")] == [name for name, *_ in steps]


def test_a_fragment_finds_the_document_kept_dropped_or_as_it_was_read(corpus):
    kept = documents(corpus)[5]
    assert only(corpus, kept["text"][:200]) == kept["id"]
    (short,) = search(corpus, "Too short.")
    assert "dropped by length: short" in short.where
    assert follow(corpus, only(corpus, "{broken")).places[-1].reason == "not_json"


def test_a_fragment_of_many_documents_lists_them(corpus):
    with pytest.raises(InspectError, match=r"(?s)20 documents or more of .* hold 'e':\n  .*\nGive one of these"):
        only(corpus, "e")
    with pytest.raises(InspectError, match="no document of"):
        only(corpus, "words that stand nowhere")
    with pytest.raises(InspectError, match="has no document 'nobody'"):
        follow(corpus, "nobody")


def test_without_the_steps_the_rest_of_the_way_is_still_told(corpus, tmp_path):
    shutil.copytree(corpus.path, tmp_path / "corpus", ignore=shutil.ignore_patterns("steps"))
    bare = Corpus(tmp_path / "corpus")
    record = documents(corpus)[3]
    way = follow(bare, record["id"])
    assert (way.split, way.text, way.metadata["source"]) == ("train", record["text"], record["metadata"]["source"])
    assert follow(bare, only(bare, "Too short.")).places[-1].reason == "short"
    assert only(bare, record["text"][:300]) == record["id"]


# Samples


def test_a_step_is_what_all_ranks_are_given(run):
    for step in (1, 20):
        rows = []
        for rank in range(2):
            with Loader(run.samples, global_batch=8, micro_batches=2, dp_rank=rank, dp_size=2, seed=run.seed) as loader:
                rows += [batch for batch in loader.batch(step - 1)]
        given = {int(k): tokens.tolist() for b in rows for k, tokens in zip(b.samples_B, b.tokens_BL, strict=True)}
        assert sorted(given) == list(run.step(step))
        assert all(run.micro_batch(k).tokens_BL[0].tolist() == tokens for k, tokens in given.items())


@pytest.mark.parametrize("layout", ["stream", "best_fit"])
def test_a_sample_is_made_of_the_documents_that_are_named(corpus, tmp_path, layout):
    run = run_of(
        tmp_path / "run",
        f"data.path={corpus.path}",
        "data.sequence_length=64",
        f"data.packing={layout}",
        "stage=pretrain",
    )
    texts_of = {record["id"]: record["text"] for record in documents(corpus)}
    for k in (0, 7, 100):
        tokens = run.micro_batch(k).tokens_BL[0].tolist()
        begin = 0
        for part in map(run.part, run.origin(k).spans):
            whole = run.tokenizer.encode_documents([texts_of[part.id]])[0] + [run.tokenizer.eos]
            assert len(whole) == part.length
            length = part.span.end - part.span.begin
            assert tokens[begin : begin + length] == whole[part.span.begin : part.span.end]
            begin += length


@pytest.mark.parametrize("layout", ["stream", "best_fit"])
@pytest.mark.parametrize("long_documents", ["split", "cut"])
def test_the_steps_that_see_a_document_are_all_that_do(corpus, tmp_path, layout, long_documents):
    run = run_of(
        tmp_path / "run",
        f"data.path={corpus.path}",
        f"data.packing={layout}",
        f"data.long_documents={long_documents}",
        "data.sequence_length=256",
        "stage=pretrain",
        "stage.global_batch=4",
    )
    stem = corpus.path / "shards" / "train"
    holders: dict[int, list[int]] = {}
    for k in range(20 * 4):
        for document in dict.fromkeys(span.document for span in run.origin(k).spans):
            holders.setdefault(document, []).append(k)
    for document in range(0, Shard(stem).documents, 5):
        assert list(run.seen(stem, document)) == holders.get(document, [])


def test_a_sample_of_a_mixture_names_its_corpus(corpus, tmp_path):
    sources = ",".join(f"{name}:{{path:{corpus.path},weight:{weight}}}" for name, weight in (("one", 1), ("two", 3)))
    settings = ["data=mixture", f"+data.sources={{{sources}}}", "data.sequence_length=64", "stage=pretrain"]
    run = run_of(tmp_path / "run", *settings)
    names = [run.origin(k).source for k in range(200)]
    assert 30 < names.count("one") < 70
    stem = corpus.path / "shards" / "train"
    holders = [k for k in range(run.steps * run.global_batch) if any(s.document == 3 for s in run.origin(k).spans)]
    assert sorted(set(run.seen(stem, 3))) == holders


def test_a_sample_of_conversations_names_the_lines_they_stand_in(tmp_path, capsys):
    long = [{"role": "user", "content": "fox " * 200}, {"role": "assistant", "content": "dog"}]
    records = [{"messages": long if number == 2 else CONVERSATION[: 3 + 2 * (number % 2)]} for number in range(12)]
    write_jsonl(tmp_path / "chats/train.jsonl", records)
    tokenizer().save(tmp_path / "chats/tokenizer")
    settings = [f"data.path={tmp_path / 'chats'}", "data.sequence_length=128", "data.overlong=drop", "init_from=x"]
    run = run_of(tmp_path / "run", "stage=sft", *settings)
    seen = [run.part(span).id for k in range(len(run.samples)) for span in run.origin(k).spans]
    assert sorted(seen) == sorted(f"{tmp_path}/chats/train.jsonl:{line}" for line in range(1, 13) if line != 3)
    show.sample(run, 0)
    out = capsys.readouterr().out
    assert "train.jsonl:" in out and "⟦<|im_start|>" in out


def test_a_preference_shows_both_answers(tmp_path, capsys):
    prompt, chosen = CONVERSATION[:2], CONVERSATION[2:3]
    pairs = [{"prompt": prompt, "chosen": chosen, "rejected": [{"role": "assistant", "content": "No."}]}] * 3
    write_jsonl(tmp_path / "chats/preferences_train.jsonl", pairs)
    tokenizer().save(tmp_path / "chats/tokenizer")
    show.sample(run_of(tmp_path / "run", "stage=dpo", f"data.path={tmp_path / 'chats'}", "init_from=x"), 1)
    out = capsys.readouterr().out
    assert out.count("preferences_train.jsonl:") == 2
    assert re.search(r"(?s)chosen:.*quick\..*→'<\|im_end\|>'.*rejected:.*No\.→'<\|im_end\|>'", out.replace("·", ""))


def test_what_is_ignored_and_what_is_predicted_is_told():
    told = show.told([5, 6, 7, 8], [6, IGNORED, 9, 4], 0, 4)
    assert [(t.learned, t.predicts) for t in told] == [(False, None), (True, None), (False, 9), (False, 4)]
    assert list(show.stretches([0, 0, 1, -1, -1])) == [(0, 2), (2, 3), (3, 5)]


def test_the_text_of_a_sample_is_that_of_its_tokens(run, capsys):
    show.sample(run, 3)
    out = capsys.readouterr().out
    shown = "".join(line for line in out.splitlines(keepends=True) if not line.startswith(("──", "sample", "tokens")))
    shown = shown.split("predict one\n", 1)[1]
    text = run.tokenizer.decode(run.micro_batch(3).tokens_BL[0].tolist())
    plain = shown.replace("·", "").replace("⟦", "").replace("⟧", "").replace("↵\n", "\n")
    for line in text.splitlines():
        assert line.strip() in plain


def test_a_corpus_that_was_made_anew_is_refused_before_the_run_has_ended(run):
    for step, samples in ((10, run.samples.fingerprint), (20, "others")):
        checkpoint = path_of(run.directory / CHECKPOINTS, step)
        checkpoint.mkdir(parents=True)
        (checkpoint / TRAINER).write_text(json.dumps(Progress(step, inputs={"samples": samples}).state()))
    with pytest.raises(InspectError, match=r"trained on other samples \(others\)"):
        Run(run.directory)
    (checkpoint / TRAINER).write_text("{damaged")
    assert Run(run.directory).trained_on == run.samples.fingerprint


# On the command line


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({}, "document"),
        ({"sample": 3, "step": 2}, "sample and step"),
        ({"document": "x", "text": "y"}, "document and text"),
    ],
)
def test_one_thing_is_asked(settings, key):
    problems = InspectConfig("x", **settings).problems()
    assert [problem.key for problem in problems] == [key] and str(ConfigError(problems))


def test_each_question_is_answered(corpus, run, capsys):
    name = documents(corpus)[0]["id"]
    asked = [
        (InspectConfig(str(corpus.path), document=name), "→ train"),
        (InspectConfig(str(corpus.path), text="Too short."), "✗ dropped: short"),
        (InspectConfig(str(run.directory), sample=5), "sample 5 of"),
        (InspectConfig(str(run.directory), step=2), "samples 8 to 15"),
        (InspectConfig(str(run.directory), document=name), "tokens of it"),
        (InspectConfig(str(run.directory), text="Too short."), "no training step sees it, it was dropped"),
    ]
    for config, expected in asked:
        assert main(config, {}) == 0
        out = capsys.readouterr().out
        assert expected in out and "\x1b" not in out, out


def test_what_does_not_exist_is_refused(corpus, run):
    with pytest.raises(InspectError, match="is no training run"):
        main(InspectConfig(str(corpus.path), sample=3), {})
    with pytest.raises(InspectError, match="step 21 is not among the steps 1 to 20"):
        run.step(21)
    for sample in (-1, 160):
        with pytest.raises(InspectError, match=f"sample {sample} is not among the samples 0 to 159"):
            show.sample(run, sample)


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Corpora of one tokenizer that share one document."""
    root = tmp_path_factory.mktemp("others")
    for name in ("one", "two"):
        (root / name).mkdir()
        for number in range(30):
            (root / name / f"{name}{number}.md").write_text(f"Sentence {number} of {name} stands here. " * 9)
        (root / name / "both.md").write_text("They share this. " * 9)
    for name, path in (("one", ""), ("two", str(root / "corpora/one/tokenizer"))):
        made(root / name, root / "corpora" / name, steps={}, order=[], vocabulary=280, tokenizer=path)
    return root / "corpora"


def test_a_document_of_a_run_on_several_corpora_is_looked_for_in_all(others, tmp_path, capsys):
    sources = ",".join(f"{name}:{{path:{others / name}}}" for name in ("one", "two"))
    settings = ["data=mixture", f"+data.sources={{{sources}}}", "data.sequence_length=64", "stage=pretrain"]
    directory = str(run_of(tmp_path / "run", *settings).directory)
    for name in ("one", "two"):
        own = next(record for record in documents(Corpus(others / name)) if "Sentence" in record["text"])
        for asked in ({"document": own["id"]}, {"text": own["text"]}):
            assert main(InspectConfig(directory, **asked), {}) == 0
            assert f"{others / name}/shards/train" in capsys.readouterr().out
    assert main(InspectConfig(directory, text="They share this."), {}) == 0
    assert capsys.readouterr().out.count("both.md:") == 2
    for asked in ({"document": "nobody"}, {"text": "words that stand nowhere"}):
        with pytest.raises(InspectError, match=r"(?s)corpora/one.*corpora/two"):
            main(InspectConfig(directory, **asked), {})
