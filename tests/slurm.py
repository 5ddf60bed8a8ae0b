"""A real Slurm of one node, for tests: Debian's packages, no systemd, no cgroups, nothing outside its directory."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
SECONDS = 30
"""Most that the cluster may take to come up."""
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.socket
SlurmctldPort=16917
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
NodeName={host} NodeAddr=127.0.0.1 Port=16918 CPUs=4 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def running(root: Path) -> Iterator[None]:
    """A Slurm that is up; the one of this machine where there is one.

    Args:
        root: an empty directory for its state; its path is short, as it holds a socket.
    """
    if shutil.which("squeue") and subprocess.run(["squeue", "--noheader"], capture_output=True).returncode == 0:
        yield
        return
    if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"no Slurm here: {', '.join(lacking)} missing (Debian: slurmctld slurmd slurm-client munge)")
    if os.geteuid() != 0:
        pytest.skip("no Slurm is up here, and only root can start one")
    for directory in ("state", "spool"):
        (root / directory).mkdir()
    configuration = root / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(root=root, host=os.uname().nodename.split(".")[0]))
    (root / "munge.key").write_bytes(os.urandom(128))
    (root / "munge.key").chmod(0o600)
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
    munged = ["munged", "--foreground", "--force", *(f"--{option}={root / name}" for option, name in files.items())]
    commands = [munged, ["slurmctld", "-D"], ["slurmd", "-D"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(configuration))
        servers = []
        try:
            for command in commands:
                servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
                time.sleep(0.5)
            until = time.monotonic() + SECONDS
            while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout:
                assert time.monotonic() < until, f"Slurm did not come up; see {root}/*.log"
                time.sleep(0.2)
            yield
        finally:
            subprocess.run(["scancel", "--user=root"], capture_output=True)
            for server in reversed(servers):
                server.terminate()
                server.wait(SECONDS)
