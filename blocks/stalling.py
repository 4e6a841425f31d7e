"""Whether a job stalls, judged by its steps and not by its epochs. Pure: observations and a clock in, a verdict out.

What the job does decides how long it may be silent:

=====================  =======================  ============================================================
it                     a sign of life is        it stalls after
=====================  =======================  ============================================================
trains                 a step                   ``stall_factor`` median steps, at least ``stall_min_seconds``
is between two epochs  any word: a validated    ``stall_factor`` of the last such pauses, at least
                       batch, a checkpoint      ``stall_min_seconds``; in the first epoch ``stall_phase_seconds``
prepares, evaluates    any word                 ``stall_phase_seconds``
waits for its machine  the trainer's first word ``queue_limit_seconds``
=====================  =======================  ============================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from blocks.job import FailureReason, JobState, JobStatus, WatchPolicy, seconds_between
from trainer.contract import STEPPING, Phase, Progress

STALLED = "stalled"
RECOVERED = "recovered"
RESTART = "stall-restart"  # the intent to stop this attempt so that the next one goes on from its checkpoint

# Weights that became NaN stay NaN; a single bad batch is skipped by mixed precision's scaler, say.
DIVERGED_STEPS = 5
# Before a new watcher, or one that slept, believes in a stall, it has itself seen no sign of life for so long.
CONFIRM_SECONDS = 30.0
CONFIRM_STEPS = 5
# A gap between two observations beyond the longest wait, and this, is a machine that slept: it counts for nothing.
GAP_SLACK_SECONDS = 10.0


class Cause(StrEnum):
    NO_STEP = "no-step"
    SILENT = "silent"
    NOT_STARTED = "not-started"
    DIVERGED = "diverged"


@dataclass(frozen=True)
class Stall:
    cause: Cause
    message: str


@dataclass(frozen=True)
class Verdict:
    stall: Stall | None = None
    alive: bool = False  # a sign of life was seen, so that what was told before is over


@dataclass(frozen=True)
class _Wait:
    """What is waited for now. Observations with the same `mark` are of a job that gave no sign of life between them."""

    mark: tuple[object, ...]
    cause: Cause
    limit: float | None
    since: datetime | None
    what: str
    pace: float = 0.0


def step_limit(policy: WatchPolicy, progress: Progress) -> float:
    """Seconds that a training may be silent now."""
    stepping = progress.phase is Phase.TRAINING and progress.activity == STEPPING
    usual = progress.step_seconds if stepping and progress.step_seconds is not None else progress.pause_seconds
    if progress.phase is not Phase.TRAINING or usual is None:
        return max(policy.stall_phase_seconds, policy.stall_min_seconds)
    return max(policy.stall_min_seconds, policy.stall_factor * usual)


def _describe_wait(status: JobStatus, policy: WatchPolicy, submitted_at: datetime) -> _Wait:
    progress = status.progress
    if status.state in (JobState.QUEUED, JobState.STARTING) and (progress is None or progress.phase is Phase.QUEUED):
        limit = policy.queue_limit_seconds
        return _Wait((Cause.NOT_STARTED,), Cause.NOT_STARTED, limit, submitted_at, "the job did not start")
    if progress is None:
        limit = max(policy.stall_phase_seconds, policy.stall_min_seconds)
        return _Wait(("no word",), Cause.SILENT, limit, status.started_at, "the trainer said nothing")
    limit = step_limit(policy, progress)
    if progress.phase is Phase.TRAINING and progress.activity == STEPPING:
        what = f"no training step after step {progress.step} of {progress.steps} in epoch {progress.epoch + 1}"
        if progress.step_seconds is not None:
            what += f", where a step takes {progress.step_seconds:.3g} s"
        # The step's time, not the file's: whatever else is told meanwhile is no step.
        mark = (progress.epoch, progress.step, progress.last_step_at)
        return _Wait(mark, Cause.NO_STEP, limit, progress.last_step_at, what, progress.step_seconds or 0.0)
    doing = (progress.phase is Phase.TRAINING and progress.activity) or progress.phase.value
    what = f"no sign of life while {doing}, after epoch {progress.epoch}"
    return _Wait((progress.updated_at,), Cause.SILENT, limit, progress.updated_at, what)


class StallJudge:
    """Judges one attempt's job by what one watcher sees of it.

    Time is the watcher's own: what passed between two observations, so that clocks of other machines do not matter.
    A new watcher, which has no history, takes the trainer's word for when the last step was, and confirms it.
    """

    def __init__(self, policy: WatchPolicy, submitted_at: datetime, longest_poll_seconds: float) -> None:
        self._policy = policy
        self._submitted_at = submitted_at
        self._longest_gap = 2 * longest_poll_seconds + GAP_SLACK_SECONDS
        self._mark: tuple[object, ...] | None = None
        self._seen_at: float | None = None
        self._silent = 0.0  # seconds without a sign of life
        self._watched = 0.0  # of these, seconds that were watched without a gap

    def observe(self, status: JobStatus, now: float) -> Verdict:
        """`now` in seconds of any clock that does not go back, best one that stands while the machine sleeps."""
        passed = 0.0 if self._seen_at is None else max(0.0, now - self._seen_at)
        self._seen_at = now
        if status.state.is_terminal or status.state in (JobState.STOPPING, JobState.UNKNOWN):
            return Verdict()
        wait = _describe_wait(status, self._policy, self._submitted_at)
        if self._mark is None:
            self._silent = seconds_between(wait.since, status.observed_at) if wait.since else 0.0
        elif wait.mark != self._mark:
            self._silent = self._watched = 0.0
        elif passed > self._longest_gap:
            self._watched = 0.0
        else:
            self._silent += passed
            self._watched += passed
        alive = self._mark is not None and wait.mark != self._mark
        self._mark = wait.mark
        return Verdict(self._judge(wait, status.progress), alive)

    def _judge(self, wait: _Wait, progress: Progress | None) -> Stall | None:
        if wait.limit is not None and self._silent > wait.limit:
            confirm = min(wait.limit, max(CONFIRM_SECONDS, CONFIRM_STEPS * wait.pace))
            if self._watched >= confirm:
                return Stall(wait.cause, f"{wait.what}, for {self._silent:.0f} s; the limit is {wait.limit:.0f} s")
        if progress is not None and progress.nonfinite_losses >= DIVERGED_STEPS:
            told = f"the loss is not a finite number, for {progress.nonfinite_losses} steps in a row (epoch {progress.epoch + 1})"
            return Stall(Cause.DIVERGED, f"{told}; a lower learning rate may help")
        return None


def may_restart(cause: Cause) -> bool:
    """Whether another attempt may do better. A training that diverged would diverge again from the same checkpoint."""
    return cause is not Cause.DIVERGED


def as_restart(status: JobStatus, why: str) -> JobStatus:
    """How the job of an attempt with a `RESTART` event ended: by that, so that another attempt follows, unless it ended by itself."""
    by_itself = status.state is JobState.SUCCEEDED or status.reason not in (None, FailureReason.PREEMPTED, FailureReason.INFRASTRUCTURE)
    if not why or not status.state.is_terminal or by_itself:
        return status
    message = f"{why}; stopped, to go on from the checkpoint"
    return status.model_copy(update={"state": JobState.FAILED, "reason": FailureReason.INFRASTRUCTURE, "message": message})
