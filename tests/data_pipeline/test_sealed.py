"""A job's file is believed only under the key of its submission."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.executors import sealed
from data_pipeline.executors.sealed import SealError

ROOT = Path(__file__).parents[2]


class Trap:
    """Pickled, an order to make a directory."""

    def __init__(self, directory: Path):
        self.directory = str(directory)

    def __reduce__(self):
        return os.mkdir, (self.directory,)


def test_what_was_written_is_read_with_its_key(tmp_path):
    sealed.write(tmp_path / "job", ({"a": 1}, ZeroDivisionError("x")), "key")
    value, error = sealed.read(tmp_path / "job", "key")
    assert value == {"a": 1} and isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize("how", ["another key", "a changed byte", "no code", "empty"])
def test_anything_else_is_refused_and_nothing_of_it_is_run(tmp_path, how):
    file, sprung = tmp_path / "job", tmp_path / "sprung"
    sealed.write(file, Trap(sprung), "theirs" if how == "another key" else "key")
    content = file.read_bytes()
    if how == "a changed byte":
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    elif how == "no code":
        file.write_bytes(pickle.dumps(Trap(sprung)))
    elif how == "empty":
        file.write_bytes(b"")
    with pytest.raises(SealError, match=r"job is not what this run wrote.*not read"):
        sealed.read(file, "key")
    assert not sprung.exists()


@pytest.mark.parametrize(("key", "told"), [("mine", "is not what this run wrote"), ("", "LONGRUN_JOB_KEY is not in")])
def test_an_element_of_an_array_refuses_a_job_that_was_replaced(tmp_path, key, told):
    sealed.write(tmp_path / "job", Trap(tmp_path / "sprung"), "theirs")
    variables = os.environ | {"PYTHONPATH": str(ROOT), "SLURM_ARRAY_TASK_ID": "0", sealed.VARIABLE: key}
    command = [sys.executable, "-m", "data_pipeline.engine.element", str(tmp_path / "job")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and told in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "sprung").exists()
