"""The house rules on imports: rooms import downwards, and the training core needs only torch, numpy and hydra-core."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {"conf", "data_pipeline", "parallel", "train", "launchers", "tools"}
MAY_IMPORT = {
    "conf": {"conf"},
    "data_pipeline": {"conf", "data_pipeline"},
    "parallel": {"conf", "parallel"},
    "train": {"conf", "data_pipeline", "parallel", "train"},
    "launchers": {"conf", "data_pipeline.artifact", "launchers"},
    "tools": ROOMS,
}
LIGHT = {"torch", "numpy", "hydra", "omegaconf"}


def imported(file: Path, top_level_only: bool = False) -> set[str]:
    """Dotted names of the modules a file imports."""
    names = set()
    tree = ast.parse(file.read_text())
    guarded = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for n in node.body
    }
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_rooms_import_only_downwards(room):
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / room).rglob("*.py")
        for name in imported(file)
        if name.split(".")[0] in ROOMS
        and not any((name + ".").startswith(allowed + ".") for allowed in MAY_IMPORT[room])
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["train", "parallel"])
def test_the_training_core_imports_only_torch_numpy_and_hydra(room):
    wrong = [
        f"{file.relative_to(ROOT)} imports {name}"
        for file in (ROOT / room).rglob("*.py")
        for name in imported(file, top_level_only=True)
        if (top := name.split(".")[0]) not in LIGHT | ROOMS and top not in sys.stdlib_module_names
    ]
    assert not wrong


def test_the_configuration_composes_without_any_optional_package():
    """In a fresh process where everything but the core packages cannot be imported."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"transformers", "datatrove", "datasets", "tokenizers", "safetensors", "wandb", "rich",
                                  "matplotlib", "tensorboard", "submitit", "psutil", "reasoning_gym", "deepspeed",
                                  "optuna"}:
            raise ImportError(f"{name} is not part of the training core")
sys.meta_path.insert(0, Refuse())
import train.config
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
