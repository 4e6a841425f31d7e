"""Whether a job has waited too long for its machine. Pure: observations and a clock in, a verdict out.

Two limits of the provider's settings: one for waits that end by themselves, as when a GPU becomes free, and a short one for what
only a person can mend, such as an image that is not there. A queue's wait (Kueue) is its owner's wish and has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from blocks.job import FailureReason, JobStatus, Waiting

PENDING_LIMIT = "pending limit"  # who asked, where a job that waited too long is stopped

Limits = Mapping[Waiting, float]  # seconds, by what is waited for; what is missing may be waited for any time


class GaveUp(NamedTuple):
    """Why it is stopped: the cause last seen."""

    reason: FailureReason
    message: str
    hint: str


class PendingJudge:
    """Judges one attempt's job by what one watcher sees of it, and by nothing before.

    How long it has waited since it was submitted says nothing: it may have been in a queue, or have trained on a machine that is gone.
    Too long a wait under many watchers in a row is ended by the job's own deadline.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._since: dict[Waiting, float] = {}
        self._cause: JobStatus | None = None  # the last that told one

    def observe(self, status: JobStatus, now: float) -> GaveUp | None:
        """`now` in seconds of any clock that does not go back."""
        if status.waiting is None:
            self._since.clear()
            self._cause = None
            return None
        self._since.setdefault(Waiting.MACHINE, now)
        if status.waiting is Waiting.MENDING:
            self._since.setdefault(Waiting.MENDING, now)
            self._cause = status
        elif Waiting.MENDING not in self._since:
            self._cause = status if status.reason is not None else self._cause
        elif self._cause is None or status.reason is not self._cause.reason:  # else the platform says less of the same for a moment
            del self._since[Waiting.MENDING]
            self._cause = status if status.reason is not None else None
        for what, limit in self._limits.items():
            if what in self._since and now - self._since[what] >= limit:
                return self._give_up(what, now - self._since[what], limit, status)
        return None

    def _give_up(self, what: Waiting, waited: float, limit: float, status: JobStatus) -> GaveUp:
        cause = self._cause or status
        reason = cause.reason or FailureReason.CAPACITY
        message = cause.message or "it did not start"
        if what is Waiting.MENDING:
            return GaveUp(reason, f"{message} (waiting does not mend it; stopped after {waited:.0f} s)", cause.hint)
        hint = f"{cause.hint}; or raise pending_limit_seconds" if cause.hint else "raise pending_limit_seconds, or ask for less"
        return GaveUp(reason, f"{message} (stopped after {waited:.0f} s without a machine; the limit is {limit:.0f} s)", hint)
