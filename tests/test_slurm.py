"""The Slurm of the tests is a real one: its nodes have names, work together, and can be lost."""

import pytest

from tests.slurm import until

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def clean(slurm):
    slurm.clear()


def test_tasks_of_a_job_run_on_nodes_that_resolve_each_other(slurm, tmp_path):
    script = f"srun --output={tmp_path}/%t sh -c 'hostname; getent hosts n1 n2 n3 | wc -l'"
    slurm.wait(slurm.submit(script, "-N2", "--ntasks-per-node=2"), "COMPLETED")
    assert [(tmp_path / f"{rank}").read_text().split() for rank in range(4)] == [["n1", "3"]] * 2 + [["n2", "3"]] * 2


@pytest.mark.slow
def test_a_job_is_requeued_by_its_own_script(slurm, tmp_path):
    script = f"echo start >> {tmp_path}/log; [ ${{SLURM_RESTART_COUNT:-0}} = 1 ] || scontrol requeue $SLURM_JOB_ID"
    slurm.wait(slurm.submit(script), "COMPLETED", restarts=1)
    assert (tmp_path / "log").read_text() == "start\n" * 2


@pytest.mark.slow
def test_a_job_goes_on_elsewhere_when_its_node_is_lost(slurm, tmp_path):
    job = slurm.submit(f"hostname >> {tmp_path}/log; [ $SLURM_RESTART_COUNT ] || sleep 600")
    lost = slurm.wait(job, "RUNNING")["NodeList"]
    until(lambda: (tmp_path / "log").exists(), "the job did not say where it runs")
    slurm.kill(lost)
    slurm.wait(job, "COMPLETED", restarts=1)
    first, second = (tmp_path / "log").read_text().split()
    assert first == lost != second and slurm.states()[lost].startswith("down")
    slurm.up(lost)
    assert slurm.states()[lost] == "idle"
