"""A secret is refused wherever it is given, and none that the environment holds is written or printed."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from conf import entry, secrets
from conf.errors import ConfigError, LongrunError
from train.__main__ import main
from train.config import RunConfig

ROOT = Path(__file__).parents[2]
CANARY = "cAnAry7Zq3Lw9Xk2"
SHAPED = {
    "Hugging Face": "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh",
    "OpenAI": "sk-proj-4f9Kd82Lq0ZxPw7TrB3m",
    "OpenAI, of old": "sk-" + "4f9Kd82Lq0ZxPw7TrB3m" * 2 + "aB3dE5gH",
    "Anthropic": "sk-ant-api03-4f9Kd82Lq0ZxPw7TrB3m-_x",
    "GitHub": "ghp_" + "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1dE3fG5",
    "AWS": "AKIA" + "Q3EGRZ7T2UKY5WVN",
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
    "private key": "-----BEGIN OPENSSH PRIVATE KEY-----b3BlbnNzaC1rZXk",
    "webhook": f"https://hooks.slack.com/services/T0/B0/{CANARY}",
    "address": f"https://me:{CANARY}@host/simple",
}


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "hf_token",
        "token",
        "db_password",
        "clientSecret",
        "AWS_SECRET_ACCESS_KEY",
        "credentials",
        "x.auth_token",
    ],
)
def test_a_key_is_known_by_its_name(name):
    assert secrets.named_secret(name)


@pytest.mark.parametrize(
    "name",
    ["max_tokens", "tokenizer", "mask_token", "pad_token", "key_file", "text_key", "tokens", "keys", "steps", ""],
)
def test_what_only_sounds_alike_is_no_secret(name):
    assert not secrets.named_secret(name)


def test_of_a_variable_any_key_or_token_is_a_secret():
    assert all(map(secrets.secret_variable, ("MY_KEY", "GH_TOKEN", "HF_TOKEN", "DB_PASSWORD", "LONGRUN_WEBHOOK")))
    assert not any(map(secrets.secret_variable, ("TOKENIZERS_PARALLELISM", "KEYMAP", "PATH", "KEY_FILE", "PWD")))


def test_where_a_secret_lies_is_no_secret(monkeypatch, tmp_path):
    """Of the environment, in a configuration, and in what is printed."""
    (tmp_path / "id").write_text("x")
    monkeypatch.chdir(tmp_path)
    variables = {"PWD": str(tmp_path), "SSH_KEY": str(tmp_path / "id"), "DEPLOY_KEY": "/not/here/deploy.pem"}
    variables |= {"GOOGLE_APPLICATION_CREDENTIALS": "/not/here/adc.json", "MY_SECRET": str(Path.home() / "not/here")}
    assert not secrets.of_environment(variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    given = {"run_dir": str(tmp_path / "runs/xx"), "init_from": str(Path.home() / "runs/base"), "ssh_key": "id"}
    assert not secrets.problems(given)
    secrets.check_arguments([f"{key}={value}" for key, value in given.items()])
    assert secrets.redactor(variables)(str(tmp_path / "id")) == str(tmp_path / "id")


def test_a_secret_may_begin_with_a_slash():
    assert secrets.of_environment({"AWS_SECRET_ACCESS_KEY": "/x3Qe7Yp+L0rT8uB1nD5kG9sW2vJ6hZ4aM/cFq"})


def test_an_ordinary_word_that_the_environment_keeps_secret_is_only_known_as_a_whole(monkeypatch):
    """`TOKEN=training` neither refuses every path with the word nor garbles what is printed."""
    variables = {"TOKEN": "training", "DB_PASSWORD": "postgres", "A_KEY": "-" * 20, "URL": "https://me:postgres@db"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert not secrets.problems({"a": "runs/training", "b": "training-2", "c": "postgres.org", "d": "-" * 30})
    assert len(secrets.problems({"a": "training", "b": "postgres"})) == 2
    redacted = secrets.redactor(variables)
    assert redacted("training of postgres") == "training of postgres"
    assert redacted("https://me:postgres@db") == "https://me:[URL]@db"


@pytest.mark.parametrize("kind", SHAPED)
def test_a_token_is_known_by_its_shape(kind):
    assert secrets.shape(f"before {SHAPED[kind]}")


@pytest.mark.parametrize(
    "text",
    [
        *("runs/sft", "b3693781c7e6a0d9f4a2b5c8d1e4f7a0b3c6d9e2", "https://host/a@b", "https://u:${oc.env:P}@h"),
        *("sk-1", "/data/sk-wikipedia-20240601-cleaned"),
    ],
)
def test_paths_commits_and_addresses_are_none(text):
    assert not secrets.shape(text)


@pytest.mark.parametrize(
    "arguments",
    [
        ["+logger.wandb.api_key=" + CANARY],
        ["logger.wandb.api_key='" + CANARY + "'"],
        ["++data.options={a: 1, hub_token: " + CANARY + "}"],
        ["name=" + SHAPED["Hugging Face"].replace("AbCdEfGh", "cAnAryZq")],
        ["+notes=see " + SHAPED["address"]],
        ["--config-dir", SHAPED["address"]],
        ["stage.stepz=${oc.env:LONGRUN_CANARY_TOKEN}", "+x.password=" + CANARY],
    ],
)
def test_a_command_line_with_a_secret_is_refused_without_telling_it(monkeypatch, capsys, arguments):
    """Also where Hydra itself would refuse, and quote it."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit, match="1"):
        entry.run("train", RunConfig, main)
    told = "".join(capsys.readouterr())
    assert "(a secret, not shown)" in told and "environment variable" in told
    assert CANARY not in told and "cAnAryZq" not in told and "Traceback" not in told


def test_a_value_of_the_environment_is_refused_wherever_it_comes_from(monkeypatch, capsys, tmp_path):
    """By interpolation, on the command line, or in a file that the command line names."""
    monkeypatch.setenv("LONGRUN_CANARY_TOKEN", CANARY)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\nname: run-{CANARY}\n")
    for arguments in (
        ["name=${oc.env:LONGRUN_CANARY_TOKEN}"],
        [f"name={CANARY}"],
        ["experiment=mine", f"--config-dir={tmp_path}"],
    ):
        monkeypatch.setattr(sys, "argv", ["train", "stage=pretrain", "dry_run=true", *arguments])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit, match="1"):
            entry.run("train", RunConfig, main)
        told = "".join(capsys.readouterr())
        assert "name=(a secret, not shown)" in told and "LONGRUN_CANARY_TOKEN" in told, told
        assert CANARY not in told


def test_secrets_in_nested_values_are_named_by_their_key():
    resolved = {
        "a": {"options": ["--account=x", "--password=hunter2"]},
        "steps": {"pii": {"secret": "replace"}},
        "n": 3,
    }
    (problem,) = secrets.problems(resolved)
    assert problem.key == "a.options.1.password"
    assert "hunter2" not in str(problem)


def test_what_is_printed_has_the_names_of_secrets_in_their_place(monkeypatch):
    monkeypatch.setenv("LONGRUN_CANARY_TOKEN", CANARY)
    monkeypatch.setenv("SOME_INDEX", f"https://me:{CANARY}42@host")
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with secrets.unprinted():
        print(f"key {CANARY}, index {os.environ['SOME_INDEX']}")
        assert not sys.stdout.isatty()
    print(f"after {CANARY}")
    assert out.getvalue() == f"key [LONGRUN_CANARY_TOKEN], index https://me:[SOME_INDEX]@host\nafter {CANARY}\n"


def test_the_traceback_of_a_bug_does_not_tell_them():
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests/launchers")!r})
from dummy_stage import ConfigStore, DummyConfig, entry
def main(config, resolved):
    raise ValueError("refused: {CANARY}")
ConfigStore.instance().store(name="dummy", node=DummyConfig)
sys.argv = ["dummy", "run_dir=x"]
entry.run("dummy", DummyConfig, main)
"""
    variables = os.environ | {"LONGRUN_CANARY_TOKEN": CANARY, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "refused: [LONGRUN_CANARY_TOKEN]" in done.stderr
    assert CANARY not in (done.stdout + done.stderr).replace(f'"refused: {CANARY}"', "")


def test_an_error_that_quotes_a_secret_is_told_without_it(monkeypatch, capsys):
    monkeypatch.setenv("LONGRUN_CANARY_TOKEN", CANARY)
    with secrets.unprinted():
        entry.tell(LongrunError(f"the server refuses {CANARY}"))
    assert "refuses [LONGRUN_CANARY_TOKEN]" in capsys.readouterr().err


def test_every_shipped_configuration_is_free_of_what_is_taken_for_a_secret():
    from omegaconf import OmegaConf

    for file in (ROOT / "conf").rglob("*.yaml"):
        assert not secrets.problems(OmegaConf.to_container(OmegaConf.load(file))), file


def test_a_secret_is_a_problem_of_the_configuration():
    with pytest.raises(ConfigError, match=r"argument 1=\(a secret, not shown\)"):
        secrets.check_arguments([SHAPED["GitHub"]])
