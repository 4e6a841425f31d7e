"""The only poll loop of the project. `next_delay` is pure; `watch` asks, tells its listener, and waits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from blocks.errors import ServiceUnavailable, TransientError
from blocks.job import JobRef, JobState, JobStatus
from blocks.provider import Provider
from blocks.record import RunRecord
from trainer.contract import utc_now

Listener = Callable[[JobStatus], None]

# The provider stops the job itself at its maximum run time; this is for a provider that did not.
DEADLINE_MARGIN_SECONDS = 300.0
MOST_FAILED_POLLS = 20


def next_delay(quiet_polls: int, failed_polls: int, bounds: tuple[float, float], jitter: float) -> float:
    """Seconds until the next observation. Pure: `jitter` is a random number in 0..1.

    From the shortest wait, growing by half with each observation that showed nothing new, to the longest;
    doubled with each that failed, to ten times the longest. A tenth more or less, so that many watchers spread.
    """
    shortest, longest = bounds
    delay = min(longest, shortest * 1.5 ** min(quiet_polls, 30))
    if failed_polls:
        delay = min(10 * longest, max(delay, 1.0) * 2.0 ** min(failed_polls, 10))
    return delay * (0.9 + 0.2 * jitter)


def watch(
    provider: Provider[Any],
    ref: JobRef,
    record: RunRecord,
    max_runtime_seconds: float,
    listener: Listener,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> JobStatus:
    """Observes the job until its state is terminal, and returns that status.

    Raises ServiceUnavailable where the provider did not answer for long, and whatever terminal error a poll
    raises. Whoever leaves this loop by an exception leaves the job running: a lost watcher never stops a job.
    """
    allowed = timedelta(seconds=max_runtime_seconds + DEADLINE_MARGIN_SECONDS)
    # Waiting for a machine costs nothing and is no run time: the clock starts when the job was first seen to have one.
    running_since: datetime | None = None
    quiet = failed = 0
    seen: tuple[object, ...] | None = None
    asked_to_stop = False
    while True:
        try:
            status = provider.poll(ref)
        except TransientError as exc:
            failed += 1
            if failed > MOST_FAILED_POLLS:
                raise ServiceUnavailable(f"{provider.NAME} did not answer {failed} times in a row: {exc.message}", hint=exc.hint) from exc
        else:
            failed = 0
            listener(status)
            if status.state.is_terminal:
                return status
            if running_since is None and status.state in (JobState.STARTING, JobState.RUNNING):
                running_since = utc_now()
            overdue = running_since is not None and utc_now() > running_since + allowed
            if not asked_to_stop and _must_stop(record, ref, status, overdue=overdue):
                provider.cancel(ref)
                asked_to_stop = True
            now_seen = (status.state, status.message, status.progress.epoch if status.progress else 0)
            quiet, seen = (quiet + 1, seen) if now_seen == seen else (0, now_seen)
        sleep(next_delay(quiet, failed, provider.CAPABILITIES.poll_seconds, random.random()))


def _must_stop(record: RunRecord, ref: JobRef, status: JobStatus, *, overdue: bool) -> bool:
    """Somebody's wish to cancel whose call to the provider was lost, or a job over its time."""
    if status.state is JobState.STOPPING:
        return False
    return overdue or record.cancel_request(ref.attempt) is not None
