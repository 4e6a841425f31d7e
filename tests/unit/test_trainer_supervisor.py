from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.contract import ExitCode, FailureReason
from trainer.locks import is_held, try_lock
from trainer.supervisor import explain_exit, read_oom_kills

WORKER_KILLED = "RuntimeError: DataLoader worker (pid 41) is killed by signal: Killed."


@pytest.mark.parametrize(
    ("returncode", "failure", "oom_killed", "code", "reason"),
    [
        (0, {}, False, ExitCode.OK, None),
        (int(ExitCode.DATA), {"message": "bad"}, False, ExitCode.DATA, FailureReason.DATA),
        (int(ExitCode.DISK_FULL), {"message": "full"}, False, ExitCode.DISK_FULL, FailureReason.QUOTA),
        (-signal.SIGKILL, {}, True, ExitCode.OUT_OF_MEMORY, FailureReason.OUT_OF_MEMORY),
        (-signal.SIGKILL, {}, False, ExitCode.UNAVAILABLE, FailureReason.INFRASTRUCTURE),
        (-signal.SIGSEGV, {}, False, ExitCode.USER_CODE, FailureReason.USER_CODE),
        (1, {}, False, 1, FailureReason.USER_CODE),
        (int(ExitCode.USER_CODE), {"message": WORKER_KILLED}, True, ExitCode.OUT_OF_MEMORY, FailureReason.OUT_OF_MEMORY),
        (int(ExitCode.USER_CODE), {"message": WORKER_KILLED}, False, ExitCode.USER_CODE, FailureReason.USER_CODE),
        (int(ExitCode.USER_CODE), {"message": "a mistake"}, True, ExitCode.USER_CODE, FailureReason.USER_CODE),
    ],
)
def test_every_ending_has_a_code_and_a_reason(
    returncode: int, failure: dict[str, str], oom_killed: bool, code: int, reason: FailureReason | None
) -> None:
    got_code, got_reason, message, _ = explain_exit(returncode, failure, oom_killed=oom_killed)
    assert (got_code, got_reason) == (code, reason)
    assert message or returncode == 0


def test_a_lock_is_held_by_whoever_inherited_it(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_held(path)
    descriptor = try_lock(path)
    assert descriptor is not None
    assert is_held(path)
    assert try_lock(path) is None
    heir = os.dup(descriptor)
    os.close(descriptor)
    assert is_held(path)
    os.close(heir)
    assert not is_held(path)


@pytest.mark.parametrize(
    ("cgroup", "path", "text"),
    [
        ("0::/", "sys/fs/cgroup/memory.events", "low 0\noom 5\noom_kill 3\n"),
        ("0::/pod/of/the/host", "sys/fs/cgroup/memory.events", "oom_kill 3\n"),
        ("4:memory:/docker/ab\n0::/", "sys/fs/cgroup/memory/memory.oom_control", "under_oom 0\noom_kill 3\n"),
        ("4:memory:/user\n0::/", "sys/fs/cgroup/memory/user/memory.oom_control", "oom_kill 3\n"),
    ],
)
def test_kills_for_memory_are_counted_in_either_version_of_control_groups(tmp_path: Path, cgroup: str, path: str, text: str) -> None:
    for name, content in (("proc/self/cgroup", cgroup), ("proc/vmstat", "oom_kill 77\n"), (path, text)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert read_oom_kills(tmp_path) == 3
    (tmp_path / path).unlink()
    assert read_oom_kills(tmp_path) == 77, "of the machine"


ORPHAN = """
import ctypes, os, subprocess, sys, time
from trainer.supervisor import reap_orphans
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
fit = subprocess.Popen([sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '0.1'])"])
fit.wait()
fit = subprocess.Popen(["sleep", "30"])
time.sleep(0.5)
reap_orphans(fit.pid)
fit.kill()
time.sleep(0.2)
reap_orphans(fit.pid)
print(fit.wait())
try:
    os.waitpid(-1, os.WNOHANG)
    print("a child is left")
except ChildProcessError:
    print("none is left")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are handed to the first process, or on Linux to one that asks for them")
def test_orphans_are_taken_leave_of_and_the_fit_is_not() -> None:
    root = Path(__file__).parents[2]
    answer = subprocess.run([sys.executable, "-c", ORPHAN], cwd=root, capture_output=True, text=True, timeout=60, check=True)
    assert answer.stdout.split("\n")[:2] == ["-9", "none is left"]
