"""What a run needs next, judged from its attempts, and how an attempt is closed. Nothing but the record decides."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from blocks.errors import JobFailed, ResultMissing, RunCancelled
from blocks.job import FailureReason, JobRef, JobState, JobStatus, Result
from blocks.provider import Provider
from blocks.record import Outcome, Receipt, RunRecord
from trainer.contract import EXIT_REASONS, TrainyardError


class Action(StrEnum):
    START = "start"  # a new attempt
    ADOPT = "adopt"  # an attempt is open: submit its stored plan again, or poll its job
    DONE = "done"  # nothing follows


@dataclass(frozen=True)
class Step:
    action: Action
    attempt: int
    why: str = ""


def next_step(outcomes: list[Outcome | None], *, max_attempts: int, resume: bool = False) -> Step:
    """What follows on attempts 1..n with these outcomes (None: still open).

    A new attempt follows only where the last one ended for a reason that another machine may cure, where
    attempts are left, and where the last two did not both end without a new epoch. `resume` is a person's wish
    to go on from a run that is over without success.
    """
    count = len(outcomes)
    if not outcomes:
        return Step(Action.START, 1)
    last = outcomes[-1]
    if last is None:
        return Step(Action.ADOPT, count)
    if last.state is JobState.SUCCEEDED:
        return Step(Action.DONE, count)
    if resume:
        return Step(Action.START, count + 1, "resumed by hand")
    if last.state is JobState.CANCELLED or last.reason is None or not last.reason.is_retryable:
        return Step(Action.DONE, count)
    if count >= max_attempts:
        return Step(Action.DONE, count, f"it was tried {count} times")
    epochs = [0, *(outcome.epoch for outcome in outcomes if outcome is not None)]
    if count >= 2 and epochs[-1] <= epochs[-2] <= epochs[-3]:
        return Step(Action.DONE, count, "two attempts in a row did not finish an epoch")
    return Step(Action.START, count + 1, f"attempt {count} ended: {last.reason.value}")


def next_step_of(record: RunRecord, *, max_attempts: int, resume: bool = False) -> Step:
    attempts = record.attempts()
    outcomes = [record.outcome(attempt) for attempt in attempts]
    if outcomes and outcomes[-1] is not None and record.cancel_request(attempts[-1]) is not None and not resume:
        return Step(Action.DONE, attempts[-1], "it was cancelled")
    return next_step(outcomes, max_attempts=max_attempts, resume=resume)


def close(provider: Provider[Any], record: RunRecord, ref: JobRef, status: JobStatus) -> Outcome:
    """Collects the result of a job that is over and writes down how the attempt ended.

    Several processes may do so at once, a flow and a `trainyard cancel`, say: the first outcome stands.
    """
    result = collect_what_there_is(provider, ref, status)
    asked = record.cancel_request(ref.attempt)
    if asked is not None and status.state is not JobState.SUCCEEDED:
        record.write_receipt(
            ref.attempt,
            Receipt(
                asked_by=asked.asked_by,
                asked_at=asked.asked_at,
                why=asked.why,
                state=status.state,
                native_id=ref.native_id,
                ended_at=status.ended_at or status.observed_at,
                cost_usd=status.cost_usd,
            ),
        )
    # Whatever ended it: after a person asked to stop, nothing follows.
    cancelled = asked is not None and status.state is not JobState.SUCCEEDED
    outcome = Outcome(
        state=JobState.CANCELLED if cancelled else status.state,
        reason=None if cancelled else status.reason,
        message=status.message,
        hint=status.hint,
        exit_code=status.exit_code,
        epoch=status.progress.epoch if status.progress else 0,
        result=result,
        status=status,
    )
    return record.write_outcome(ref.attempt, outcome)


def close_unsubmitted(
    record: RunRecord, attempt: int, *, state: JobState = JobState.CANCELLED, error: TrainyardError | None = None
) -> Outcome:
    """Closes an attempt that has a plan and no job: cancelled, or refused by the provider when it was submitted."""
    reason = EXIT_REASONS.get(error.code, FailureReason.UNKNOWN) if error is not None else None
    message, hint = (error.message, error.hint) if error is not None else ("cancelled before it was submitted", "")
    status = JobStatus(state=state, reason=reason, message=message, hint=hint, cost_usd=0.0)
    return record.write_outcome(attempt, Outcome(state=state, reason=reason, message=message, hint=hint, status=status))


def collect_what_there_is(provider: Provider[Any], ref: JobRef, status: JobStatus) -> Result | None:
    """The verified result of a success; of a job that was stopped or failed, its last good checkpoint, if it came so far."""
    if status.state is JobState.SUCCEEDED:
        return provider.collect(ref)
    try:
        return provider.collect(ref, allow_partial=True)
    except ResultMissing:
        return None


def result_of(record: RunRecord, step: Step) -> Result:
    """The result of a run that is over. Raises JobFailed or RunCancelled, with the reason, where it has none."""
    outcome = record.outcome(step.attempt)
    assert outcome is not None, "only a closed attempt is done"
    if outcome.state is JobState.SUCCEEDED and outcome.result is not None:
        return outcome.result
    if outcome.state is JobState.CANCELLED:
        asked = record.cancel_request(step.attempt)
        who = f" by {asked.asked_by}" if asked else ""
        raise RunCancelled(
            f"run {record.run_id} was cancelled{who} after epoch {outcome.epoch}", hint=f"`trainyard resume {record.run_id}`"
        )
    reason = outcome.reason or FailureReason.UNKNOWN
    tried = f" ({step.why})" if step.why else ""
    raise JobFailed(
        f"run {record.run_id} failed, {reason.value}: {outcome.message or 'no reason given'}{tried}",
        reason=reason,
        run_id=record.run_id,
        hint=outcome.hint or f"`trainyard logs {record.run_id}` shows what it did",
    )
