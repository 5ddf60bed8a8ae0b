import json

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from conf import entry
from conf.errors import ConfigError, OccupiedError
from data_pipeline.artifact import Artifact, Draft
from data_pipeline.chat import ChatData
from data_pipeline.config import PipelineConfig
from data_pipeline.records import EmptySetError, RecordError
from tests.data_pipeline.chats import tokenizer, write_jsonl
from tests.data_pipeline.test_preference import PAIRS

TALK = [
    {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
    for n in range(200)
]


def make(source, run_dir, *others, **settings) -> int:
    overrides = ["corpus=chats", f"corpus.path={source}", f"run_dir={run_dir}", *others]
    with initialize_config_module("conf", version_base="1.3"):
        node = compose("data_pipeline", overrides=overrides + [f"corpus.{k}={v}" for k, v in settings.items()])
    return entry.typed(node, PipelineConfig).corpus.run(entry.typed(node, PipelineConfig), OmegaConf.to_container(node))


def records(run_dir, stem) -> list:
    return [json.loads(line) for line in (run_dir / f"{stem}.jsonl").read_text().splitlines()]


def test_a_file_of_conversations_becomes_splits_that_training_reads(tmp_path, capsys):
    write_jsonl(tmp_path / "mine" / "train.jsonl", [*TALK, *TALK])
    assert make(tmp_path / "mine", tmp_path / "run", validation=0.1, test=0.1) == 0
    parts = [records(tmp_path / "run", split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 400 and all(len(part) >= 20 for part in parts)
    texts = [{json.dumps(record) for record in part} for part in parts]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2]), "equal records stay together"
    Artifact.read(tmp_path / "run", kind="chat").verify()
    assert len(ChatData(str(tmp_path / "run"), 128).open("validation", tokenizer(), 0)) > 0
    assert make(tmp_path / "mine", tmp_path / "run", validation=0.1, test=0.1) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_splits_that_are_there_are_kept_and_preferences_come_along(tmp_path):
    for stem, rows in {"train": TALK[:9], "validation": TALK[9:12], "preferences_train": PAIRS[:1]}.items():
        write_jsonl(tmp_path / "mine" / f"{stem}.jsonl", rows)
    write_jsonl(tmp_path / "mine" / "preferences_validation.jsonl", PAIRS[1:])
    make(tmp_path / "mine", tmp_path / "run")
    assert records(tmp_path / "run", "train") == TALK[:9] and records(tmp_path / "run", "validation") == TALK[9:12]
    assert records(tmp_path / "run", "preferences_validation") == PAIRS[1:]


def test_nothing_of_an_earlier_artifact_or_of_another_kind_is_mixed_in(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK)
    make(tmp_path / "mine", tmp_path / "run", test=0.1)
    make(tmp_path / "mine", tmp_path / "run")
    assert not (tmp_path / "run" / "test.jsonl").exists()
    with pytest.raises(ConfigError, match="another directory than"):
        make(tmp_path / "mine", tmp_path / "mine")
    Draft(tmp_path / "run", "corpus", {}, {}).publish()
    with pytest.raises(OccupiedError, match="holds a finished 'corpus'"):
        make(tmp_path / "mine", tmp_path / "run")
    assert Artifact.read(tmp_path / "run").kind == "corpus" and (tmp_path / "run" / "train.jsonl").exists()


def test_bad_records_leave_no_artifact(tmp_path):
    write_jsonl(tmp_path / "mine" / "train.jsonl", [*TALK, {"messages": TALK[0]["messages"][:1]}])
    with pytest.raises(RecordError, match=r"train\.jsonl:201: no assistant turn among \[user\]"):
        make(tmp_path / "mine", tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_nothing_to_read_and_nothing_to_hold_out_are_said(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(EmptySetError, match=r"holds neither train\.jsonl nor preferences_train\.jsonl"):
        make(tmp_path / "mine", tmp_path / "run")
    write_jsonl(tmp_path / "mine" / "train.jsonl", TALK[:1])
    with pytest.raises(EmptySetError, match="would hold no record"):
        make(tmp_path / "mine", tmp_path / "run")
    with pytest.raises(ConfigError, match="together below 1"):
        make(tmp_path / "mine", tmp_path / "run", validation=0.6, test=0.6)
