"""What a run needs next, judged from its attempts, and how an attempt is closed. Nothing but the record decides."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from blocks import load_provider
from blocks.errors import JobFailed, ResultMissing, RunCancelled
from blocks.job import FailureReason, JobRef, JobState, JobStatus, Result
from blocks.provider import Provider
from blocks.record import CancelRequest, Outcome, Receipt, RunRecord
from blocks.stalling import RESTART, as_restart
from trainer.contract import EXIT_REASONS, ExitCode, TrainyardError

# Prefect kills a flow that it cancels after 30 s; within this time a job must be over, or is told to be late.
STOP_WAIT_SECONDS = 20.0
STOP_LOOK_SECONDS = 0.3
DEADLINE = "deadline"  # who asked, where nobody did
RESUMES = "resumes"  # an object for each wish of a person who resumes: the number of the attempt that it may begin
TAKEN_BACK = b"0"


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
    if not attempts and record.cancel_request(1) is not None:
        return Step(Action.DONE, 0, "it was cancelled before it was planned")
    if outcomes and outcomes[-1] is not None and (asked := record.cancel_request(attempts[-1])) is not None and not resume:
        by_a_limit = asked.reason is not None or asked.asked_by == DEADLINE  # which the outcome tells
        return Step(Action.DONE, attempts[-1], "" if by_a_limit else "it was cancelled")
    return next_step(outcomes, max_attempts=max_attempts, resume=resume)


def provider_of(record: RunRecord) -> Provider[Any]:
    """The provider that runs it, with the settings it was begun with; it reaches the record as the caller does."""
    run = record.run()
    return load_provider(run.provider, run.settings, record.access)


def ask_to_resume(record: RunRecord) -> str:
    """Writes the wish down when a person has it, since its flow may begin half a minute later. Returns what it is called."""
    wish = secrets.token_hex(8)
    may_resume(record, wish)
    return wish


def take_back_resumes(record: RunRecord) -> bool:
    """Whether there were wishes to resume that have not begun their attempt: these now begin none. One that is asked later stands.

    To be called before `cancel_run`, which then sees the attempt that a flow planned before it saw this.
    """
    count = len(record.attempts())
    names = [f"{RESUMES}/{name}" for name in record.folder.names(RESUMES)]
    standing = [name for name in names if int(record.folder.get(name) or TAKEN_BACK) > count]
    for name in standing:
        record.folder.put(name, TAKEN_BACK)
    return bool(standing)


def may_resume(record: RunRecord, wish: str) -> bool:
    """Whether this wish to resume still stands: it is good for one attempt, however often its flow is repeated.

    `wish` is that of `ask_to_resume`, or the id of a flow run that was started in Prefect.
    """
    attempts = record.attempts()
    name = f"{RESUMES}/{wish}"
    record.folder.create(name, str(len(attempts) + 1).encode())
    return len(attempts) < int(record.folder.get(name) or b"0")


def find_wish(record: RunRecord, attempt: int) -> CancelRequest | None:
    """Who wants an attempt that is not submitted stopped: also who meant the one before it, when this one was about to be planned.

    One that a person began by `resume` is not meant by what stopped the one before.
    """
    asked = record.cancel_request(attempt)
    if asked is None and attempt > 1 and (asked := record.cancel_request(attempt - 1)) is not None:
        wishes = (record.folder.get(f"{RESUMES}/{name}") for name in record.folder.names(RESUMES))
        return None if str(attempt).encode() in wishes else asked
    return asked


def close(provider: Provider[Any], record: RunRecord, ref: JobRef, status: JobStatus) -> Outcome:
    """Collects the result of a job that is over and writes down how the attempt ended.

    Several processes may do so at once, a flow and a `trainyard cancel`, say: the first outcome stands.
    """
    # A policy that restarts stalled jobs had this one stopped, whoever closes it now.
    restarts = (event for event in record.events() if event.kind == RESTART and event.data.get("attempt") == ref.attempt)
    restart_why = next((event.message for event in restarts), "")
    status = as_restart(status, restart_why)
    result, status = collect_what_there_is(provider, ref, status)
    wish = asked = record.cancel_request(ref.attempt)
    succeeded = status.state is JobState.SUCCEEDED
    if asked is None and status.reason is FailureReason.TIMEOUT:
        # The provider itself held the job to its time: a stop like any other, with a receipt.
        ended = status.ended_at or status.observed_at
        asked = CancelRequest(attempt=ref.attempt, asked_by=DEADLINE, why=status.message, asked_at=ended)
    if asked is not None and not succeeded:
        # Whatever ended it, a pod that was pre-empted, say: after a wish to stop, nothing follows.
        status = status.model_copy(update=end_of(asked, record.run_id))
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
        if wish is not None:
            provider.cancel(ref)  # over, and proven: what is left of the job may go
    closed = record.write_outcome(ref.attempt, Outcome.of(status, result))
    if restart_why or (wish is not None and succeeded):
        provider.cancel(ref)  # told to stop as well, and without a receipt: the outcome proves that it is over
    return closed


def cancel_run(
    record: RunRecord,
    *,
    asked_by: str,
    why: str = "",
    wait_seconds: float = STOP_WAIT_SECONDS,
    sleep: Callable[[float], None] = time.sleep,
) -> Outcome | None:
    """Stops the run: the intent first, then the asking, then the proof (terminal state, partial result, receipt).

    None where nothing is over yet: the run prepares its first attempt, which will then not be submitted, or the
    job did not end within `wait_seconds`; the intent stands, and whoever watches the run sees it through.
    Repeating it is fine, and so is another process doing the same.
    """
    while True:
        attempts = record.attempts()
        attempt = attempts[-1] if attempts else 1
        if attempts and (ended := record.outcome(attempt)) is not None and ended.state is JobState.SUCCEEDED:
            return ended
        record.request_cancel(CancelRequest(attempt=attempt, asked_by=asked_by, why=why))
        # A flow may have planned the next attempt meanwhile. It looks for the wish after that, so that one of the two sees the other.
        if record.attempts() == attempts:
            break
    if not attempts:
        return None
    if (ended := record.outcome(attempt)) is not None:  # between two attempts: nothing runs, and now nothing follows
        return ended
    ref = record.ref(attempt)
    if ref is None:
        return cancel_unsubmitted(provider_of(record), record, attempt)
    provider = provider_of(record)
    provider.cancel(ref)
    deadline = time.monotonic() + wait_seconds
    while True:
        status = provider.observe(ref)
        if status.state.is_terminal:
            return close(provider, record, ref, status)
        if time.monotonic() > deadline:
            return None
        sleep(STOP_LOOK_SECONDS)


def cancel_unsubmitted(provider: Provider[Any], record: RunRecord, attempt: int) -> Outcome | None:
    """A plan without a recorded job."""
    ref = find_job(provider, record, attempt)
    if ref is None:
        return close_unsubmitted(record, attempt)
    provider.cancel(ref)
    status = provider.observe(ref)
    return close(provider, record, ref, status) if status.state.is_terminal else None


def find_job(provider: Provider[Any], record: RunRecord, attempt: int) -> JobRef | None:
    """The attempt's job. Where none is recorded the provider is asked: a submitter may have died, or lost its login, before it wrote."""
    plan, ref = record.plan(attempt), record.ref(attempt)
    if ref is None and plan is not None and (ref := provider.find(plan)) is not None:
        record.write_ref(ref)
    return ref


def close_unsubmitted(
    record: RunRecord, attempt: int, *, state: JobState = JobState.CANCELLED, error: TrainyardError | None = None
) -> Outcome:
    """Closes an attempt that has a plan and no job: cancelled, or refused by the provider when it was submitted."""
    reason = EXIT_REASONS.get(error.code, FailureReason.UNKNOWN) if error is not None else None
    message, hint = (error.message, error.hint) if error is not None else ("cancelled before it was submitted", "")
    status = JobStatus(state=state, reason=reason, message=message, hint=hint, cost_usd=0.0)
    return record.write_outcome(attempt, Outcome(state=state, reason=reason, message=message, hint=hint, status=status))


def end_of(asked: CancelRequest, run_id: str) -> dict[str, Any]:
    """What a job's status becomes by that wish to stop it: cancelled, or failed by a limit."""
    if asked.asked_by == DEADLINE:
        return {"state": JobState.FAILED, "reason": FailureReason.TIMEOUT}
    if asked.reason is None:
        return {"state": JobState.CANCELLED, "reason": None, "hint": hint_of_cancelled(run_id)}
    return {"state": JobState.FAILED, "reason": asked.reason, "message": asked.why, "hint": asked.hint}


def hint_of_cancelled(run_id: str) -> str:
    """In place of the trainer's, which says that the run goes on by itself: so it does where the signal came from a machine that goes."""
    return f"`trainyard resume {run_id}` goes on with it"


def collect_what_there_is(provider: Provider[Any], ref: JobRef, status: JobStatus) -> tuple[Result | None, JobStatus]:
    """The verified result of a success; of a job that was stopped or failed, its last good checkpoint, if it came so far.

    A success whose result is missing or damaged is none, and stays so: the status that is returned says it.
    """
    if status.state is JobState.SUCCEEDED:
        try:
            return provider.collect(ref), status
        except ResultMissing as exc:
            told = {"message": exc.message, "hint": exc.hint, "exit_code": int(exc.code)}
            status = status.model_copy(update={"state": JobState.FAILED, "reason": FailureReason.UNKNOWN, **told})
    try:
        return provider.collect(ref, allow_partial=True), status
    except ResultMissing:
        return None, status


def result_of(record: RunRecord, step: Step) -> Result:
    """The result of a run that is over. Raises JobFailed, ResultMissing or RunCancelled, with the reason, where it has none."""
    outcome = record.outcome(step.attempt) if step.attempt else None
    if outcome is None and step.attempt == 0:
        raise RunCancelled(f"run {record.run_id} was cancelled before it was planned", hint="start it again; nothing was spent")
    assert outcome is not None, "only a closed attempt is done"
    if outcome.state is JobState.SUCCEEDED and outcome.result is not None:
        return outcome.result
    if outcome.state is JobState.CANCELLED:
        asked = record.cancel_request(step.attempt)
        who = f" by {asked.asked_by}" if asked else ""
        raise RunCancelled(
            f"run {record.run_id} was cancelled{who} after epoch {outcome.epoch}", hint=f"`trainyard resume {record.run_id}`"
        )
    if outcome.exit_code == ExitCode.RESULT_MISSING:
        raise ResultMissing(outcome.message, run_id=record.run_id, hint=outcome.hint)
    reason = outcome.reason or FailureReason.UNKNOWN
    tried = f" ({step.why})" if step.why else ""
    raise JobFailed(
        f"run {record.run_id} failed, {reason.value}: {outcome.message or 'no reason given'}{tried}",
        reason=reason,
        run_id=record.run_id,
        hint=outcome.hint or f"`trainyard logs {record.run_id}` shows what it did",
    )
