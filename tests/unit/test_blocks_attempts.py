from __future__ import annotations

from pathlib import Path

import pytest

from blocks.attempts import (
    Action,
    ask_to_resume,
    cancel_run,
    close,
    find_wish,
    may_resume,
    next_step,
    next_step_of,
    result_of,
    take_back_resumes,
)
from blocks.errors import JobFailed, ResultMissing, RunCancelled
from blocks.job import FailureReason, JobRef, JobSpec, JobState, JobStatus, Plan, Result
from blocks.record import CancelRequest, Outcome, RunFile, RunRecord
from trainer.contract import DatasetRef, ExitCode, TrainConfig

DONE = Outcome(state=JobState.SUCCEEDED, epoch=5)
CANCELLED = Outcome(state=JobState.CANCELLED, epoch=2)


def failed(reason: FailureReason, epoch: int = 1) -> Outcome:
    return Outcome(state=JobState.FAILED, reason=reason, epoch=epoch)


PREEMPTED = failed(FailureReason.PREEMPTED)


@pytest.mark.parametrize(
    ("outcomes", "action", "attempt"),
    [
        ([], Action.START, 1),
        ([None], Action.ADOPT, 1),
        ([DONE], Action.DONE, 1),
        ([CANCELLED], Action.DONE, 1),
        ([PREEMPTED], Action.START, 2),
        ([failed(FailureReason.INFRASTRUCTURE)], Action.START, 2),
        ([failed(FailureReason.DATA)], Action.DONE, 1),
        ([failed(FailureReason.OUT_OF_MEMORY)], Action.DONE, 1),
        ([failed(FailureReason.TIMEOUT)], Action.DONE, 1),
        ([failed(FailureReason.UNKNOWN)], Action.DONE, 1),
        ([PREEMPTED, None], Action.ADOPT, 2),
        ([PREEMPTED, failed(FailureReason.PREEMPTED, 2)], Action.START, 3),
        ([PREEMPTED, PREEMPTED, failed(FailureReason.PREEMPTED, 3)], Action.DONE, 3),
        ([failed(FailureReason.INFRASTRUCTURE, 0), failed(FailureReason.INFRASTRUCTURE, 0)], Action.DONE, 2),
        ([failed(FailureReason.INFRASTRUCTURE, 0), failed(FailureReason.INFRASTRUCTURE, 1)], Action.START, 3),
    ],
)
def test_next_step(outcomes: list[Outcome | None], action: Action, attempt: int) -> None:
    step = next_step(outcomes, max_attempts=3)
    assert (step.action, step.attempt) == (action, attempt)


@pytest.mark.parametrize("outcome", [CANCELLED, failed(FailureReason.DATA)])
def test_a_person_may_resume_what_is_over(outcome: Outcome) -> None:
    assert next_step([outcome], max_attempts=1, resume=True).action is Action.START


def test_success_and_open_attempts_are_not_resumed() -> None:
    assert next_step([DONE], max_attempts=3, resume=True).action is Action.DONE
    assert next_step([None], max_attempts=3, resume=True).action is Action.ADOPT


def test_nothing_follows_an_attempt_that_a_person_wanted_stopped(tmp_path: Path) -> None:
    """However it ended: a machine that broke while it was asked to stop is no reason to train on."""
    record = RunRecord(str(tmp_path), "stop1234")
    plan = make_plan(record)
    record.write_plan(plan)
    record.write_outcome(1, failed(FailureReason.INFRASTRUCTURE))
    assert next_step_of(record, max_attempts=3).action is Action.START
    record.request_cancel(CancelRequest(attempt=1, asked_by="me"))
    assert next_step_of(record, max_attempts=3).action is Action.DONE
    assert next_step_of(record, max_attempts=3, resume=True).action is Action.START


def make_plan(record: RunRecord, attempt: int = 1) -> Plan:
    dataset = DatasetRef(root="/d", index_uri="file:///d", version="v", name="d", image_count=1)
    spec = JobSpec(
        run_id=record.run_id,
        attempt=attempt,
        name="n",
        config=TrainConfig(),
        dataset=dataset,
        output_uri=record.output_uri,
        max_runtime_seconds=60,
    )
    return Plan(provider="local", spec=spec, instance_type="x", region="x", request={}, fingerprint="f")


def make_run(record: RunRecord) -> RunFile:
    home = record.output_uri.removeprefix("file://")
    return RunFile(run_id=record.run_id, name="n", request={}, request_hash="", provider="local", settings={"home": home}, owner="me")


def test_a_wish_to_resume_is_good_for_one_attempt(tmp_path: Path) -> None:
    """The flow of `resume` is killed after its attempt ended, and runs again: no further attempt is paid for."""
    record = RunRecord(str(tmp_path), "resume12")
    record.write_plan(make_plan(record))
    assert may_resume(record, "flow-1")
    assert may_resume(record, "flow-1")  # killed before it planned
    record.write_plan(make_plan(record, 2))
    assert not may_resume(record, "flow-1")
    assert may_resume(record, "flow-2")


@pytest.mark.parametrize("planned", [False, True])
def test_a_cancel_stops_the_resumes_asked_before_it_and_none_asked_after_it(tmp_path: Path, planned: bool) -> None:
    """`planned`: the flow of the first resume has looked at its wish, and not yet submitted what it began."""
    record = RunRecord(str(tmp_path), "resume34")
    record.write_plan(make_plan(record))
    record.write_outcome(1, CANCELLED)
    record.request_cancel(CancelRequest(attempt=1, asked_by="me"))
    before = ask_to_resume(record)
    assert not planned or may_resume(record, before)
    assert take_back_resumes(record)
    assert not take_back_resumes(record), "once"
    assert cancel_run(record, asked_by="me") is not None
    if planned:
        record.write_plan(make_plan(record, 2))
        assert find_wish(record, 2) is not None
        return
    assert not may_resume(record, before)
    assert may_resume(record, ask_to_resume(record))
    record.write_plan(make_plan(record, 2))
    assert find_wish(record, 2) is None


def test_a_run_cancelled_while_it_is_prepared_is_never_planned(tmp_path: Path) -> None:
    record = RunRecord(str(tmp_path), "stop5678")
    assert cancel_run(record, asked_by="me") is None
    assert next_step_of(record, max_attempts=3).action is Action.DONE
    with pytest.raises(RunCancelled, match="before it was planned"):
        result_of(record, next_step_of(record, max_attempts=3))


class Ending:
    """A provider whose job is over with this status."""

    def collect(self, _ref: JobRef, *, allow_partial: bool = False) -> Result:
        raise ResultMissing("nothing there")


class Waited(Ending):
    def cancel(self, _ref: JobRef) -> None:
        """Nothing of it is left."""


def test_a_job_stopped_at_its_time_has_a_receipt_and_is_no_cancel(tmp_path: Path) -> None:
    record = RunRecord(str(tmp_path), "late1234")
    record.write_plan(make_plan(record))
    ref = JobRef(provider="local", native_id="x", run_id="late1234", attempt=1, output_uri=record.attempt_uri(1), fingerprint="f")
    status = JobStatus(state=JobState.FAILED, reason=FailureReason.TIMEOUT, message="stopped after 60 s")
    outcome = close(Ending(), record, ref, status)  # type: ignore[arg-type]
    assert (outcome.state, outcome.reason) == (JobState.FAILED, FailureReason.TIMEOUT)
    receipt = record.receipt(1)
    assert receipt is not None
    assert receipt.asked_by == "deadline"


def test_a_job_stopped_by_a_limit_failed_of_its_cause(tmp_path: Path) -> None:
    record = RunRecord(str(tmp_path), "wait1234")
    record.write_plan(make_plan(record))
    record.request_cancel(
        CancelRequest(attempt=1, asked_by="pending limit", why="no such image", reason=FailureReason.IMAGE, hint="push it")
    )
    ref = JobRef(provider="local", native_id="x", run_id="wait1234", attempt=1, output_uri=record.attempt_uri(1), fingerprint="f")
    outcome = close(Waited(), record, ref, JobStatus(state=JobState.CANCELLED, message="stopped as asked"))  # type: ignore[arg-type]
    assert (outcome.state, outcome.reason, outcome.message, outcome.hint) == (
        JobState.FAILED,
        FailureReason.IMAGE,
        "no such image",
        "push it",
    )
    assert next_step_of(record, max_attempts=3).action is Action.DONE
    with pytest.raises(JobFailed, match="image: no such image") as told:
        result_of(record, next_step_of(record, max_attempts=3))
    assert told.value.code is ExitCode.CONFIG
    assert "cancelled" not in told.value.message, "nobody did"


def test_a_stop_that_looks_like_a_preemption_is_told_as_cancelled_and_then_cleared_away(tmp_path: Path) -> None:
    """A container is told to end by the same signal, whoever wants it; the job goes when its receipt is written."""
    record = RunRecord(str(tmp_path), "stop9999")
    record.write_plan(make_plan(record))
    record.request_cancel(CancelRequest(attempt=1, asked_by="me"))
    ref = JobRef(provider="local", native_id="x", run_id="stop9999", attempt=1, output_uri=record.attempt_uri(1), fingerprint="f")
    cleared: list[bool] = []

    class Stopped(Ending):
        def cancel(self, _ref: JobRef) -> None:
            cleared.append(record.receipt(1) is not None)

    message, hint = "told to stop (SIGTERM)", "a new attempt of the run goes on from there"
    status = JobStatus(state=JobState.FAILED, reason=FailureReason.PREEMPTED, message=message, hint=hint)
    outcome = close(Stopped(), record, ref, status)  # type: ignore[arg-type]
    assert (outcome.state, outcome.reason) == (JobState.CANCELLED, None)
    assert outcome.status is not None
    assert (outcome.status.state, outcome.status.reason) == (JobState.CANCELLED, None)
    assert outcome.hint == outcome.status.hint == "`trainyard resume stop9999` goes on with it", "nothing does by itself"
    assert cleared == [True]


def test_a_wish_to_stop_reaches_the_attempt_that_is_planned_meanwhile(tmp_path: Path) -> None:
    """The attempt before it is over, so that nothing would seem to follow."""

    class Planned(RunRecord):
        def request_cancel(self, request: CancelRequest) -> None:
            super().request_cancel(request)
            self.write_plan(make_plan(self, 2))

    record = Planned(str(tmp_path), "stop2222")
    record.write_plan(make_plan(record))
    record.write_outcome(1, PREEMPTED)
    record.open(make_run(record))
    outcome = cancel_run(record, asked_by="me")
    assert outcome is not None
    assert (outcome.state, record.outcome(2)) == (JobState.CANCELLED, outcome)


def test_an_attempt_planned_after_the_wish_is_meant_unless_a_person_resumed(tmp_path: Path) -> None:
    record = RunRecord(str(tmp_path), "stop3333")
    for attempt in (1, 2):
        record.write_plan(make_plan(record, attempt))
        assert find_wish(record, attempt) is None
    record.request_cancel(CancelRequest(attempt=2, asked_by="me"))
    for attempt, asked_by in ((2, "me"), (3, "me"), (4, None)):
        assert getattr(find_wish(record, attempt), "asked_by", None) == asked_by
    assert may_resume(record, "flow-1")
    assert find_wish(record, 3) is None
    record.request_cancel(CancelRequest(attempt=3, asked_by="me"))
    assert find_wish(record, 3) is not None
