from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from blocks.driving import SILENCE_ALLOWED, Driver, announce, driven_runs, drivers, driving, is_alive
from blocks.errors import ServiceUnavailable
from blocks.record import RunRecord
from tests.unit.test_blocks_attempts import make_plan
from tests.unit.test_blocks_record import run_file
from trainer.contract import ExitCode, TrainerError, utc_now
from trainer.storage import ObjectFolder


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    return RunRecord(str(tmp_path / "runs"), "drive123")


def test_a_driver_that_ends_in_order_leaves_nothing(record: RunRecord, tmp_path: Path) -> None:
    with driving(record, "flow-1", deployed=True, max_attempts=3):
        assert [driver.flow_run_id for driver in drivers(record)] == ["flow-1"]
        assert [run.run_id for run in driven_runs()] == ["drive123"]
    assert driven_runs() == []
    assert not (tmp_path / "runs" / "drive123").exists()


def test_a_driver_that_is_busy_for_long_is_heard_of(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stages a large dataset or builds an image, say; on another machine only its word tells that it lives."""
    monkeypatch.setattr("blocks.driving.BEAT_SECONDS", 0.02)
    with driving(record, "flow-1", deployed=True, max_attempts=3):
        [first] = drivers(record)
        deadline = time.monotonic() + 10
        while drivers(record)[0].seen_at == first.seen_at:  # the slow stage, which calls nobody
            assert time.monotonic() < deadline
            time.sleep(0.01)
    time.sleep(0.1)
    assert not (record.folder.names("drivers")), "the last beat does not outlive the driver"


def test_a_store_that_is_away_ends_no_heartbeat(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.driving.BEAT_SECONDS", 0.02)
    failed = threading.Event()

    def away(self: RunRecord) -> ObjectFolder:
        if threading.current_thread() is not threading.main_thread() and not failed.is_set():
            failed.set()
            raise TrainerError("the store does not answer", code=ExitCode.UNAVAILABLE)
        return ObjectFolder(self.uri)

    with driving(record, "flow-1", deployed=True, max_attempts=3):
        [first] = drivers(record)
        monkeypatch.setattr(RunRecord, "folder", property(away))
        deadline = time.monotonic() + 10
        while drivers(record)[0].seen_at == first.seen_at:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert failed.is_set()


def test_a_refusal_leaves_nothing(record: RunRecord) -> None:
    with pytest.raises(ValueError, match="no such"), driving(record, "flow-1", deployed=True, max_attempts=3):
        raise ValueError("no such dataset")
    assert driven_runs() == []


@pytest.mark.parametrize("cause", [ServiceUnavailable("no answer"), KeyboardInterrupt()])
def test_an_open_run_stays_for_somebody_else(record: RunRecord, cause: BaseException) -> None:
    record.open(run_file("drive123"))
    record.write_plan(make_plan(record))
    with pytest.raises(type(cause)), driving(record, "flow-1", deployed=True, max_attempts=3):
        raise cause
    assert len(drivers(record)) == 1


def test_life_is_the_process_on_this_host_and_the_last_word_elsewhere() -> None:
    now = utc_now()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = Driver(flow_run_id="f", host=socket.gethostname(), pid=process.pid, pid_created_at=psutil.Process(process.pid).create_time())
    assert is_alive(here, now + timedelta(days=1))
    assert not is_alive(here.model_copy(update={"pid_created_at": 1.0}), now)
    process.communicate(b"\n")
    assert not is_alive(here, now)
    there = Driver(flow_run_id="f", host="elsewhere", pid=1, pid_created_at=1.0, seen_at=now)
    assert is_alive(there, now + SILENCE_ALLOWED / 2)
    assert not is_alive(there, now + SILENCE_ALLOWED * 2)


def test_an_announced_flow_run_has_no_process_yet(record: RunRecord) -> None:
    announce(record, "flow-2")
    [driver] = drivers(record)
    assert (driver.flow_run_id, is_alive(driver, utc_now())) == ("flow-2", False)
