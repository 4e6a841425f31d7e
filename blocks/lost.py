"""Closing a run whose job nobody can ask about any more: its cluster was deleted, say, or its account closed.

Only a person says so, by `trainyard cancel --lost`. Of the job only what the record holds is then known: not whether it still
runs, and not what it cost.
"""

from __future__ import annotations

from blocks.attempt_objects import parse_exit, read_exit, read_progress
from blocks.attempts import cancel_run, hint_of_cancelled, provider_of
from blocks.errors import AuthError, ConfigError, ProviderError, ResultMissing, ServiceUnavailable
from blocks.job import FailureReason, JobRef, JobState, JobStatus, Result
from blocks.record import Outcome, RunRecord
from trainer.contract import FATAL_EXITS
from trainer.storage import ObjectFolder

LOST = "lost"
# What a provider raises that could not be asked; one that has too much to do could.
CANNOT_ASK = (ServiceUnavailable, AuthError, ConfigError)


def stop_run(record: RunRecord, *, asked_by: str, why: str = "", lost: bool = False) -> Outcome | None:
    """As `cancel_run`. Where the provider cannot be asked, the run is closed all the same if it is said to be `lost`.

    What is raised otherwise says that the wish stands: the trainer reads it where it writes its checkpoints.
    """
    try:
        return cancel_run(record, asked_by=asked_by, why=why)
    except CANNOT_ASK as exc:
        if lost:
            return close_lost(record, exc, asked_by=asked_by)
        closes = f"`trainyard cancel {record.run_id} --lost` closes the run"
        exc.message = f"{exc.message}; the wish to stop is in the run's record, and the training itself looks for it"
        if isinstance(exc, AuthError):
            exc.hint = f"get a new login first: {exc.hint}; where there is none to be had any more, {closes}"
        else:
            exc.hint = f"{exc.hint}; where it is gone for good, {closes}"
        raise


def close_lost(record: RunRecord, cause: ProviderError, *, asked_by: str) -> Outcome:
    """Closes the latest attempt: a success, if its verified result is all there, else the failure that its trainer told, or a lost job.

    What it cost is not known, and it has no receipt, which proves a stop.
    """
    attempt = record.attempts()[-1]
    ref = record.ref(attempt)
    status = status_of_lost(record, attempt, ref, cause, asked_by)
    result = _result_of_lost(record, ref, status) if ref is not None else None
    if result is not None and result.outcome == "complete":
        told = f"its result is all there; what it cost is not known, since {cause.message}"
        status = status.model_copy(update={"state": JobState.SUCCEEDED, "reason": None, "message": told, "hint": ""})
    record.add_event(LOST, status.message, attempt=attempt)
    return record.write_outcome(attempt, Outcome.of(status, result))


def status_of_lost(record: RunRecord, attempt: int, ref: JobRef | None, cause: ProviderError, asked_by: str) -> JobStatus:
    """What the record knows of a job that cannot be asked, and what nobody does."""
    objects = ObjectFolder(record.attempt_uri(attempt), record.access.resolve(record.uri))
    ended, progress = read_exit(objects), read_progress(objects)
    if ended is not None and ended.exit_code in FATAL_EXITS:
        told = parse_exit(ended, progress)  # the trainer's own word, which no container of its attempt would have changed
        return told if told.state is not JobState.CANCELLED else told.model_copy(update={"hint": hint_of_cancelled(record.run_id)})
    job = f"job {ref.native_id}" if ref is not None else "a job, if one was made,"
    where = f" (made as {ref.console_url})" if ref is not None and ref.console_url else ""
    return JobStatus(
        state=JobState.FAILED,
        native_state=LOST,
        reason=FailureReason.INFRASTRUCTURE,
        message=f"closed as lost by {asked_by}; whether {job} still runs, and what it cost, is not known: {cause.message}",
        hint=f"see that {job} is gone{where}; then `trainyard resume {record.run_id}` goes on with the run",
        progress=progress,
        started_at=ended.started_at if ended is not None else None,
        ended_at=ended.ended_at if ended is not None else progress.updated_at if progress is not None else None,
    )


def _result_of_lost(record: RunRecord, ref: JobRef, status: JobStatus) -> Result | None:
    try:
        return provider_of(record).collect(ref, allow_partial=True, status=status)
    except ResultMissing:
        return None
