from __future__ import annotations

from pathlib import Path

import pytest

from blocks.attempts import Action, next_step, next_step_of
from blocks.job import FailureReason, JobSpec, JobState, Plan
from blocks.record import CancelRequest, Outcome, RunRecord
from trainer.contract import DatasetRef, TrainConfig

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


def make_plan(record: RunRecord) -> Plan:
    dataset = DatasetRef(root="/d", index_uri="file:///d", version="v", name="d", image_count=1)
    spec = JobSpec(
        run_id=record.run_id, name="n", config=TrainConfig(), dataset=dataset, output_uri=record.output_uri, max_runtime_seconds=60
    )
    return Plan(provider="local", spec=spec, instance_type="x", region="x", request={}, fingerprint="f")
