"""An attempt is closed once, whatever its job left."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks.attempts import Action, close, next_step_of, result_of
from blocks.errors import ResultMissing
from blocks.job import FailureReason, JobRef, JobState, JobStatus, Result
from blocks.providers.local_process import LocalProvider
from blocks.record import CancelRequest, RunRecord
from blocks.stalling import RESTART
from tests.unit.test_blocks_attempts import Ending, make_plan
from trainer.contract import AttemptLayout


@pytest.mark.parametrize(("manifest", "told"), [(None, "it wrote no manifest"), (b"{", "its manifest is damaged")])
def test_a_success_without_its_model_is_closed_as_a_failure(tmp_path: Path, manifest: bytes | None, told: str) -> None:
    """What is missing stays so: a run that is never closed could not be resumed or deleted either."""
    record = RunRecord(str(tmp_path), "bare1234")
    record.write_plan(make_plan(record))
    ref = JobRef(provider="local", native_id="x", run_id="bare1234", attempt=1, output_uri=record.attempt_uri(1), fingerprint="f")
    if manifest is not None:
        record.folder.put(f"attempts/1/{AttemptLayout.MANIFEST}", manifest)
    outcome = close(LocalProvider.from_settings({}), record, ref, JobStatus(state=JobState.SUCCEEDED))
    assert (outcome.state, outcome.reason, outcome.result) == (JobState.FAILED, FailureReason.UNKNOWN, None)
    assert told in outcome.message
    step = next_step_of(record, max_attempts=3)
    assert step.action is Action.DONE
    with pytest.raises(ResultMissing, match=told):
        result_of(record, step)
    assert next_step_of(record, max_attempts=3, resume=True).action is Action.START


class Done(Ending):
    """It was done when it was asked to stop."""

    def __init__(self, record: RunRecord) -> None:
        self.record, self.closed_when_cancelled = record, list[bool]()

    def collect(self, ref: JobRef, *, allow_partial: bool = False) -> Result:
        values = {"model_uri": "m", "manifest_uri": "m", "metrics": {}, "metrics_split": "test", "files": {}}
        return Result.model_validate({"outcome": "complete", **values, "best_epoch": 1, "epochs": 1, "duration_seconds": 1})

    def cancel(self, _ref: JobRef) -> None:
        self.closed_when_cancelled.append(self.record.outcome(1) is not None)


@pytest.mark.parametrize("stopped", ["as it stalled", "by a person, when it was done", ""])
def test_what_is_left_of_a_job_that_was_told_to_stop_is_cleared_away_without_a_receipt(tmp_path: Path, stopped: str) -> None:
    record = RunRecord(str(tmp_path), "left1234")
    record.write_plan(make_plan(record))
    ref = JobRef(provider="local", native_id="x", run_id="left1234", attempt=1, output_uri=record.attempt_uri(1), fingerprint="f")
    status = JobStatus(state=JobState.SUCCEEDED)
    if stopped == "as it stalled":
        record.add_event(RESTART, "no step for 300 s", attempt=1)
        status = JobStatus(state=JobState.CANCELLED, message="stopped as asked")
    elif stopped:
        record.request_cancel(CancelRequest(attempt=1, asked_by="me"))
    provider = Done(record)
    outcome = close(provider, record, ref, status)  # type: ignore[arg-type]
    assert outcome.state is (JobState.FAILED if stopped == "as it stalled" else JobState.SUCCEEDED)
    assert record.receipt(1) is None
    assert provider.closed_when_cancelled == ([True] if stopped else []), "once the record tells how it ended"
