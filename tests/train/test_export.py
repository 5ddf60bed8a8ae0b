"""Hand-over: what is written, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.errors import ConfigError, LongrunError, OccupiedError
from data_pipeline.artifact import Artifact, ArtifactError, Draft
from data_pipeline.tokenizer import Tokenizer
from tests.train.exports import corpus, evaluation, stage, trained_run
from train.export.gate import GateError
from train.export.huggingface import OverflowInExportError
from train.export.source import Source, SourceError, end_of_turn
from train.models import hf, hf_weights


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a model trained on it, another one, and evaluations of the first: one passed, one failed."""
    root = tmp_path_factory.mktemp("life")
    model = trained_run(root / "sft", {"data": corpus(root / "corpus")})
    evaluation(root / "passed", model, other=trained_run(root / "other", seed=1))
    evaluation(root / "failed", model, passed=False)
    return root


def export(life: Path, run_dir: Path, verdict: str = "passed", model: str = "sft", **settings: object) -> Artifact:
    found = {f"export.{key}": value for key, value in settings.items()}
    given = {"init_from": life / model, "export.evaluation": life / verdict if verdict else "''", "run_dir": run_dir}
    assert stage(stage="export", **given, **found) == 0
    return Artifact.read(run_dir, kind="export")


def test_an_export_is_what_transformers_expects_and_holds_the_same_weights(life, tmp_path):
    artifact = export(life, tmp_path / "export", max_shard_bytes=100_000)
    directory = tmp_path / "export" / "model"
    names = {file.name for file in directory.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja", "README.md"} <= names
    shards = sorted(directory.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert sum(file.stat().st_size <= 100_000 + 4096 for file in shards) >= len(shards) - 1, "one tensor may be larger"
    config = hf.read_config(directory)
    ours, theirs = hf_weights.read(life / "sft" / "model", config), hf_weights.read(directory, config)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {f"model/{name}" for name in names} == set(artifact.files), "everything is under checksum"
    assert all(file.stat().st_mode == (directory / "config.json").stat().st_mode for file in shards)


def test_generation_ends_with_the_turn_and_with_the_text(life, tmp_path):
    export(life, tmp_path / "export")
    tokenizer = Tokenizer.load(tmp_path / "export" / "model")
    stored = json.loads((tmp_path / "export" / "model" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == [tokenizer.eos, tokenizer.special("<|im_end|>")]
    assert end_of_turn(tokenizer) == tokenizer.special("<|im_end|>")


def test_the_chat_template_stands_where_old_and_new_readers_look(life, tmp_path):
    export(life, tmp_path / "export")
    directory = tmp_path / "export" / "model"
    template = (directory / "chat_template.jinja").read_text()
    assert template == json.loads((directory / "tokenizer_config.json").read_text())["chat_template"]
    assert "<|im_start|>" in template


def test_the_dtype_is_that_of_the_weights_rounded(life, tmp_path):
    export(life, tmp_path / "export", dtype="bfloat16")
    directory = tmp_path / "export" / "model"
    assert json.loads((directory / "config.json").read_text())["dtype"] == "bfloat16"
    config = hf.read_config(directory)
    before, after = hf_weights.read(life / "sft" / "model", config), hf_weights.read(directory, config)
    assert all(torch.equal(before[name].bfloat16().float(), after[name]) for name in before)


def test_weights_that_overflow_the_dtype_are_refused(life, tmp_path):
    run = shutil.copytree(life / "sft" / "model", tmp_path / "run")
    weights = load_file(run / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, run / "model.safetensors")
    settings = {"stage": "export", "init_from": run, "run_dir": tmp_path / "export", "export.force": "true"}
    with pytest.raises(OverflowInExportError, match=r"model\.norm\.weight.*float16.*bfloat16"):
        stage(**settings, **{"export.dtype": "float16"})
    assert not (tmp_path / "export" / "model" / "config.json").exists()


def test_a_failed_gate_stops_the_export_and_says_which_check(life, tmp_path):
    with pytest.raises(GateError, match=r"accuracy/addition is 0\.1, at least 0\.5 was asked for"):
        export(life, tmp_path / "export", verdict="failed")
    assert not (tmp_path / "export" / "model").exists()


def test_a_forced_export_is_recorded_in_the_manifest_and_on_the_card(life, tmp_path):
    artifact = export(life, tmp_path / "export", verdict="failed", force="true")
    assert artifact.facts["gate"]["forced"] is True
    assert artifact.facts["gate"]["passed"] is False
    assert artifact.config["force"] is True
    assert "accuracy/addition" in artifact.facts["gate"]["reasons"][0]
    assert "the export was forced" in (tmp_path / "export" / "model" / "README.md").read_text()


def test_force_on_a_passed_gate_is_not_recorded_as_forced(life, tmp_path):
    artifact = export(life, tmp_path / "export", force="true")
    assert artifact.facts["gate"] == {"passed": True, "forced": False, "reasons": []}


def test_without_an_evaluation_nothing_is_exported_unless_forced(life, tmp_path):
    with pytest.raises(ConfigError, match=r"export\.evaluation=.*export\.force=true"):
        export(life, tmp_path / "export", verdict="")
    assert export(life, tmp_path / "export", verdict="", force="true").facts["gate"]["forced"] is True


def test_an_evaluation_of_another_model_or_with_this_one_as_baseline_is_refused_even_by_force(life, tmp_path):
    for force in ("false", "true"):
        with pytest.raises(GateError, match="evaluates another model"):
            export(life, tmp_path / "export", model="other", force=force)


def test_a_verdict_on_a_bare_directory_holds_for_its_very_weights(life, tmp_path):
    judged = shutil.copytree(life / "sft" / "model", tmp_path / "judged")
    verdict = shutil.copytree(life / "passed", tmp_path / "passed")
    facts = {"model_fingerprint": Source.read(str(judged)).fingerprint}
    Draft(verdict, "evaluation", {}, {}, facts=facts).publish("results.json")
    settings = {"stage": "export", "run_dir": tmp_path / "export", "export.evaluation": verdict}
    with pytest.raises(GateError, match="evaluates another model"):  # of the same shape
        stage(init_from=life / "other" / "model", **settings)
    assert stage(init_from=judged, **settings) == 0
    assert Source.read(str(life / "sft")).fingerprint == facts["model_fingerprint"], "with and without a manifest"


def test_an_evaluation_without_a_gate_passes_nothing(life, tmp_path):
    root = shutil.copytree(life, tmp_path / "life")
    results = root / "passed" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "gate": None}))
    Draft(root / "passed", "evaluation", {}, {"model": Artifact.read(root / "sft")}).publish("results.json")
    with pytest.raises(GateError, match="had no gate"):
        export(root, tmp_path / "export")
    assert export(root, tmp_path / "export", force="true").facts["gate"]["forced"] is True


def test_an_artifact_of_another_kind_is_refused_as_model_and_as_evaluation(life, tmp_path):
    with pytest.raises(SourceError, match="'corpus', which has no model/"):
        export(life, tmp_path / "export", model="corpus")
    with pytest.raises(ArtifactError, match="'sft', but a 'evaluation' was expected"):
        export(life, tmp_path / "export", verdict="sft")


def test_a_run_that_has_not_ended_is_refused(life, tmp_path):
    shutil.copytree(life / "sft", tmp_path / "cut")
    (tmp_path / "cut" / "manifest.json").unlink()
    (tmp_path / "cut" / "config.yaml").write_text("")
    with pytest.raises(ArtifactError, match="has not ended"):
        stage(stage="export", init_from=tmp_path / "cut", run_dir=tmp_path / "export", **{"export.force": "true"})


def test_a_model_whose_files_changed_since_it_was_made_is_refused(life, tmp_path):
    root = shutil.copytree(life, tmp_path / "life")
    weights = root / "sft" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: checksum differs"):
        export(root, tmp_path / "export")


def test_a_bare_directory_is_exported_by_force_and_keeps_its_advice(life, tmp_path):
    directory = shutil.copytree(life / "sft" / "model", tmp_path / "foreign")
    (directory / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.6, "max_length": 20}')
    settings = {"init_from": directory, "run_dir": tmp_path / "export", "export.force": "true"}
    assert stage(stage="export", **settings) == 0
    written = json.loads((tmp_path / "export" / "model" / "generation_config.json").read_text())
    assert written["eos_token_id"] == [0, 3, 7]
    assert written["temperature"] == 0.6
    assert "max_length" not in written


def test_a_second_export_does_nothing_and_another_one_is_refused(life, tmp_path, capsys):
    first = export(life, tmp_path / "export")
    export(life, tmp_path / "export")
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(OccupiedError, match="holds a finished 'export'"):
        export(life, tmp_path / "export", dtype="bfloat16")
    assert Artifact.read(tmp_path / "export") == first


def test_the_card_tells_sources_training_evaluation_limits_and_use(life, tmp_path):
    export(life, tmp_path / "export")
    card = (tmp_path / "export" / "model" / "README.md").read_text()
    for part in (
        "BSD-3-Clause",
        "django-docs",
        "steps 40",
        "validation loss 2.6",
        "perplexity | 14 | 12.5",
        "| passed |",
    ):
        assert part in card, part
    for part in ("python -m tools.serve target=", "Text beyond 512 tokens", Artifact.read(life / "sft").id):
        assert part in card, part


def test_settings_that_cannot_be_are_named_before_anything_is_written(life, tmp_path):
    with pytest.raises(ConfigError) as error:
        stage(stage="export", run_dir=tmp_path / "export", **{"export.dtype": "int3", "export.max_shard_bytes": 0})
    for key in ("export.dtype=int3", "export.max_shard_bytes=0", "init_from=''", "export.evaluation=''"):
        assert key in str(error.value), key
    assert isinstance(error.value, LongrunError)
    assert not (tmp_path / "export").exists()
