"""`python -m tools.serve target=runs/demo/export`: an OpenAI-compatible server of a verified export, by vLLM.

On loopback, with an API key. vLLM lives in an environment of its own (tools/vllm_environment.py), built at the first
start. The server ends with this process, however this process is asked to end.
"""

import http.client
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from conf import entry
from conf.errors import LongrunError, Problem
from conf.registry import register
from data_pipeline.artifact import MANIFEST, Artifact, ArtifactError
from tools import vllm_environment
from tools.api_key import ApiKey, read_or_make
from tools.vllm_environment import VllmEnvironment

LOG = "serve.log"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
POLL_S = 0.2
GRACE_S = 30.0
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, a supervisor, a terminal that is closed (unless nohup has it ignored)."""
DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""A proxy that the environment names knows nothing of our loopback."""


class ServeError(LongrunError):
    """The model cannot be served, or the server ended by itself."""


@register("", "serve_schema")
@dataclass(frozen=True)
class ServeConfig:
    """Serve an export that has been verified.

    Args:
        target: directory of the export.
        verification: verification artifact of this export; empty looks among the export's neighbours.
        unverified: serve although there is no verification.
        host: address to listen on.
        exposed: let other machines in, where `host` is not of this one alone; the key and all that is said then cross
            the network in the clear, unless a proxy with TLS stands before it.
        port: TCP port.
        name: what clients call the model.
        dtype: of the computation, "auto": that of the weights on a GPU, float32 on a CPU.
        kv_cache_gb: memory for keys and values on a CPU, in GB (2**30 bytes).
        environment: directory of vLLM's virtual environment.
        setup: build that environment where it is missing.
        ready_s: longest wait until the server answers, in seconds.
    """

    target: str = "runs/demo/export"
    verification: str = ""
    unverified: bool = False
    host: str = "127.0.0.1"
    exposed: bool = False
    port: int = 8000
    name: str = "longrun"
    dtype: str = "auto"
    kv_cache_gb: int = 1
    environment: str = ".vllm"
    setup: bool = True
    ready_s: float = 600.0

    def problems(self) -> list[Problem]:
        """Values outside their range."""
        found = []
        if not self.exposed and self.host not in LOOPBACK:
            fix = f"one of {', '.join(LOOPBACK)}; to let other machines in, put a proxy with TLS before it, or set "
            found.append(Problem("host", self.host, fix + "exposed=true where their network is trusted"))
        if not 0 < self.port < 65536:
            found.append(Problem("port", self.port, "a TCP port, 1 to 65535"))
        if self.kv_cache_gb < 1:
            found.append(Problem("kv_cache_gb", self.kv_cache_gb, "at least 1"))
        if self.dtype not in (dtypes := ("auto", "float32", "bfloat16", "float16")):
            found.append(Problem("dtype", self.dtype, f"one of {', '.join(dtypes)}"))
        return found


def checked_export(config: ServeConfig) -> Artifact:
    """The export, its files as recorded, and known to do what its model did.

    Raises:
        ServeError: there is no export, or no verification of it.
        ArtifactError: its files are not those that were recorded.
    """
    if not (Path(config.target) / MANIFEST).exists():
        raise ServeError(
            f"there is no export in {config.target} yet. `make demo` makes runs/demo/export; else: python -m train "
            f"stage=export init_from=RUN export.evaluation=EVALUATION run_dir={config.target}"
        )
    export = Artifact.read(config.target, kind="export")
    export.verify()
    if not config.unverified and not any(_verifies(path, export) for path in _verifications(config, export)):
        beside = config.verification or f"beside {config.target}"
        raise ServeError(
            f"{config.target} ({export.id}) is not verified: no verification of it {beside}. Run: python -m train "
            f"stage=verify init_from={config.target} run_dir={Path(config.target).parent / 'verify'}, or set "
            "unverified=true to serve it as it is."
        )
    return export


def _verifications(config: ServeConfig, export: Artifact) -> list[Path]:
    if config.verification:
        return [Path(config.verification)]
    return sorted(file.parent for file in export.path.resolve().parent.glob(f"*/{MANIFEST}"))


def _verifies(path: Path, export: Artifact) -> bool:
    try:
        artifact = Artifact.read(path, kind="verification")
    except ArtifactError:
        return False  # a neighbour of another kind
    return artifact.inputs["export"]["id"] == export.id


def check_port(host: str, port: int) -> None:
    """Raises ServeError if nobody can listen there."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server itself does
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServeError(
                f"cannot listen on {host}:{port} ({error.strerror}): stop what does, or give another port, "
                f"for instance port={port + 1}."
            ) from error


def ready_environment(config: ServeConfig) -> VllmEnvironment:
    """vLLM's environment, built if that is allowed.

    Raises:
        ServeError: it is missing and setup=false.
        VllmError: it cannot be built.
    """
    if found := vllm_environment.find(config.environment):
        return found
    if not config.setup:
        raise ServeError(f"vLLM's environment {config.environment} is not built: run `make serve`, or set setup=true.")
    return vllm_environment.build(config.environment)


@dataclass
class Server:
    """A server process and those it starts.

    Args:
        config: what is served where.
        export: the model.
        environment: whose vLLM.
        key: what clients must show.
    """

    config: ServeConfig
    export: Artifact
    environment: VllmEnvironment
    key: ApiKey
    stopping: bool = False

    @property
    def url(self) -> str:
        host = self.config.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.config.port}"

    @property
    def log(self) -> Path:
        return self.export.path / LOG

    def command(self) -> list[str]:
        """vLLM's command line; the key is in the environment, where other users do not see it."""
        config = self.config
        on_cpu = self.environment.device == "cpu"
        dtype = "float32" if config.dtype == "auto" and on_cpu else config.dtype
        arguments = [str(self.environment.python), "-m", "vllm.entrypoints.openai.api_server"]
        arguments += ["--model", str((self.export.path / "model").resolve()), "--served-model-name", config.name]
        arguments += ["--host", config.host, "--port", str(config.port), "--dtype", dtype]
        return arguments + (["--enforce-eager"] if on_cpu else [])  # compiling takes two minutes there

    def variables(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        ours = {"VLLM_API_KEY": self.key.value, "VLLM_CPU_KVCACHE_SPACE": str(self.config.kv_cache_gb)}
        return {**inherited, **ours, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

    def run(self) -> int:
        """Start, wait until it answers, say how to use it, serve until asked to stop.

        Raises:
            ServeError: it ended by itself or did not answer in time; shows the end of its log.
        """
        asking = [number for number in STOP if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._asked) for number in asking}
        with open(self.log, "w") as log:
            # In a session of its own, so that a Ctrl-C reaches it through us and once.
            process = subprocess.Popen(
                self.command(),
                env=self.variables(),
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=self.export.path,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(process)
            if not self.stopping:
                print(self._usage(), flush=True)
            while not self.stopping:
                if process.poll() is not None:
                    raise ServeError(f"the server ended with status {process.returncode}:\n{self._last_lines()}")
                time.sleep(POLL_S)
        finally:
            self._stop(process)
            for number, handler in handlers.items():
                signal.signal(number, handler)
        print("stopped", flush=True)
        return 0

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _wait_until_ready(self, process: subprocess.Popen) -> None:
        print(f"starting vLLM on {self.environment.device}; its log is {self.log}", flush=True)
        deadline = time.monotonic() + self.config.ready_s
        while not self.stopping and not self._healthy():
            if process.poll() is not None:
                raise ServeError(f"the server did not start (status {process.returncode}):\n{self._last_lines()}")
            if time.monotonic() > deadline:
                raise ServeError(
                    f"the server did not answer within ready_s={self.config.ready_s:g}:\n{self._last_lines()}"
                )
            time.sleep(POLL_S)

    def _healthy(self) -> bool:
        try:
            with DIRECTLY.open(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (OSError, http.client.HTTPException):  # URLError is an OSError
            return False

    def _usage(self) -> str:
        body = f'{{"model": "{self.config.name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
        key = "" if self.key.file is None else f" key_file={self.key.file}"
        return (
            f"{self.config.target} ({self.export.id}) is served at {self.url}/v1 as {self.config.name!r}\n\n"
            f"  python -m tools.chat target={self.url}{key}\n\n"
            f"  curl {self.url}/v1/chat/completions -H 'Content-Type: application/json' \\\n"
            f"    -H \"Authorization: Bearer {self.key.shell}\" -d '{body}'\n\n"
            "Ctrl-C stops it."
        )

    def _last_lines(self) -> str:
        with open(self.log, errors="replace") as log:
            last = deque((line.rstrip() for line in log if line.strip()), maxlen=15)
        return "  " + "\n  ".join(last) + f"\nThe whole log is {self.log}."

    def _stop(self, process: subprocess.Popen) -> None:
        """End the server and whatever it started."""
        for number, patience_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            deadline = time.monotonic() + patience_s
            while time.monotonic() < deadline and _group_lives(process):
                time.sleep(POLL_S)


def _group_lives(process: subprocess.Popen) -> bool:
    process.poll()  # a process that ended and was not waited for still counts as one of its group
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def main(config: ServeConfig, resolved: dict[str, Any]) -> int:
    export = checked_export(config)
    check_port(config.host, config.port)
    environment = ready_environment(config)
    return Server(config, export, environment, read_or_make(export.path)).run()


if __name__ == "__main__":
    entry.run("serve", ServeConfig, main)
