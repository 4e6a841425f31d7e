from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from trainer.contract import ExitCode, FailureReason
from trainer.locks import is_held, try_lock
from trainer.supervisor import explain_exit


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
