"""Jobs on a real Slurm: how they end, how they are started again, what is refused before they are submitted."""

import io
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from conf.errors import ConfigError
from data_pipeline.artifact import Artifact, locked
from launchers import preflight
from launchers.graph import LifecycleConfig, StageSpec
from launchers.lifecycle import Life
from launchers.queue import Slurm
from launchers.slurm import jobs, show
from launchers.slurm.array import ArrayConfig
from launchers.slurm.cluster import SlurmError
from launchers.slurm.jobs import LiveJobError
from launchers.slurm.resources import Resources, SlurmConfig, seconds
from launchers.slurm.script import KILLED, Batch, Run
from tests.data import tiny_corpus
from tests.slurm import Cluster, until

pytestmark = pytest.mark.slurm

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BEHAVIOURS = ("well", "early once", "fails", "leaves nothing", "stops on request")
SLURM = [sys.executable, "-m", "launchers.slurm"]


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{HERE}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.syspath_prepend(HERE)
        yield patch


def dummy(directory: Path, *settings: str, **resources) -> str:
    """Submit a stage that costs nothing; returns the job's number. Its configuration is not checked: that takes the
    import of torch."""
    config = SlurmConfig(**resources)
    command = ["dummy_stage", f"run_dir={directory}", *settings]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "answers", lambda calls: {"run": preflight.Answer(run_dir=str(directory))})
        said = jobs.submit(config, asdict(config), command)
    return re.search(r"job (\d+) for", said)[1]


@pytest.fixture(scope="module")
def ends(slurm: Cluster, patch, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Behaviour -> run directory and job number of a stage with it, all submitted at once."""
    slurm.clear()
    root = tmp_path_factory.mktemp("ends")
    submitted = {}
    for behaviour in BEHAVIOURS:
        directory = root / behaviour.replace(" ", "-")
        work_s = 600 if behaviour == "stops on request" else 0
        submitted[behaviour] = (directory, dummy(directory, f"behaviour={behaviour}", f"seconds={work_s}"))
    return submitted


@pytest.fixture(scope="module")
def trained(slurm: Cluster, patch, tmp_path_factory) -> tuple[Path, str]:
    """A run of two nodes with two ranks each, submitted from the command line; and what that said."""
    root = tmp_path_factory.mktemp("trained")
    command = ["train", "model=smoke", f"data.path={tiny_corpus(root, documents=60)}", f"run_dir={root}/run"]
    command += ["data.sequence_length=32", "stage.steps=4", "stage.global_batch=8", "stage.validation_batches=1"]
    asked = ["nodes=2", "tasks_per_node=2", "time=10", "+environment.GREETING=it is"]
    given = [*SLURM, "submit", *asked, "--", *command, "parallel.dp_shard=4"]
    answer = subprocess.run(given, capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    slurm.wait(re.search(r"job (\d+) for", answer.stdout)[1], "COMPLETED", timeout_s=180)
    return root / "run", answer.stdout


def test_two_nodes_with_two_ranks_each_train(trained):
    artifact = Artifact.read(trained[0])
    assert artifact.facts["processes"] == 4 and artifact.metrics["steps"] == 4
    assert "srun: 4 processes on 2 machines" in (trained[0] / "logs/rank-0.log").read_text()
    assert sorted(file.name for file in (trained[0] / "logs").glob("rank-*")) == [f"rank-{r}.log" for r in range(4)]


def test_what_was_submitted_is_kept_with_the_run(trained, slurm):
    record = jobs.Record.read(trained[0])
    assert record.command[0] == "train" and record.settings["nodes"] == 2 and record.cwd == str(ROOT)
    script = (trained[0] / "logs" / f"{record.jobs[-1]}_submission.sh").read_text()
    for flag in ("--nodes=2", "--ntasks-per-node=2", "--time=10", "--signal=USR2@120", "--open-mode=append"):
        assert f"#SBATCH {flag}" in script
    assert "export GREETING='it is'" in script
    assert jobs.resume(trained[0], []) == f"{trained[0]} is finished: nothing to do"


def test_a_run_that_ends_well_completes_its_job(ends, slurm):
    directory, job = ends["well"]
    slurm.wait(job, "COMPLETED")
    assert Artifact.read(directory).kind == "dummy"


def test_a_run_that_fails_fails_its_job_at_once_with_its_code(ends, slurm):
    directory, job = ends["fails"]
    assert slurm.wait(job, "FAILED")["ExitCode"] == "1:0"
    assert "something the user can mend" in "".join(show.lines(directory, "0", follow=False))
    assert "a rank failed with exit code 1" in "".join(show.lines(directory, "job", follow=False))
    (row,) = show.rows([directory])
    assert (row.state, row.restarts) == ("FAILED", 0) and "exit code 1" in row.why


def test_success_without_an_artifact_fails_the_job(ends, slurm):
    directory, job = ends["leaves nothing"]
    assert slurm.wait(job, "FAILED")["ExitCode"] == "1:0"
    assert "manifest.json is not there" in (directory / "logs/job.log").read_text()


def test_a_run_that_stops_early_is_requeued_and_goes_on(ends, slurm):
    directory, job = ends["early once"]
    slurm.wait(job, "COMPLETED", restarts=1)
    assert (directory / "starts").read_text() == "2"
    assert "start 2 follows" in (directory / "logs/job.log").read_text()


def test_a_run_has_one_job_which_status_shows_and_cancel_lets_stop(ends, slurm):
    directory, job = ends["stops on request"]
    until(lambda: "working" in _read(directory / "logs/rank-0.log"), "the run did not come to work", 60)
    with pytest.raises(LiveJobError, match=f"has job {job} already"):
        dummy(directory)
    assert (job, "RUNNING", str(directory)) in [(row.job, row.state, row.run) for row in show.rows([])]
    assert jobs.run_of(job) == directory
    jobs.Record.add(Run(directory, []), {}, "900_3")
    assert jobs.elements(directory.parent / "logs")["900_3"] == directory
    said = list(jobs.cancel(directory, wait_s=30))
    assert said[0] == f"job {job} is asked to write a checkpoint and end" and "resume" in said[-1]
    slurm.wait(job, "CANCELLED")
    assert jobs.live_job(directory) is None
    assert list(jobs.cancel(directory, wait_s=30)) == [f"{directory} has no job that is pending or running."]


def test_a_job_that_waits_says_why_and_is_cancelled_without_a_word(slurm, patch, tmp_path):
    job = dummy(tmp_path / "run", options={"begin": "now+1hour"})
    (row,) = show.rows([tmp_path / "run"])
    assert (row.state, row.why) == ("PENDING", "starts again in a moment")
    with pytest.raises(SlurmError, match=rf"no .*rank-0.log; job {job} is PENDING"):
        list(show.lines(tmp_path / "run", "0", follow=False))
    assert list(jobs.cancel(tmp_path / "run", wait_s=30)) == [f"job {job} is cancelled"]


@pytest.mark.slow
@pytest.mark.parametrize(("behaviour", "code"), [("always early", 75), ("always loses a rank", 137)])
def test_requeues_without_a_new_checkpoint_come_to_an_end(slurm, patch, tmp_path, behaviour, code):
    job = dummy(tmp_path / "run", f"behaviour={behaviour}", requeues=1)
    assert slurm.wait(job, "FAILED", restarts=1)["ExitCode"] == f"{code}:0"
    assert (tmp_path / "run/starts").read_text() == "2"
    assert "1 requeues (requeues) brought no new checkpoint" in (tmp_path / "run/logs/job.log").read_text()


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


# A lifecycle.


@pytest.fixture
def life(slurm, patch, tmp_path, monkeypatch):
    """Run stages as a chain of jobs; returns exit code, states and what was shown."""
    monkeypatch.setattr(preflight, "check", lambda calls: {})
    slurm.clear()

    def run(stages: dict[str, StageSpec], **options):
        launcher = Slurm(poll_s=0.2, **options)
        config = LifecycleConfig(name="life", root=str(tmp_path / "life"), stages=stages, launcher=launcher)
        assert config.problems() == []
        with locked(config.root):
            life = Life(config)
            life.display.console = Console(file=io.StringIO(), width=200)
            code = life.run()
        return code, {name: row.state for name, row in life.rows.items()}, life.display.console.file.getvalue()

    run.root = tmp_path / "life"
    return run


def stages(**behaviours: str) -> dict[str, StageSpec]:
    """a -> b -> c, and a page at the end whatever happens; b on two ranks."""
    made = {name: {"behaviour": behaviours.get(name, "well")} for name in "abc"}
    return {
        "a": StageSpec("dummy_stage", set=made["a"]),
        "b": StageSpec("dummy_stage", needs={"source": "a"}, set=made["b"], processes=2),
        "c": StageSpec("dummy_stage", needs={"source": "b"}, set=made["c"]),
        "page": StageSpec("dummy_stage", after=["c"], always=True),
    }


@pytest.mark.slow
def test_a_chain_stops_at_the_stage_that_fails_and_goes_on_once_it_is_mended(life, slurm):
    code, states, shown = life(stages(b="fails"), tasks_per_node=1)
    assert (code, states) == (1, {"a": "done", "b": "failed", "c": "not started", "page": "done"})
    assert "something the user can mend" in shown.split("The last lines of")[1]
    job = jobs.Record.read(life.root / "c").jobs[-1]
    assert slurm.job(job)["JobState"] == "CANCELLED" and not (life.root / "c/starts").exists()
    code, states, _ = life(stages())
    assert (code, states) == (0, {"a": "skipped", "b": "resumed", "c": "done", "page": "skipped"})


@pytest.mark.slow
def test_a_chain_goes_on_without_the_lifecycle_which_joins_it_later(life, slurm):
    code, states, shown = life(stages(), detach=True)
    assert (code, states) == (0, {}) and shown.count("job ") == 4
    before = {name: jobs.Record.read(life.root / name).jobs for name in ("b", "c")}
    code, states, _ = life(stages())
    assert code == 0 and set(states.values()) == {"done"}
    assert before == {name: jobs.Record.read(life.root / name).jobs for name in ("b", "c")}, "no second job"


@pytest.mark.slow
def test_what_waits_for_a_stage_that_is_made_anew_waits_for_its_new_job(life, slurm):
    assert life(stages())[0] == 0
    changed = stages()
    changed["b"].set["value"] = 7
    code, states, shown = life(changed)
    assert (code, states) == (0, {"a": "skipped", "b": "done", "c": "done", "page": "skipped"}), shown
    assert "made by another configuration" in shown and Artifact.read(life.root / "c").inputs["b"]["id"] in (
        Artifact.read(life.root / "b").id
    )
    assert not slurm.jobs()


# A sweep.


def multirun(root: Path, *settings: str) -> subprocess.CompletedProcess:
    asked = ["hydra/launcher=slurm", "hydra.launcher.poll_s=0.2", f"run_dir={root}/sweep", *settings]
    given = [sys.executable, "-m", "dummy_stage", "-m", *asked]
    return subprocess.run(given, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_a_multirun_is_one_array_and_a_run_that_fails_fails_its_element(slurm, patch, tmp_path):
    answer = multirun(tmp_path, "behaviour=well,fails,early once")
    assert answer.returncode == 1 and "Traceback" not in answer.stderr
    (number,) = re.findall(r"job (\d+): 3 runs in", answer.stdout)
    for element, (state, restarts) in enumerate([("COMPLETED", "0"), ("FAILED", "0"), ("COMPLETED", "1")]):
        directory = tmp_path / "sweep" / str(element)
        fields = slurm.job(f"{number}_{element}")
        assert (fields["JobState"], fields["Restarts"]) == (state, restarts)
        assert (directory / "manifest.json").exists() == (state == "COMPLETED")
    assert re.search(r"1: behaviour=fails: FAILED; see .*sweep/1/logs", answer.stdout)
    assert multirun(tmp_path, "behaviour=well").returncode == 0


def test_a_multirun_of_which_one_would_be_refused_starts_none(slurm, patch, tmp_path):
    answer = multirun(tmp_path, "value=1,-1", "hydra.launcher.partition=hihg")
    assert answer.returncode == 1 and not (tmp_path / "sweep").exists()
    assert "2 problems" in answer.stderr and "value=-1: 0 or more" in answer.stderr
    assert "hydra.launcher.partition=hihg: there is no such partition; did you mean high?" in answer.stderr


# What is refused.


@pytest.mark.parametrize(
    ("text", "limit_s"),
    [("90", 5400), ("24:00:00", 86400), ("10:30", 630), ("2-0", 172800), ("1-12:30", 131400), ("1-0:0:5", 86405)],
)
def test_times_are_read_as_slurm_reads_them(text, limit_s):
    assert seconds(text) == limit_s


@pytest.mark.parametrize("text", ["24h", "1:2:3:4", "1d", "-5", "1-"])
def test_what_is_no_time_is_none(text):
    assert seconds(text) is None


def refused(*command: str, **resources) -> str:
    with pytest.raises(ConfigError) as error:
        jobs.check(SlurmConfig(**resources), command)
    return str(error.value)


def test_every_problem_is_told_at_once(slurm, patch):
    said = refused(
        *["dummy_stage", "run_dir=/tmp/none", "value=-1"],
        **{"partition": "mian", "time": "24h", "memory": "much"},
    )
    assert "4 problems" in said
    for part in (
        "partition=mian: there is no such partition; did you mean main?",
        "time=24h: minutes (90)",
        "memory=much",
        "value=-1: 0 or more",
    ):
        assert part in said


def test_a_job_that_can_never_start_is_refused(slurm, patch, monkeypatch):
    monkeypatch.setattr(preflight, "answers", lambda calls: {"run": preflight.Answer(run_dir="run")})
    asked = {"nodes": 4, "gpus_per_node": 3, "cpus_per_task": 5, "memory": "1T", "time": "1-0", "partition": "short"}
    said = refused("train", **asked)
    for part in (
        "nodes=4: partition short has 3",
        "gpus_per_node=3: asks for 3 GPUs; no node of partition short has more than 2",
        "tasks_per_node=3: asks for 15 cores; no node of partition short has more than 2",
        "memory=1T: asks for 1048576 MiB; no node of partition short has more than 4000",
        "time=1-0: partition short allows 00:10:00 at most",
    ):
        assert part in said
    assert "leaves no time to train" in refused("train", time="3")
    assert "partition=lnog: there is no such partition" in refused("train", partition="main,lnog")
    assert jobs.check(SlurmConfig(time="1-0", partition="short,main"), ["train"])  # one of them will do
    with pytest.raises(ConfigError, match="slurm=refuses: the job could never start"):
        jobs.submit(SlurmConfig(exclude="n[1-3]"), {}, ["train"])


def test_a_machine_without_slurm_is_told(patch, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "slurm=absent: there is no sinfo on this machine" in refused("nothing.of.ours")


def test_a_controller_that_does_not_answer_is_told(patch, monkeypatch, tmp_path):
    (tmp_path / "slurm.conf").write_text("ClusterName=x\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=1\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    assert "slurm=absent: sinfo: " in refused("nothing.of.ours")


def test_a_command_that_makes_no_run_is_refused(slurm):
    assert "command='': what follows `--` is a module of ours" in refused()
    assert "command=tran stage=sft: what follows" in refused("tran", "stage=sft")


@pytest.mark.parametrize(
    ("codes", "answer", "code"),
    [("0 0", 0, 0), ("76 1", 76, 1), ("75 76", 76, 76), ("10 0", 10, 10), ("0", 137, 0), ("", 137, 137)],
)
def test_the_code_of_a_rank_that_failed_counts_before_those_of_ranks_that_were_left(tmp_path, codes, answer, code):
    """The script's own shell, on the codes that ranks left and what srun answered. A node that was lost after the end
    counts for nothing."""
    (tmp_path / "codes").mkdir()
    for rank, own in enumerate(codes.split()):
        (tmp_path / f"codes/{rank}").write_text(f"{own}\n")
    (tmp_path / "manifest.json").touch()
    after = Batch(Resources(requeues=0), 1, [Run(tmp_path, [])], "run", tmp_path)._after()
    script = [f"set -- {tmp_path}", "codes=$1/codes logs=$1", f"(exit {answer})", *after]
    assert subprocess.run(["bash", "-c", "\n".join(script)], capture_output=True).returncode == code


@pytest.mark.parametrize(("code", "again"), [(75, True), (76, True), (134, True), (139, True), (77, False), (2, False)])
def test_a_rank_that_a_signal_killed_was_lost_and_one_with_a_code_of_its_own_failed(tmp_path, code, again):
    after = Batch(Resources(requeues=0), 1, [Run(tmp_path, [])], "run", tmp_path)._after()
    script = [f"set -- {tmp_path}", "codes=$1/codes logs=$1", f"(exit {code})", *after]
    answer = subprocess.run(["bash", "-c", "\n".join(script)], capture_output=True, text=True)
    assert ("0 requeues (requeues) brought no new checkpoint" in answer.stdout) == again
    assert again == (code in (75, 76, *KILLED))


def test_settings_are_changed_as_on_the_command_line_and_none_is_lost():
    asked = ArrayConfig(environment={"A": "1"}, setup=["module load x"], mounts=["/data"], options={"mail-type": "END"})
    config = jobs.changed(jobs.settings_of(asked), ["time=48:00:00", "+environment.B=2", "nodes=2"])
    assert (config.time, config.environment, config.nodes) == ("48:00:00", {"A": "1", "B": "2"}, 2)
    assert (config.setup, config.mounts, config.options) == (asked.setup, asked.mounts, asked.options)
    for wrong in ("tiem=1", "nodes=many", "time", "nodes=1,2"):
        with pytest.raises(SlurmError, match=wrong):
            jobs.changed({}, [wrong])


# The script.


@pytest.mark.parametrize("runtime", ["pyxis", "apptainer"])
def test_the_ranks_run_in_the_container_that_is_asked_for(slurm, runtime, tmp_path):
    asked = Resources(container="image", runtime=runtime, mounts=["/data"], gpus_per_node=2)
    (tmp_path / "logs").mkdir()
    script = Batch(asked, 1, [Run(tmp_path, ["train"])], "run", tmp_path / "logs").text()
    (srun,) = [line for line in script.splitlines() if line.startswith("srun")]
    mounts = f"{ROOT}:{ROOT},{Path.cwd()}:{Path.cwd()},$1:$1,/data:/data"
    inside = f'"--bind={mounts}" image' if runtime == "apptainer" else f'"--container-mounts={mounts}"'
    assert inside in srun and ("apptainer exec --nv" in srun) == (runtime == "apptainer")
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_a_run_that_may_lose_nodes_runs_under_an_agent_on_each(slurm, tmp_path):
    (tmp_path / "logs").mkdir()
    script = Batch(Resources(gpus_per_node=2), 3, [Run(tmp_path, ["train"])], "run", tmp_path, min_nodes=1).text()
    for flag in ("--nodes=1-3", "--exclusive", "--no-kill"):
        assert f"#SBATCH {flag}" in script
    (srun,) = [line for line in script.splitlines() if line.startswith("srun")]
    assert "launchers.torchrun --nnodes=1:3 --nproc-per-node=2" in srun
    assert '"--rdzv-endpoint=$SLURMD_NODENAME:$((20000 + SLURM_JOB_ID % 10000))" -m "${@:2}"' in srun
