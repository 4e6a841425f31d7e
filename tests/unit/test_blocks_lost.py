"""A run whose cluster is gone is closed when a person says so, and not otherwise. The cluster is a port where nobody listens."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from blocks.attempts import Action, next_step_of
from blocks.errors import ServiceUnavailable
from blocks.job import FailureReason, JobRef, JobState
from blocks.lost import status_of_lost
from blocks.record import RunRecord
from flows.cli import app
from tests.unit.test_blocks_attempts import make_plan
from tests.unit.test_blocks_record import run_file
from tests.unit.test_flows_cli_collect import end
from trainer.contract import AttemptLayout, ExitCode, ExitRecord, Phase, Progress, utc_now

pytest.importorskip("kubernetes")
GONE = "https://127.0.0.1:9"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    return tmp_path


def make_run(tmp_path: Path, provider: str = "kubernetes") -> RunRecord:
    record = RunRecord(str(tmp_path / "runs"), "done1234")
    settings = {"api_server": GONE} if provider == "kubernetes" else {}
    record.open(run_file(record.run_id).model_copy(update={"provider": provider, "settings": settings}))
    return record


def submit(record: RunRecord) -> None:
    record.write_plan(make_plan(record))
    job = {"provider": "kubernetes", "native_id": "ty-done1234-1", "run_id": record.run_id, "attempt": 1, "fingerprint": "f"}
    record.write_ref(JobRef.model_validate({**job, "output_uri": record.attempt_uri(1), "console_url": f"{GONE}/jobs/ty-done1234-1"}))


def test_a_run_of_a_cluster_that_is_gone_is_closed_by_whoever_says_so(tmp_path: Path) -> None:
    record = make_run(tmp_path)
    submit(record)
    progress = Progress(attempt=1, phase=Phase.TRAINING, epochs=5, epoch=2, updated_at=utc_now())
    record.folder.put(f"attempts/1/{AttemptLayout.PROGRESS}", progress.model_dump_json().encode())
    refused = CliRunner().invoke(app, ["cancel", "done"])
    assert isinstance(refused.exception, ServiceUnavailable)
    assert "trainyard cancel done1234 --lost" in refused.exception.hint
    assert record.outcome(1) is None

    done = CliRunner().invoke(app, ["cancel", "done", "--lost"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "is not known" in done.stdout
    assert f"{GONE}/jobs/ty-done1234-1" in done.stdout, "where somebody may look for it"
    outcome = record.outcome(1)
    assert outcome is not None
    assert outcome.status is not None
    assert (outcome.state, outcome.reason, outcome.epoch) == (JobState.FAILED, FailureReason.INFRASTRUCTURE, 2)
    assert (outcome.status.cost_usd, outcome.result, record.receipt(1)) == (None, None, None)
    assert f"{GONE} cannot be reached" in outcome.message
    assert next_step_of(record, max_attempts=3).action is Action.DONE, "no second job beside one that may run"
    assert next_step_of(record, max_attempts=3, resume=True).action is Action.START
    assert CliRunner().invoke(app, ["runs", "rm", "done", "--yes"]).exit_code == 0


def test_a_lost_run_that_was_never_seen_to_be_submitted_is_closed_too(tmp_path: Path) -> None:
    record = make_run(tmp_path)
    record.write_plan(make_plan(record))
    done = CliRunner().invoke(app, ["cancel", "done", "--lost"], catch_exceptions=False)
    assert "a job, if one was made," in done.stdout
    outcome = record.outcome(1)
    assert outcome is not None
    assert "checkpoint" not in outcome.hint, "none was ever written"
    assert outcome.state is JobState.FAILED


def test_a_lost_run_whose_result_is_all_there_has_succeeded(tmp_path: Path) -> None:
    record = make_run(tmp_path)
    end(record)
    assert CliRunner().invoke(app, ["cancel", "done", "--lost"]).exit_code == 0
    outcome = record.outcome(1)
    assert outcome is not None
    assert outcome.result is not None
    assert (outcome.state, outcome.result.outcome, outcome.result.cost_usd) == (JobState.SUCCEEDED, "complete", None)
    assert "what it cost is not known" in outcome.message


def test_a_lost_run_whose_trainer_told_why_it_failed_has_failed_of_that(tmp_path: Path) -> None:
    record = make_run(tmp_path)
    submit(record)
    told = {FailureReason.OUT_OF_MEMORY: ExitCode.OUT_OF_MEMORY, FailureReason.PREEMPTED: ExitCode.PREEMPTED}
    for attempt, (reason, code) in enumerate(told.items(), 1):
        ended = ExitRecord(exit_code=code, reason=reason, message="its word", started_at=utc_now(), ended_at=utc_now())
        record.folder.put(f"attempts/{attempt}/{AttemptLayout.EXIT}", ended.model_dump_json().encode())
    told_end = status_of_lost(record, 1, record.ref(1), ServiceUnavailable("no answer"), "me")
    assert (told_end.reason, told_end.message, told_end.cost_usd) == (FailureReason.OUT_OF_MEMORY, "its word", None)
    going_on = status_of_lost(record, 2, None, ServiceUnavailable("no answer"), "me")
    assert (going_on.reason, going_on.native_state) == (FailureReason.INFRASTRUCTURE, "lost"), "another container follows that code"


def test_a_provider_that_answers_is_asked_whatever_a_person_says(tmp_path: Path) -> None:
    record = make_run(tmp_path, "local")
    submit(record)
    stopped = ExitRecord(exit_code=130, cancelled=True, started_at=utc_now(), ended_at=utc_now())
    record.folder.put(f"attempts/1/{AttemptLayout.EXIT}", stopped.model_dump_json().encode())
    assert CliRunner().invoke(app, ["cancel", "done", "--lost"]).exit_code == 0
    outcome = record.outcome(1)
    assert outcome is not None
    assert outcome.state is JobState.CANCELLED
    assert record.receipt(1) is not None


def test_a_lost_run_whose_trainer_obeyed_a_wish_to_stop_is_cancelled_and_goes_on_when_resumed(tmp_path: Path) -> None:
    record = make_run(tmp_path)
    submit(record)
    hint = "a new attempt of the run goes on from there"
    ended = ExitRecord(exit_code=ExitCode.CANCELLED, cancelled=True, hint=hint, started_at=utc_now(), ended_at=utc_now())
    record.folder.put(f"attempts/1/{AttemptLayout.EXIT}", ended.model_dump_json().encode())
    assert CliRunner().invoke(app, ["cancel", "done", "--lost"], catch_exceptions=False).exit_code == 0
    outcome = record.outcome(1)
    assert outcome is not None
    assert (outcome.state, outcome.hint) == (JobState.CANCELLED, "`trainyard resume done1234` goes on with it")
