"""An attempt is closed once, whatever its job left."""

from __future__ import annotations

from pathlib import Path

import pytest

from blocks.attempts import Action, close, next_step_of, result_of
from blocks.errors import ResultMissing
from blocks.job import FailureReason, JobRef, JobState, JobStatus
from blocks.providers.local_process import LocalProvider
from blocks.record import RunRecord
from tests.unit.test_blocks_attempts import make_plan
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
