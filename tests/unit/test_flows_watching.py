from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blocks.errors import JobNotFound, RateLimited, ServiceUnavailable
from blocks.job import JobRef, JobState, JobStatus
from blocks.record import CancelRequest, RunRecord
from flows.watching import DEADLINE_MARGIN_SECONDS, MOST_FAILED_POLLS, next_delay, watch
from trainer.contract import utc_now

BOUNDS = (1.0, 60.0)


def test_delay_grows_to_the_longest_and_stays() -> None:
    delays = [next_delay(quiet, 0, BOUNDS, 0.5) for quiet in range(40)]
    assert delays[0] == 1.0
    assert delays == sorted(delays)
    assert delays[-1] == 60.0


def test_delay_backs_off_when_throttled_and_never_stands_still() -> None:
    assert next_delay(0, 3, BOUNDS, 0.5) == 8.0
    assert next_delay(0, 50, BOUNDS, 0.5) == 600.0


def test_jitter_is_a_tenth() -> None:
    assert next_delay(0, 0, BOUNDS, 0.0) == pytest.approx(0.9)
    assert next_delay(0, 0, BOUNDS, 1.0) == pytest.approx(1.1)


class ScriptedProvider:
    """Answers polls from a script; the loop's behaviour is under test, not a provider's."""

    NAME = "scripted"
    CAPABILITIES = SimpleNamespace(poll_seconds=BOUNDS)

    def __init__(self, script: list[JobState | Exception]) -> None:
        self.script: Iterator[JobState | Exception] = iter(script)
        self.cancelled = 0

    def poll(self, _ref: JobRef) -> JobStatus:
        answer = next(self.script)
        if isinstance(answer, Exception):
            raise answer
        return JobStatus(state=answer)

    def cancel(self, _ref: JobRef) -> None:
        self.cancelled += 1


def observe(tmp_path: Path, provider: Any, *, max_runtime: float = 3600) -> tuple[list[JobState], list[float], RunRecord]:
    record = RunRecord(str(tmp_path), "watch1")
    ref = JobRef(
        provider="scripted",
        native_id="x",
        run_id="watch1",
        attempt=1,
        output_uri=tmp_path.as_uri(),
        fingerprint="",
        submitted_at=utc_now(),
    )
    states: list[JobState] = []
    sleeps: list[float] = []
    watch(provider, ref, record, max_runtime, lambda status: states.append(status.state), sleep=sleeps.append)
    return states, sleeps, record


def test_unknown_and_stopping_are_not_the_end(tmp_path: Path) -> None:
    script = [JobState.RUNNING, JobState.UNKNOWN, JobState.STOPPING, JobState.CANCELLED]
    states, sleeps, _ = observe(tmp_path, ScriptedProvider(list(script)))
    assert states == script
    assert len(sleeps) == 3


def test_throttling_is_waited_out(tmp_path: Path) -> None:
    script: list[JobState | Exception] = [*[RateLimited("slow down")] * MOST_FAILED_POLLS, JobState.SUCCEEDED]
    states, sleeps, _ = observe(tmp_path, ScriptedProvider(script))
    assert states == [JobState.SUCCEEDED]
    assert max(sleeps) > 300


def test_silence_for_long_is_an_error_that_stops_nothing(tmp_path: Path) -> None:
    provider = ScriptedProvider([RateLimited("slow down")] * (MOST_FAILED_POLLS + 1))
    with pytest.raises(ServiceUnavailable):
        observe(tmp_path, provider)
    assert provider.cancelled == 0


def test_terminal_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(JobNotFound):
        observe(tmp_path, ScriptedProvider([JobNotFound("gone")]))


def test_a_stored_wish_to_cancel_reaches_the_provider_once(tmp_path: Path) -> None:
    RunRecord(str(tmp_path), "watch1").request_cancel(CancelRequest(attempt=1, asked_by="me"))
    provider = ScriptedProvider([JobState.RUNNING, JobState.RUNNING, JobState.CANCELLED])
    observe(tmp_path, provider)
    assert provider.cancelled == 1


@pytest.mark.parametrize(("state", "cancels"), [(JobState.RUNNING, 1), (JobState.QUEUED, 0)])
def test_a_job_that_outlives_its_time_is_stopped_and_one_that_waits_is_not(tmp_path: Path, state: JobState, cancels: int) -> None:
    provider = ScriptedProvider([state, state, JobState.CANCELLED])
    observe(tmp_path, provider, max_runtime=-DEADLINE_MARGIN_SECONDS - 1)
    assert provider.cancelled == cancels
