"""What no linter sees: nothing that can run code is read, and nothing listens to all."""

import ast
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from parallel import rendezvous

ROOT = Path(__file__).parent.parent
ROOMS = ("conf", "data_pipeline", "parallel", "train", "launchers", "tools")
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))

EXECUTING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
"""Modules whose loading of data runs what the data say."""
MAY_PICKLE = {
    "data_pipeline/executors/sealed.py": "under a key that is nowhere on disk",
    "data_pipeline/executors/ray.py": "to a cluster that runs what it is sent",
    "tools/ranks.py": "through pipes and arguments to its own children",
}
EVERYWHERE = "0.0.0.0"


def name(node: ast.expr) -> str:
    """`torch.load` of the function of a call."""
    if isinstance(node, ast.Attribute):
        return f"{name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def found(source: str) -> Iterator[str]:
    """What is wrong with a file, by line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                if module.split(".")[0] in EXECUTING:
                    yield f"{node.lineno}: imports {module}"
        if isinstance(node, ast.Constant) and node.value == EVERYWHERE:
            yield f"{node.lineno}: the address {node.value}"
        if not isinstance(node, ast.Call):
            continue
        called = name(node.func)
        given = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else "?" for k in node.keywords if k.arg}
        last = called.rsplit(".", 1)[-1]
        where = f"{node.lineno}: {called}"
        if called == "torch.load" and given.get("weights_only") is not True:
            yield f"{where} without weights_only=True"
        if last == "from_pretrained" and given.get("trust_remote_code") is not False:
            yield f"{where} without trust_remote_code=False"
        if last == "from_pretrained" and "Model" in called and given.get("use_safetensors") is not True:
            yield f"{where} without use_safetensors=True"
        if "trust_remote_code" in given and given["trust_remote_code"] is not False:
            yield f"{where} with trust_remote_code"
        if given.get("allow_pickle", False) is not False:
            yield f"{where} with allow_pickle"
        if last in ("read_pickle", "unpack_archive", "extractall") or called in ("yaml.load", "yaml.unsafe_load"):
            yield where
        if given.get("shell", False) is not False or called in ("os.system", "os.popen", "eval", "exec"):
            yield f"{where} asks a shell or runs text"


def listening(port: int) -> set[str]:
    """The addresses, in hexadecimal, at which somebody listens on a port."""
    lines = [
        line.split() for file in ("tcp", "tcp6") for line in Path(f"/proc/net/{file}").read_text().splitlines()[1:]
    ]
    return {line[1].split(":")[0] for line in lines if line[3] == "0A" and int(line[1].split(":")[1], 16) == port}


def test_the_ranks_of_one_machine_meet_where_nobody_else_reaches_them():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = rendezvous._listening("127.0.0.1", port)
    assert listening(port) == {"0100007F"}
    with pytest.raises(OSError, match="already in use"):
        rendezvous._listening("127.0.0.1", port)
    store.set("a", "b")
    assert store.get("a") == b"b"


def test_nothing_that_can_run_code_is_read_and_nothing_listens_to_all():
    wrong = {str(file.relative_to(ROOT)): list(found(file.read_text())) for file in FILES}
    pickling = {path for path, told in wrong.items() if told and all("imports" in what for what in told)}
    assert pickling == set(MAY_PICKLE), "an exception that is not listed, or not needed any more"
    assert not {path: told for path, told in wrong.items() if told and path not in MAY_PICKLE}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "AutoTokenizer.from_pretrained(directory)",
        "AutoModel.from_pretrained(directory, trust_remote_code=False)",
        "AutoModel.from_pretrained(directory, trust_remote_code=False, use_safetensors=False)",
        "load_dataset(name, trust_remote_code=True)",
        "np.load(file, allow_pickle=True)",
        "tar.extractall(there)",
        "yaml.load(text)",
        "subprocess.run(command, shell=True)",
        "server.bind(('0.0.0.0', 80))",
    ],
)
def test_the_search_finds(source):
    assert list(found(source))
