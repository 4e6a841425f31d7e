from __future__ import annotations

import pytest

from blocks.job import FailureReason, JobState, JobStatus, Waiting
from blocks.pending import PendingJudge
from trainer.contract import utc_now

LIMITS = {Waiting.MENDING: 60.0, Waiting.MACHINE: 3600.0}
NOW = utc_now()


def waits(waiting: Waiting | None, reason: FailureReason | None = None, message: str = "") -> JobStatus:
    return JobStatus(state=JobState.QUEUED, waiting=waiting, reason=reason, message=message, hint=f"mend {message}", observed_at=NOW)


NO_IMAGE = waits(Waiting.MENDING, FailureReason.IMAGE, "no image")
BACK_OFF = waits(Waiting.MACHINE, FailureReason.IMAGE, "back-off")  # the same, in fewer words
NO_SECRET = waits(Waiting.MENDING, FailureReason.CONFIG, "no secret")
NO_GPU = waits(Waiting.MACHINE, FailureReason.CAPACITY, "no GPU")
ON_ITS_WAY = waits(Waiting.MACHINE)
RUNS = waits(None)

CASES: dict[str, tuple[list[tuple[float, JobStatus]], tuple[FailureReason, str] | None]] = {
    "what only a person mends ends soon": ([(0, NO_IMAGE), (60, NO_IMAGE)], (FailureReason.IMAGE, "no image")),
    "its cause is the one that says most": ([(0, NO_IMAGE), (30, BACK_OFF), (60, BACK_OFF)], (FailureReason.IMAGE, "no image")),
    "one cause after another": ([(0, NO_IMAGE), (30, NO_SECRET), (60, NO_SECRET)], (FailureReason.CONFIG, "no secret")),
    "mended in time": ([(0, NO_SECRET), (59, ON_ITS_WAY), (100, ON_ITS_WAY)], None),
    "mended, and broken again": ([(0, NO_SECRET), (59, ON_ITS_WAY), (100, NO_SECRET), (159, NO_SECRET)], None),
    "a machine is waited for longer": ([(0, NO_GPU), (3599, NO_GPU)], None),
    "but not for ever": ([(0, ON_ITS_WAY), (10, NO_GPU), (3600, NO_GPU)], (FailureReason.CAPACITY, "no GPU")),
    "the last cause is told": ([(0, NO_GPU), (3600, ON_ITS_WAY)], (FailureReason.CAPACITY, "no GPU")),
    "without any cause": ([(0, ON_ITS_WAY), (3600, ON_ITS_WAY)], (FailureReason.CAPACITY, "raise pending_limit_seconds")),
    "taken away, and waiting anew": ([(0, NO_GPU), (3000, RUNS), (3700, NO_GPU)], None),
    "in a queue": ([(0, RUNS), (99_999, RUNS)], None),
}


@pytest.mark.parametrize("case", CASES)
def test_which_waits_are_given_up(case: str) -> None:
    seen, expected = CASES[case]
    judge = PendingJudge(LIMITS)
    verdicts = [judge.observe(status, now) for now, status in seen]
    assert verdicts[:-1] == [None] * (len(seen) - 1)
    last = verdicts[-1]
    assert (last is None) == (expected is None)
    if last is not None and expected is not None:
        assert last.reason is expected[0]
        assert expected[1] in f"{last.message} {last.hint}"


def test_a_new_watcher_stops_nothing_for_what_was_before_it() -> None:
    """The job may have trained for hours, on a machine that is gone, or have waited in a queue."""
    assert PendingJudge(LIMITS).observe(NO_GPU, 99_999.0) is None
    assert PendingJudge({}).observe(NO_GPU, 99_999.0) is None


def test_at_once_where_the_limit_is_nothing() -> None:
    gave_up = PendingJudge({Waiting.MENDING: 0.0}).observe(NO_IMAGE, 0.0)
    assert gave_up is not None
    assert (gave_up.reason, gave_up.hint) == (FailureReason.IMAGE, "mend no image")
