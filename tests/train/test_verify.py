"""Verification: a good export passes in a fresh process; every way to be wrong is named, and nothing is published."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.artifact import MANIFEST, Artifact, ArtifactError, Draft
from tests.train.exports import TINY, evaluation, stage, trained_run
from train.export import verification
from train.export.verification import Check, Reference, VerificationError, ask_transformers, compare, questions
from train.models import hf, hf_weights

TOLERANCE, TOKENS = 1e-4, 32
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its evaluation and its export."""
    root = tmp_path_factory.mktemp("life")
    evaluation(root / "evaluate", trained_run(root / "sft"))
    export(root, root / "export")
    return root


@pytest.fixture(scope="module")
def reference(life: Path) -> Reference:
    return Reference.load(life / "sft" / "model", torch.float32, CPU)


@pytest.fixture(scope="module")
def answer(life: Path, reference: Reference) -> dict[str, Any]:
    """What transformers really says of the export."""
    asked = questions(reference.tokenizer, reference.model.config, TOKENS)
    return ask_transformers(life / "export" / "model", asked, "float32", CPU)


def export(life: Path, run_dir: Path, **settings: object) -> None:
    given = {"init_from": life / "sft", "run_dir": run_dir, "export.evaluation": life / "evaluate"}
    stage(stage="export", **given, **{f"export.{key}": value for key, value in settings.items()})


def told(life: Path, reference: Reference, answer: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Check]:
    """The checks, had transformers given this answer."""
    monkeypatch.setattr(verification, "ask_transformers", lambda *_: answer)
    checks = compare(reference, life / "export" / "model", "float32", TOKENS, TOLERANCE)
    return {check.name: check for check in checks}


def failed(checks: dict[str, Check]) -> set[str]:
    return {name for name, check in checks.items() if not check.passed}


def test_a_good_export_is_verified_and_the_report_says_how_far_each_check_was(life, tmp_path, capsys):
    settings = {"init_from": life / "export", "run_dir": tmp_path / "verify"}
    assert stage(stage="verify", **settings) == 0
    artifact = Artifact.read(tmp_path / "verify", kind="verification")
    assert artifact.inputs["export"]["id"] == Artifact.read(life / "export").id
    report = json.loads((tmp_path / "verify" / "verify.json").read_text())
    found = {check["name"]: check for check in report["checks"]}
    assert report["passed"] and all(check["passed"] for check in report["checks"])
    assert 0 < found["log-probabilities, fp32"]["found"] <= found["log-probabilities, fp32"]["threshold"] == 1e-4
    assert {"ids of texts", "ids of chat prompts", "greedy continuations", "stored weights"} <= found.keys()
    assert stage(stage="verify", **settings) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_the_fresh_process_has_nothing_of_ours(answer):
    ours = {"conf", "data_pipeline", "parallel", "train", "launchers", "tools"}
    assert not ours & set(answer["modules"])
    assert "transformers" in answer["modules"]


@pytest.mark.slow
def test_rounded_weights_are_judged_by_their_own_floor(life, tmp_path):
    export(life, tmp_path / "export", dtype="bfloat16")
    reference = Reference.load(life / "sft" / "model", torch.bfloat16, CPU)
    checks = compare(reference, tmp_path / "export" / "model", "bfloat16", TOKENS, TOLERANCE)
    found = {check.name: check for check in checks}
    assert not failed(found)
    assert found["log-probabilities, bfloat16"].found > 100 * found["log-probabilities, fp32"].found


@pytest.mark.slow
def test_a_tokenizer_that_transformers_would_replace_beside_qwen2_is_kept(tmp_path):
    """transformers gives every `qwen2` Qwen's own pre-tokeniser, so such a model is written as the equal Llama."""
    config = replace(TINY, qkv_bias=True)
    evaluation(tmp_path / "evaluate", trained_run(tmp_path / "sft", config=config))
    assert json.loads((tmp_path / "sft" / "model" / "config.json").read_text())["model_type"] == "qwen2"
    export(tmp_path, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "model" / "config.json").read_text())["model_type"] == "llama"
    reference = Reference.load(tmp_path / "sft" / "model", torch.float32, CPU)
    checks = compare(reference, tmp_path / "export" / "model", "float32", TOKENS, TOLERANCE)
    assert not failed({check.name: check for check in checks})


def test_an_export_with_wrong_weights_is_not_verified_though_its_checksums_are_right(life, tmp_path):
    def swap_two_layers(directory: Path) -> None:
        weights = hf_weights.read(directory, hf.read_config(directory))
        for part in ("q_proj", "o_proj"):
            first, second = (f"model.layers.{layer}.self_attn.{part}.weight" for layer in (0, 1))
            weights[first], weights[second] = weights[second], weights[first]
        from safetensors.torch import save_file

        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})

    published_with(swap_two_layers, life, tmp_path / "export")
    with pytest.raises(VerificationError, match=r"FAILED  stored weights: 4[^$]*FAILED  log-probabilities, fp32"):
        stage(stage="verify", init_from=tmp_path / "export", run_dir=tmp_path / "verify")
    assert not (tmp_path / "verify" / MANIFEST).exists()
    assert json.loads((tmp_path / "verify" / "verify.json").read_text())["passed"] is False


@pytest.mark.slow
def test_a_directory_that_transformers_cannot_load_is_not_verified(life, tmp_path):
    published_with(lambda directory: (directory / "tokenizer.json").write_text("{}"), life, tmp_path / "export")
    with pytest.raises(VerificationError, match="transformers cannot load or run"):
        stage(stage="verify", init_from=tmp_path / "export", run_dir=tmp_path / "verify")
    assert not (tmp_path / "verify" / MANIFEST).exists()


def published_with(change: Any, life: Path, path: Path) -> None:
    """An export with a fault that its manifest knows nothing of."""
    shutil.copytree(life / "export" / "model", path / "model")
    change(path / "model")
    draft = Draft(path, "export", {}, {"model": Artifact.read(life / "sft")})
    draft.publish("model/**/*")


def test_the_unchanged_answer_passes(life, reference, answer, monkeypatch):
    assert not failed(told(life, reference, answer, monkeypatch))


@pytest.mark.parametrize(("key", "name"), [("text_ids", "ids of texts"), ("chat_ids", "ids of chat prompts")])
def test_one_other_token_is_found_and_shown(key, name, life, reference, answer, monkeypatch):
    changed = copy.deepcopy(answer)
    changed[key][1][-1] += 1
    checks = told(life, reference, changed, monkeypatch)
    assert failed(checks) == {name}
    assert checks[name].found == 1
    assert "transformers [" in checks[name].detail


@pytest.mark.parametrize("difference", [2e-4, -2e-4, math.nan, math.inf])
def test_one_log_probability_off_by_more_than_the_tolerance_fails(difference, life, reference, answer, monkeypatch):
    changed = copy.deepcopy(answer)
    changed["logprobs"][2][7] += difference
    assert failed(told(life, reference, changed, monkeypatch)) == {"log-probabilities, fp32"}


@pytest.mark.parametrize("cut", [True, False])
def test_another_greedy_token_or_one_too_few_fails(cut, life, reference, answer, monkeypatch):
    changed = copy.deepcopy(answer)
    if cut:
        changed["continuations"][0].pop()
    else:
        changed["continuations"][0][9] = (changed["continuations"][0][9] + 5) % 500 + 8
    assert failed(told(life, reference, changed, monkeypatch)) == {"greedy continuations"}


def test_two_equally_likely_tokens_are_a_tie_and_no_failure(life, reference, answer, monkeypatch):
    changed = copy.deepcopy(answer)
    changed["continuations"][0][9] = (changed["continuations"][0][9] + 5) % 500 + 8
    monkeypatch.setattr(Reference, "gap", lambda *_: 1e-4)
    checks = told(life, reference, changed, monkeypatch)
    assert not failed(checks)
    assert "1 ended in a tie" in checks["greedy continuations"].detail


def test_a_chat_that_would_not_stop_is_found(life, reference, answer, monkeypatch):
    checks = told(life, reference, {**answer, "end_ids": [0]}, monkeypatch)
    assert failed(checks) == {"tokens that must end an answer and do not"}


def test_a_tensor_that_transformers_fills_with_random_numbers_is_found(life, reference, answer, monkeypatch):
    changed = {**answer, "loading": {"missing_keys": ["model.norm.weight"]}}
    checks = told(life, reference, changed, monkeypatch)
    assert "model.norm.weight" in checks["tensors missing or left over in transformers"].detail
    assert len(failed(checks)) == 1


def test_a_damaged_export_and_a_missing_source_are_refused(life, tmp_path):
    root = shutil.copytree(life, tmp_path / "life")
    shutil.rmtree(root / "sft")
    with pytest.raises(VerificationError, match=r"no longer at .*sft"):
        stage(stage="verify", init_from=root / "export", run_dir=tmp_path / "verify")
    (root / "export" / "model" / "chat_template.jinja").write_text("{{ 1 }}")
    with pytest.raises(ArtifactError, match=r"chat_template\.jinja"):
        stage(stage="verify", init_from=root / "export", run_dir=tmp_path / "verify")
    with pytest.raises(ArtifactError, match="'evaluation', but a 'export' was expected"):
        stage(stage="verify", init_from=root / "evaluate", run_dir=tmp_path / "verify")
