"""The only poll loop of the project. `next_delay` is pure; `watch` asks, tells its listener, and waits.

`StallGuard` acts on what `blocks.stalling` judges. Whatever it decides is in the run's record before it is done, so
that another watcher sees it through.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

from blocks.attempts import DEADLINE
from blocks.errors import ProviderError, ServiceUnavailable, is_transient
from blocks.job import JobRef, JobState, JobStatus, WatchPolicy, seconds_between
from blocks.pending import PENDING_LIMIT, Limits, PendingJudge
from blocks.provider import Provider
from blocks.record import CancelRequest, RunRecord
from blocks.stalling import RECOVERED, RESTART, STALLED, Stall, StallJudge, as_restart, may_restart
from trainer.contract import TrainyardError, utc_now

Listener = Callable[[JobStatus], None]
Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]

# The provider stops the job itself at its maximum run time; this is for a provider that did not.
DEADLINE_MARGIN_SECONDS = 300.0
# An API server that is being replaced is away for minutes, and what others ask meanwhile is looked for after each failed poll.
LONGEST_FAILED_SECONDS = 60.0
MOST_FAILED_POLLS = 60  # about an hour
STALL_POLICY = "stall policy"  # who asked, where a stalled run is stopped


def next_delay(quiet_polls: int, failed_polls: int, bounds: tuple[float, float], jitter: float) -> float:
    """Seconds until the next observation. Pure: `jitter` is a random number in 0..1.

    From the shortest wait, growing by half with each observation that showed nothing new, to the longest;
    doubled with each that failed, to ten times the longest, a minute at most where that itself is shorter. A tenth
    more or less, so that many watchers spread.
    """
    shortest, longest = bounds
    delay = min(longest, shortest * 1.5 ** min(quiet_polls, 30))
    if failed_polls:
        bound = max(longest, min(10 * longest, LONGEST_FAILED_SECONDS))
        delay = min(bound, max(delay, 1.0) * 2.0 ** min(failed_polls, 10))
    return delay * (0.9 + 0.2 * jitter)


class StallGuard:
    """Tells the record of an attempt's stalls and of their end, once per cause whoever watches, and acts as the policy says."""

    def __init__(
        self,
        record: RunRecord,
        ref: JobRef,
        policy: WatchPolicy,
        longest_poll_seconds: float,
        logger: Logger,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record, self._ref, self._policy, self._logger, self._clock = record, ref, policy, logger, clock
        self._judge = StallJudge(policy, ref.submitted_at, longest_poll_seconds)
        told = [event for event in record.events() if event.data.get("attempt") == ref.attempt]
        self._told: dict[str, set[str]] = {STALLED: set(), RECOVERED: set(), RESTART: set()}
        for event in told:
            self._told.setdefault(event.kind, set()).add(str(event.data.get("cause")))
        self.restart_why = next((event.message for event in told if event.kind == RESTART), "")

    def observe(self, status: JobStatus) -> None:
        verdict = self._judge.observe(status, self._clock())
        if verdict.stall is not None:
            self._tell(STALLED, verdict.stall.cause, verdict.stall.message)
            self._act(verdict.stall)
        elif verdict.alive:
            for cause in sorted(self._told[STALLED] - self._told[RECOVERED]):
                self._tell(RECOVERED, cause, f"it goes on ({cause})")

    def _act(self, stall: Stall) -> None:
        attempt = self._ref.attempt
        if self._policy.on_stall == "stop" and self._record.cancel_request(attempt) is None:
            self._record.request_cancel(CancelRequest(attempt=attempt, asked_by=STALL_POLICY, why=stall.message))
        if self._policy.on_stall == "restart" and may_restart(stall.cause) and not self.restart_why:
            self._tell(RESTART, stall.cause, stall.message)
            self.restart_why = stall.message

    def _tell(self, kind: str, cause: str, message: str) -> None:
        if cause in self._told[kind]:
            return
        self._told[kind].add(str(cause))
        self._record.add_event(kind, message, attempt=self._ref.attempt, cause=str(cause))
        self._logger.warning("attempt %d, %s: %s", self._ref.attempt, kind, message)


class TimeLimits:
    """How long a job may wait, and how long run. Over a limit, the wish to stop it goes into the record."""

    def __init__(
        self, record: RunRecord, ref: JobRef, max_runtime_seconds: float, pending: Limits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._record, self._ref, self._seconds, self._clock = record, ref, max_runtime_seconds, clock
        self._pending = PendingJudge(pending)
        # Waiting for a machine costs nothing and is no run time, the first time and again: what counts is the time from one look
        # at a job that has one to the next.
        self._ran_seconds = 0.0
        self._seen_running: datetime | None = None

    def _add_run_time(self, status: JobStatus) -> None:
        if status.waiting is not None or status.state is JobState.QUEUED:
            self._seen_running = None
        elif status.state in (JobState.STARTING, JobState.RUNNING):  # others leave open whether it runs: the next look tells
            if self._seen_running is not None:
                self._ran_seconds += seconds_between(self._seen_running, status.observed_at)
            self._seen_running = status.observed_at

    def observe(self, status: JobStatus) -> None:
        self._add_run_time(status)
        gave_up = self._pending.observe(status, self._clock())
        if self._seen_running is not None and self._ran_seconds > self._seconds + DEADLINE_MARGIN_SECONDS:
            # A name that `blocks.attempts` knows as nobody's wish, so that the run ends as out of time, not as cancelled.
            self._stop(
                CancelRequest(attempt=self._ref.attempt, asked_by=DEADLINE, why=f"over its maximum run time of {self._seconds:.0f} s")
            )
        elif gave_up is not None:
            reason, message, hint = gave_up
            self._stop(CancelRequest(attempt=self._ref.attempt, asked_by=PENDING_LIMIT, why=message, reason=reason, hint=hint))

    def _stop(self, request: CancelRequest) -> None:
        if self._record.cancel_request(request.attempt) is None:
            self._record.request_cancel(request)


class Silence:
    """Looks that fail one after another. Told once each: that nobody sees the job, that a stop was asked for, and that it is seen again."""

    def __init__(self, record: RunRecord, ref: JobRef, listener: Listener) -> None:
        self._record, self._ref, self._listener = record, ref, listener
        self._seen = JobStatus(state=JobState.UNKNOWN)
        self._told: set[str] = set()

    def on_failure(self, exc: TrainyardError) -> bool:
        """Whether another process has closed the attempt meanwhile: nobody needs to see its job again."""
        try:
            self._tell("unseen", exc, "the training goes on, and is looked for again")
            if self._record.outcome(self._ref.attempt) is not None:
                return True
            if (asked := self._record.cancel_request(self._ref.attempt)) is not None:
                self._tell("unseen, to stop", exc, f"{asked.asked_by} asked for a stop, which the training itself looks for, too")
        except TrainyardError as further:  # the record's store does not answer either
            if not is_transient(further):
                raise
        return False

    def end(self, status: JobStatus) -> JobStatus:
        """What is told of a look that succeeded."""
        self._seen = status
        if not self._told:
            return status
        self._told.clear()
        return status.model_copy(update={"message": "; ".join(filter(None, ("the job is seen again", status.message)))})

    def _tell(self, native_state: str, exc: TrainyardError, meanwhile: str) -> None:
        if native_state in self._told:
            return
        told = {"native_state": native_state, "message": f"{exc.message}; {meanwhile}", "hint": exc.hint}
        self._listener(self._seen.model_copy(update={"state": JobState.UNKNOWN, "observed_at": utc_now(), **told}))
        self._told.add(native_state)


def watch(
    provider: Provider[Any],
    ref: JobRef,
    record: RunRecord,
    max_runtime_seconds: float,
    listener: Listener,
    guard: StallGuard,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> JobStatus | None:
    """Observes the job until its state is terminal, and returns that status; None where another closed the attempt while no look succeeded.

    Raises ServiceUnavailable where the provider or the record's store did not answer for long, and whatever terminal error a poll
    raises. Whoever leaves this loop by an exception leaves the job running: a lost watcher never stops a job.
    """
    limits = TimeLimits(record, ref, max_runtime_seconds, provider.pending_limits())
    silence = Silence(record, ref, listener)
    quiet = failed = 0
    seen: tuple[object, ...] | None = None
    asked_to_stop = False
    while True:
        try:
            status = provider.observe(ref)
            listener(silence.end(status))
            if status.state.is_terminal:
                return as_restart(status, guard.restart_why)
            limits.observe(status)
            guard.observe(status)
            if not asked_to_stop and _must_stop(record, ref, status, restart=bool(guard.restart_why)):
                provider.cancel(ref)
                asked_to_stop = True
        except TrainyardError as exc:  # of the provider, or of the store that keeps the record
            if not is_transient(exc):
                raise
            failed += 1
            if failed > MOST_FAILED_POLLS:
                who = provider.NAME if isinstance(exc, ProviderError) else "the store"
                raise ServiceUnavailable(f"{who} did not answer {failed} times in a row: {exc.message}", hint=exc.hint) from exc
            if silence.on_failure(exc):
                return None
        else:
            failed = 0
            now_seen = (status.state, status.message, status.progress.epoch if status.progress else 0)
            quiet, seen = (quiet + 1, seen) if now_seen == seen else (0, now_seen)
        sleep(next_delay(quiet, failed, provider.CAPABILITIES.poll_seconds, random.random()))


def _must_stop(record: RunRecord, ref: JobRef, status: JobStatus, *, restart: bool) -> bool:
    """A stored wish, of a person, the deadline or the stall policy; its call to the provider may have been lost."""
    if status.state is JobState.STOPPING:
        return False
    return restart or record.cancel_request(ref.attempt) is not None
