from __future__ import annotations

from contextlib import nullcontext
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Running

from blocks.attempts import Action, Step
from blocks.driving import Driver
from blocks.job import FailureReason, JobRef, JobState, JobStatus
from blocks.providers.local_process import LocalProvider
from blocks.record import CancelRequest, RunRecord
from flows.reconcile import MOST_RESTARTS, Decision, Sight, decide
from tests.unit.test_blocks_pruning import ended as ended_as, make_run
from trainer.contract import utc_now

reconcile = import_module("flows.reconcile")
OPEN = Step(Action.ADOPT, 1)
OVER = Step(Action.DONE, 1)
MINUTE = timedelta(minutes=1)
STOPPING = {"driver_alive": True, "flow_state": StateType.CANCELLING}


def sight(**changes: Any) -> Sight:
    values: dict[str, Any] = {
        "step": OPEN,
        "has_record": True,
        "driver_alive": False,
        "driver_silent": MINUTE,
        "flow_state": StateType.CRASHED,
        "flow_state_age": MINUTE,
        "submitted": True,
        "cancel_asked": False,
        "restarts": 0,
        "in_vain": False,
    }
    return Sight(**{**values, **changes})


@pytest.mark.parametrize(
    ("what", "changes", "decision"),
    [
        ("somebody works on it", {"driver_alive": True, "flow_state": StateType.RUNNING}, Decision.LEAVE),
        ("the flow crashed", {}, Decision.RESTART),
        ("flow and worker were killed: a zombie", {"flow_state": StateType.RUNNING}, Decision.RESTART),
        ("the second report of the crash may be under way", {"flow_state_age": timedelta(seconds=5)}, Decision.LEAVE),
        ("its process is starting", {"flow_state": StateType.PENDING, "flow_state_age": MINUTE / 2}, Decision.LEAVE),
        ("its process has not written yet", {"flow_state": StateType.RUNNING, "flow_state_age": MINUTE / 2}, Decision.LEAVE),
        ("killed early", {"flow_state": StateType.RUNNING, "flow_state_age": MINUTE / 2, "driver_silent": MINUTE / 3}, Decision.RESTART),
        ("its process never started", {"flow_state": StateType.PENDING, "flow_state_age": 2 * MINUTE}, Decision.RESTART),
        ("over, repeated in vain", {"step": OVER, "restarts": MOST_RESTARTS}, Decision.FORGET),
        ("it waits for a worker", {"flow_state": StateType.SCHEDULED}, Decision.LEAVE),
        ("the provider did not answer for long", {"flow_state": StateType.FAILED}, Decision.RESTART),
        ("Prefect's database was wiped", {"flow_state": None}, Decision.RESTART),
        ("restarted often enough", {"restarts": MOST_RESTARTS}, Decision.TEND),
        ("cancelled in the UI, flow gone", {"flow_state": StateType.CANCELLING}, Decision.CANCEL),
        ("cancelled by Prefect's clean-up", {"flow_state": StateType.CANCELLED}, Decision.CANCEL),
        ("asked to stop on the command line, then all died", {"cancel_asked": True}, Decision.CANCEL),
        ("a cancel that Prefect is carrying out", STOPPING | {"flow_state_age": timedelta(seconds=9)}, Decision.LEAVE),
        ("a cancel that nobody carries out", STOPPING, Decision.CANCEL),
        ("over, and told so", {"step": OVER, "flow_state": StateType.COMPLETED}, Decision.FORGET),
        ("over, but its flow died before it said so", {"step": OVER}, Decision.RESTART),
        ("over, and a flow run that takes it up has nothing to do", {"step": OVER, "in_vain": True}, Decision.FORGET),
        ("the same, cancelled in the UI", {"step": OVER, "in_vain": True, "flow_state": StateType.CANCELLING}, Decision.CANCEL),
        ("killed long ago, before it spent anything", {"submitted": False, "driver_silent": timedelta(days=2)}, Decision.TEND),
        ("killed long ago, its job may be running", {"driver_silent": timedelta(days=2)}, Decision.CATCH_UP),
        ("killed long ago, restarted often enough", {"driver_silent": timedelta(days=2), "restarts": MOST_RESTARTS}, Decision.TEND),
        ("killed while it read the dataset", {"has_record": False, "submitted": False, "step": Step(Action.START, 1)}, Decision.RESTART),
    ],
)  # fmt: skip
def test_decide(what: str, changes: dict[str, Any], decision: Decision) -> None:
    assert decide(sight(**changes)) is decision, what


def test_one_damaged_record_does_not_keep_the_others_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    for run_id in ("aaaa1111", "bbbb2222"):
        record = RunRecord(str(tmp_path / "runs"), run_id)
        record.folder.put("run.json", b"{")
        record.folder.put(
            "drivers/x.json", Driver(flow_run_id=str(uuid4()), host="elsewhere", pid=1, pid_created_at=1.0).model_dump_json().encode()
        )
    monkeypatch.setattr(reconcile, "get_client", lambda **_: nullcontext())
    monkeypatch.setattr(reconcile, "learn_outputs", lambda _: [])
    monkeypatch.setattr(reconcile, "find_flow_run", lambda *_: None)
    monkeypatch.setattr(reconcile, "restart_unstarted", lambda _: [])
    told = reconcile.reconcile_pass()
    assert [line.split(":")[0] for line in told] == ["run aaaa1111", "run bbbb2222"]


@pytest.mark.parametrize("ended", [True, False])
def test_a_job_that_ended_while_nobody_looked_for_days_is_closed_and_followed_by_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    """It was killed on Friday, say, and removed when its time to live was over. One that still trains is watched again."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    record = make_run("late1234", tmp_path, None)
    job = {"provider": "local", "native_id": "x", "run_id": record.run_id, "attempt": 1, "fingerprint": "f"}
    record.write_ref(JobRef.model_validate({**job, "output_uri": record.attempt_uri(1)}))
    seen = {"flow_run_id": str(uuid4()), "host": "elsewhere", "pid": 1, "pid_created_at": 1.0, "seen_at": utc_now() - timedelta(days=3)}
    record.folder.put("drivers/x.json", Driver.model_validate(seen).model_dump_json().encode())
    monkeypatch.setattr(reconcile, "find_flow_run", lambda *_: None)
    monkeypatch.setattr(reconcile, "tell_news", lambda *_: True)
    monkeypatch.setattr(reconcile, "restart", lambda *_: (["restarted"], "its successor"))
    if not ended:
        monkeypatch.setattr(LocalProvider, "observe", lambda *_: JobStatus(state=JobState.RUNNING))
    told = [reconcile.reconcile_run(None, record) for _ in range(2)]
    assert told == ([["run late1234: closed, failed"], []] if ended else [["restarted"], ["restarted"]])
    outcome = record.outcome(1)
    assert (outcome.state if outcome else None) is (JobState.FAILED if ended else None)
    assert record.attempts() == [1]


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.FAILED, JobState.SUCCEEDED])
def test_no_other_flow_run_is_made_for_a_run_that_is_over_without_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: JobState, deployed: bool
) -> None:
    """Its command line was killed, and the run closed by `trainyard cancel`, say. A success gets its report; a flow run of a
    deployment is run again and then shown as what it is."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    record = make_run("over1234", tmp_path, ended_as(state, FailureReason.INFRASTRUCTURE if state is JobState.FAILED else None))
    if state is JobState.FAILED:
        record.add_event("lost", "closed as lost", attempt=1)
        record.request_cancel(CancelRequest(attempt=1, asked_by="me"))
    flow_run = FlowRun(flow_id=uuid4(), deployment_id=uuid4() if deployed else None, state=Running(timestamp=utc_now() - MINUTE * 5))
    driver = Driver(flow_run_id=str(flow_run.id), host="elsewhere", pid=1, pid_created_at=1.0, seen_at=utc_now() - MINUTE * 5)
    record.folder.put(f"drivers/{flow_run.id}.json", driver.model_dump_json().encode())
    settled: list[Decision] = []
    monkeypatch.setattr(reconcile, "find_flow_run", lambda *_: flow_run)
    monkeypatch.setattr(reconcile, "tell_news", lambda *_: True)
    monkeypatch.setattr(reconcile, "settle", lambda _client, _driver, decision: settled.append(decision))
    monkeypatch.setattr(reconcile, "restart", lambda *_: (["restarted"], "its successor"))
    reconcile.reconcile_run(None, record)
    goes_on = deployed or state is JobState.SUCCEEDED
    assert settled == [Decision.RESTART if goes_on else Decision.FORGET]
    assert not record.folder.names("drivers")
