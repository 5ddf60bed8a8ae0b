"""Programs that mean harm, and what becomes of them."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipeline.sandbox import calls
from data_pipeline.sandbox.run import Limits, Outcome, SandboxError
from data_pipeline.sandbox.run import run as run_limited

ROOT = Path(__file__).parents[2]
ALLOWED = subprocess.run(["unshare", "--user", "--map-root-user", "--net", "true"], capture_output=True).returncode == 0
both = pytest.mark.parametrize("isolation", ["namespaces", "landlock"])
pytestmark = pytest.mark.skipif(not ALLOWED, reason="this machine allows no user namespaces")
PATIENT = Limits(wall_s=60, memory_bytes=128 * 2**20)
"""A machine that is busy with other tests ends no program that would end by itself."""
SHORT = Limits(wall_s=1)


def run(program: str, stdin: str = "", limits: Limits = PATIENT, isolation: str = "namespaces") -> Outcome:
    return run_limited(program, stdin, limits, isolation)


def test_a_program_reads_its_input_and_ends_with_its_code():
    outcome = run("import sys\nprint(input()[::-1])\nsys.exit(7)", "abc\n")
    assert (outcome.code, outcome.stopped, outcome.stdout) == (7, "", "cba\n")


def test_what_it_raises_is_told():
    outcome = run("1 / 0")
    assert outcome.code == 1 and "ZeroDivisionError" in outcome.stderr


@both
def test_an_endless_loop_is_ended(isolation):
    assert run("while True: pass", limits=SHORT, isolation=isolation).stopped == "time"
    assert run("while True: pass", limits=Limits(wall_s=60, cpu_s=1), isolation=isolation).code == 128 + signal.SIGKILL


@both
def test_one_that_sleeps_with_its_streams_closed_is_ended(isolation):
    program = "import os, time\nos.close(1); os.close(2)\ntime.sleep(60)"
    assert run(program, limits=SHORT, isolation=isolation).stopped == "time"


@both
def test_no_process_is_forked_and_none_becomes_a_daemon(isolation):
    program = """
import os, subprocess, threading
for way in (os.fork, os.setsid, threading.Thread(target=print).start, lambda: subprocess.run(["/bin/sh"])):
    try:
        print(way())
    except (PermissionError, RuntimeError):
        pass
print("done")
"""
    assert run(program, isolation=isolation).stdout == "done\n"


@both
def test_memory_ends_where_it_is_limited(isolation):
    outcome = run("parts = []\nwhile True: parts.append(bytearray(2**24))", isolation=isolation)
    assert outcome.code == 1 and "MemoryError" in outcome.stderr


@both
def test_one_file_ends_where_the_disk_is_limited(isolation):
    program = "import signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nwith open('f', 'wb') as f:\n"
    outcome = run(program + " while True: f.write(bytes(2**20))", isolation=isolation)
    assert outcome.code == 1 and "OSError" in outcome.stderr


@pytest.mark.parametrize("size", [0, 2**20])
def test_many_files_end_where_the_disk_is_limited(size):
    program = f"n = 0\nwhile True:\n n += 1\n open(str(n), 'wb').write(bytes({size}))"
    outcome = run(program)
    assert outcome.code == 1 and "No space left" in outcome.stderr


@both
def test_a_flood_of_output_is_ended_and_cut(isolation):
    outcome = run("while True: print('x' * 10000)", limits=Limits(wall_s=60, output_bytes=50_000), isolation=isolation)
    assert outcome.stopped == "output" and 0 < len(outcome.stdout) <= 50_000


@both
def test_it_reads_no_file_of_ours(tmp_path, isolation):
    """Neither by path, nor through a link that it makes."""
    secret = tmp_path / "netrc"
    secret.write_text("machine a password cAnAry")
    files = [str(secret), str(Path("~/.netrc").expanduser()), "/etc/passwd", "/proc/1/environ", __file__]
    program = f"""
import os
for number, file in enumerate({files}):
    os.symlink(file, f"link{{number}}")
    for path in (file, f"link{{number}}"):
        try:
            print(path, open(path).read())
        except OSError:
            pass
print("done")
"""
    assert run(program, isolation=isolation).stdout == "done\n"


@both
def test_it_writes_nowhere_but_in_its_directory(tmp_path, isolation):
    program = """
import os, sys
library = os.path.dirname(os.__file__)
for directory in ['TMP', '..', '/', '/dev', '/var/tmp', '/usr', '/usr/lib', '/lib64', '/etc', library, sys.prefix]:
    try:
        open(directory + '/written', 'w')
        print(directory)
    except OSError:
        pass
try:
    open(os.__file__, 'a')
    print(os.__file__)
except OSError:
    pass
try:
    os.rename('../program.py', 'program.py')
except OSError:
    open('../tmp/here', 'w')
    os.mkdir('below')
print(sorted(os.listdir('.')))
"""
    assert run(program.replace("TMP", str(tmp_path)), isolation=isolation).stdout == "['below', 'here']\n"


@both
def test_it_has_nothing_of_our_environment(monkeypatch, isolation):
    monkeypatch.setenv("HF_TOKEN", "cAnAry")
    outcome = run("import os\nprint(sorted(os.environ), os.listdir('.'))", isolation=isolation)
    assert outcome.stdout == "['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED'] []\n"


@both
def test_it_has_no_open_file_of_ours(isolation):
    with open(__file__) as stream:
        os.set_inheritable(stream.fileno(), True)
        program = "import os\nfor fd in range(3, 60):\n try: os.fstat(fd); print(fd)\n except OSError: pass"
        assert run(program, isolation=isolation).stdout == ""


@both
def test_it_reaches_no_one(isolation):
    """Not on loopback, not outside, not through a socket in the file system."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        addresses = [
            ("AF_INET", server.getsockname()),
            ("AF_INET", ("192.0.2.1", 80)),
            ("AF_UNIX", "/run/docker.sock"),
            ("AF_VSOCK", (2, 1)),
        ]
        program = f"""
import socket
for family, address in {addresses}:
    try:
        socket.socket(getattr(socket, family)).connect(address)
        print(family, "reached")
    except PermissionError:
        pass
print("done")
"""
        assert run(program, isolation=isolation).stdout == "done\n"
        server.settimeout(0.01)
        with pytest.raises(TimeoutError):
            server.accept()


@both
def test_it_signals_none_but_itself(isolation):
    victim = subprocess.Popen(["sleep", "60"])
    program = f"""
import os, signal
for who in [{victim.pid}] + [os.getppid(), -1, 0, 1] * {isolation == "namespaces"}:
    for number in (signal.SIGKILL, signal.SIGINT):
        try:
            os.kill(who, number)
            print(who)
        except PermissionError:
            pass
print("kept", flush=True)
os.kill(os.getpid(), 9)
"""
    outcome = run(program, isolation=isolation)
    assert (outcome.stdout, outcome.code) == ("kept\n", 128 + signal.SIGKILL)
    assert victim.poll() is None
    victim.kill()
    victim.wait()


def test_system_calls_that_it_needs_not_are_refused():
    column = calls.architecture()[1]
    numbers = {name: both[column] for name, both in calls.REFUSED.items() if both[column] is not None}
    program = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {numbers}.items():
    if libc.syscall(number, 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
        print(name)
print("done")
"""
    assert run(program).stdout == "done\n", "EPERM to all"


@both
def test_no_limit_can_be_raised_or_set_for_others(isolation):
    with subprocess.Popen(["sleep", "60"]) as victim:
        for program in (
            f"resource.prlimit({victim.pid}, resource.RLIMIT_NOFILE, (9, 9))",
            "resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))",
        ):
            outcome = run(f"import resource\n{program}", isolation=isolation)
            assert outcome.code == 1 and ("PermissionError" in outcome.stderr or "not allowed" in outcome.stderr)
        victim.kill()


def test_its_end_is_the_end_of_all_that_is_in_there():
    """Also when the one who asked is killed."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from data_pipeline.sandbox.run import run, Limits
print("going", flush=True)
run("import time\\ntime.sleep(77.25)", limits=Limits(wall_s=100))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout and process.stdout.readline() == b"going\n"

    def held() -> list[int]:
        parents = {}
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                stat = (directory / "stat").read_text().rsplit(")", 1)[1].split()
                parents[int(directory.name)] = int(stat[1]), stat[0]
            except (OSError, IndexError):
                continue
        inside = {process.pid}
        for _ in range(6):
            inside |= {pid for pid, (parent, _) in parents.items() if parent in inside}
        return sorted(inside - {process.pid})

    deadline = time.monotonic() + 20
    while len(inside := held()) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(inside) == 3, "the jail, the first process, the program"
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in inside) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in inside if Path(f"/proc/{pid}").exists()]


def test_where_no_namespace_can_be_had_it_is_not_run_unless_that_is_asked_for(tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from data_pipeline.sandbox.run import run, SandboxError
try:
    run("open('/{tmp_path}/ran', 'w')")
except SandboxError as error:
    print(error)
print(run("print('ran')", isolation="landlock").stdout)
"""
    forbidden = "echo 0 > /proc/sys/user/max_user_namespaces && exec "
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", forbidden + '"$@"', "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "it was not run. Allow user namespaces" in done.stdout and done.stdout.endswith("ran\n\n")
    assert not (tmp_path / "ran").exists()


def test_a_machine_without_a_filter_is_refused(monkeypatch):
    monkeypatch.setattr(calls.platform, "machine", lambda: "riscv64")
    with pytest.raises(calls.JailError, match="no filter of system calls for riscv64"):
        calls.filter_of(1)


def test_a_jail_that_fails_or_is_unknown_is_an_error_of_its_own(monkeypatch):
    monkeypatch.setattr("data_pipeline.sandbox.run.START", "raise RuntimeError('broken %d')")
    with pytest.raises(SandboxError, match="expected one of namespaces, landlock; nothing was run"):
        run("print(1)", isolation="none")
    with pytest.raises(SandboxError, match=r"(?s)ended by itself.*broken"):
        run("print(1)")
