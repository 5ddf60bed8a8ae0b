"""Whatever becomes of a run, and wherever it runs: the next one goes on and ends with the same bytes."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipeline.engine.pieces import Job, PieceReader, execute, pieces_of, writer
from data_pipeline.engine.tokenising import write_shards
from data_pipeline.executors.base import Executor, PieceError
from data_pipeline.executors.local import Local
from data_pipeline.executors.ray import Ray
from data_pipeline.executors.slurm import Slurm
from tests.data import standard_library, tiny_tokenizer

PIECES = 6
ROOT = Path(__file__).parents[2]
EXECUTORS = {
    "local": Local(),
    "ray": Ray(cpus=0.5),
    "slurm": Slurm(poll_s=0.2, options={"mem": "500M"}),
}
ELSEWHERE = [
    "local",
    pytest.param("ray", marks=pytest.mark.slow),
    pytest.param("slurm", marks=[pytest.mark.slurm, pytest.mark.slow]),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pieces of documents, a tokenizer, and the shard that one process makes of them."""
    root = tmp_path_factory.mktemp("made")
    texts = [text[:4000] for text in standard_library(150) if text]
    for rank, file in enumerate(pieces_of(root / "pieces", PIECES)):
        metadata = {"split": "train", "kind": "code", "source": "here", "licence": "PSF-2.0"}
        documents = [Document(text, f"{rank}/{n}", metadata=metadata) for n, text in enumerate(texts[rank::PIECES])]
        with writer(file.parent) as out:
            for document in documents:
                out.write(document, rank)
    tiny_tokenizer().save(root / "tokenizer")
    shards(root, root / "one", 1)
    return root


@pytest.fixture
def cluster(request):
    """Starts what an executor needs."""
    if request.param == "slurm":
        request.getfixturevalue("slurm")
    yield EXECUTORS[request.param]
    if request.param == "ray":
        import ray

        ray.shutdown()


def shards(root: Path, directory: Path, workers: int, executor: Executor = EXECUTORS["local"]) -> None:
    pieces = {"train": pieces_of(root / "pieces", PIECES)}
    write_shards(pieces, directory, root / "tokenizer", workers, executor)


def result(directory: Path) -> list[bytes]:
    return [(directory / f"train.{ending}").read_bytes() for ending in ("bin", "idx", "documents.parquet")]


def begun(root: Path, directory: Path, name: str, prelude: str = "") -> subprocess.Popen:
    """The same in a process of its own, which is the leader of its session."""
    code = (
        f"from tests.data_pipeline.test_executors import *\n{prelude}\n"
        f"shards(Path({str(root)!r}), Path({str(directory)!r}), 2, EXECUTORS[{name!r}])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("cluster", ELSEWHERE, indirect=True)
def test_the_bytes_do_not_depend_on_where_the_pieces_are_made(made, tmp_path, cluster):
    shards(made, tmp_path / "out", 3, cluster)
    assert result(tmp_path / "out") == result(made / "one")


@pytest.mark.parametrize("name", ["local"])
@pytest.mark.parametrize("moment", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_is_gone_on_with(made, tmp_path, name, moment):
    """Killed again and again, at `moment` random moments, and then left to end."""
    killed_and_ended(made, tmp_path / "out", name, moment)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cluster", ELSEWHERE[1:], indirect=True)
def test_a_run_elsewhere_that_is_killed_is_gone_on_with(made, tmp_path, request, cluster):
    killed_and_ended(made, tmp_path / "out", request.node.callspec.params["cluster"], 4)


def killed_and_ended(root: Path, directory: Path, name: str, times: int) -> None:
    draw = random.Random(times)
    for _ in range(times):
        process = begun(root, directory, name)
        until = time.monotonic() + 60
        while process.poll() is None and not (directory / "logs").exists() and time.monotonic() < until:
            time.sleep(0.01)  # what comes before is the interpreter's start
        time.sleep(draw.uniform(0, 1.5))
        process.kill()
        process.communicate()
    process = begun(root, directory, name)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert result(directory) == result(root / "one")


class Perish(PipelineStep):
    """Ends the process that works on one of the pieces, the first time; or fails there.

    Args:
        piece: which.
        mark: a file that is there from the first time on.
        how: a signal, or an error that is raised.
    """

    name = "perish"
    type = "test"

    def __init__(self, piece: int, mark: Path, how: signal.Signals | Exception):
        super().__init__()
        self.piece, self.mark, self.how = piece, mark, how

    def run(self, data, rank=0, world_size=1):
        for number, document in enumerate(data):
            if rank == self.piece and number == 5 and not self.mark.exists():
                self.mark.touch()
                if isinstance(self.how, Exception):
                    raise self.how
                os.kill(os.getpid(), self.how)
            yield document


def copied(root: Path, out: Path, how, executor: Executor) -> None:
    """Copy the pieces, perishing in piece 2."""
    step = Perish(2, out.with_suffix(".mark"), how)
    reader = PieceReader(pieces_of(root / "pieces", PIECES))
    execute([reader, step, writer(out)], out.with_suffix(".logs"), PIECES, 2, executor)


@pytest.mark.parametrize("cluster", ELSEWHERE, indirect=True)
def test_a_worker_that_is_killed_is_told_with_its_piece_and_a_rerun_goes_on(made, tmp_path, cluster):
    with pytest.raises(PieceError, match=r"piece 2.*(SIGKILL|crash|died|signal 0:9).*run the same command again"):
        copied(made, tmp_path / "out", signal.SIGKILL, cluster)
    copied(made, tmp_path / "out", signal.SIGKILL, cluster)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {
        file.name: file.read_bytes() for file in (made / "pieces").iterdir()
    }


@pytest.mark.parametrize("cluster", ELSEWHERE, indirect=True)
def test_an_error_in_a_worker_is_raised_here_with_its_piece(made, tmp_path, cluster):
    with pytest.raises(ZeroDivisionError) as error:
        copied(made, tmp_path / "out", ZeroDivisionError("by chance"), cluster)
    assert "In piece 2 of" in "".join(error.value.__notes__)
    copied(made, tmp_path / "out", ZeroDivisionError("by chance"), cluster)
    assert len(list((tmp_path / "out").iterdir())) == PIECES


LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


@pytest.mark.parametrize("limit", [20_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_a_disk_that_is_full_is_told_and_a_rerun_goes_on(made, tmp_path, limit):
    """A limit on the size of files stands for it: one that a piece reaches, one that only the whole shard reaches."""
    process = begun(made, tmp_path / "out", "local", LIMITED.format(limit))
    _, errors = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "DiskFullError" in errors or "File too large" in errors
    shards(made, tmp_path / "out", 2)
    assert result(tmp_path / "out") == result(made / "one")


def test_a_piece_has_one_writer_at_a_time(made, tmp_path):
    job = Job([PieceReader(pieces_of(made / "pieces", PIECES)), writer(tmp_path / "out")], tmp_path / "logs", PIECES)
    (tmp_path / "logs/locks").mkdir(parents=True)
    with open(tmp_path / "logs/locks/00001", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=job.do, args=(1,), daemon=True)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not job.complete(1)
    thread.join(60)
    assert job.complete(1)
