from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.client.schemas.objects import TaskRun
from prefect.states import Failed

from blocks.attempts import DEADLINE
from blocks.errors import JobNotFound, RateLimited, ServiceUnavailable
from blocks.job import FailureReason, JobRef, JobState, JobStatus, Waiting, WatchPolicy
from blocks.pending import PENDING_LIMIT
from blocks.record import CancelRequest, Outcome, RunRecord
from flows.display import TrainingDisplay
from flows.job_tasks import ON_RETRY, _is_transient
from flows.watching import DEADLINE_MARGIN_SECONDS, MOST_FAILED_POLLS, STALL_POLICY, StallGuard, TimeLimits, next_delay, watch
from trainer.contract import STEPPING, Phase, Progress, utc_now

BOUNDS = (1.0, 60.0)
LOG = logging.getLogger(__name__)


def test_delay_grows_to_the_longest_and_stays() -> None:
    delays = [next_delay(quiet, 0, BOUNDS, 0.5) for quiet in range(40)]
    assert delays[0] == 1.0
    assert delays == sorted(delays)
    assert delays[-1] == 60.0


def test_delay_backs_off_when_throttled_and_never_stands_still() -> None:
    assert next_delay(0, 3, BOUNDS, 0.5) == 8.0
    assert next_delay(0, 50, BOUNDS, 0.5) == next_delay(30, 50, (1.0, 30.0), 0.5) == 60.0, "an outage is not followed by a longer one"


def test_jitter_is_a_tenth() -> None:
    assert next_delay(0, 0, BOUNDS, 0.0) == pytest.approx(0.9)
    assert next_delay(0, 0, BOUNDS, 1.0) == pytest.approx(1.1)


class ScriptedProvider:
    """Answers polls from a script; the loop's behaviour is under test, not a provider's."""

    NAME = "scripted"
    CAPABILITIES = SimpleNamespace(poll_seconds=BOUNDS)

    def __init__(self, script: Sequence[JobState | JobStatus | Exception]) -> None:
        self.script: Iterator[JobState | JobStatus | Exception] = iter(script)
        self.cancelled = 0
        self.limits: dict[Waiting, float] = {}

    def pending_limits(self) -> dict[Waiting, float]:
        return self.limits

    def observe(self, _ref: JobRef) -> JobStatus:
        answer = next(self.script)
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, JobStatus) else JobStatus(state=answer)

    def cancel(self, _ref: JobRef) -> None:
        self.cancelled += 1


def make_ref(tmp_path: Path) -> JobRef:
    return JobRef(
        provider="scripted",
        native_id="x",
        run_id="watch1",
        attempt=1,
        output_uri=tmp_path.as_uri(),
        fingerprint="",
        submitted_at=utc_now(),
    )


def observe(tmp_path: Path, provider: Any, *, max_runtime: float = 3600) -> tuple[list[JobState], list[float], RunRecord]:
    record = RunRecord(str(tmp_path), "watch1")
    ref = make_ref(tmp_path)
    guard = StallGuard(record, ref, WatchPolicy(), BOUNDS[1], LOG)
    states: list[JobState] = []
    sleeps: list[float] = []
    watch(provider, ref, record, max_runtime, lambda status: states.append(status.state), guard, sleep=sleeps.append)
    return states, sleeps, record


def test_unknown_and_stopping_are_not_the_end(tmp_path: Path) -> None:
    script = [JobState.RUNNING, JobState.UNKNOWN, JobState.STOPPING, JobState.CANCELLED]
    states, sleeps, _ = observe(tmp_path, ScriptedProvider(list(script)))
    assert states == script
    assert len(sleeps) == 3


def test_throttling_is_waited_out(tmp_path: Path) -> None:
    script: list[JobState | Exception] = [*[RateLimited("slow down")] * MOST_FAILED_POLLS, JobState.SUCCEEDED]
    states, sleeps, _ = observe(tmp_path, ScriptedProvider(script))
    assert states == [JobState.UNKNOWN, JobState.SUCCEEDED]
    assert 30 * 60 < sum(sleeps) < 2 * 3600


def test_silence_for_long_is_an_error_that_stops_nothing(tmp_path: Path) -> None:
    provider = ScriptedProvider([RateLimited("slow down")] * (MOST_FAILED_POLLS + 1))
    with pytest.raises(ServiceUnavailable):
        observe(tmp_path, provider)
    assert provider.cancelled == 0


def test_who_watches_is_told_of_a_silence_once_of_its_end_and_of_what_others_ask(tmp_path: Path) -> None:
    running = step(3, epoch=2)
    provider: Any = ScriptedProvider([running, *[ServiceUnavailable("no answer")] * 3, running, running, JobState.SUCCEEDED])
    record, ref = RunRecord(str(tmp_path), "watch1"), make_ref(tmp_path)
    told: list[JobStatus] = []
    waits = 0

    def sleep(_: float) -> None:
        nonlocal waits
        waits += 1
        if waits == 3:
            record.request_cancel(CancelRequest(attempt=1, asked_by="ada"))

    watch(provider, ref, record, 3600, told.append, StallGuard(record, ref, WatchPolicy(), BOUNDS[1], LOG), sleep=sleep)
    seen, silent, asked, back, *_ = told
    assert [status.state for status in told[:5]] == [seen.state, JobState.UNKNOWN, JobState.UNKNOWN, seen.state, seen.state]
    assert silent.message.startswith("no answer; the training goes on")
    assert silent.progress == seen.progress
    assert "ada" in asked.message
    assert "seen again" in back.message
    assert not told[4].message
    assert provider.cancelled == 1


def test_a_run_that_another_closed_during_a_silence_is_watched_no_longer(tmp_path: Path) -> None:
    provider: Any = ScriptedProvider([ServiceUnavailable("no answer")] * 3)
    record, ref = RunRecord(str(tmp_path), "watch1"), make_ref(tmp_path)
    guard = StallGuard(record, ref, WatchPolicy(), BOUNDS[1], LOG)

    def close(_: float) -> None:
        record.write_outcome(1, Outcome(state=JobState.FAILED, reason=FailureReason.INFRASTRUCTURE))

    assert watch(provider, ref, record, 3600, lambda _: None, guard, sleep=close) is None
    assert len(list(provider.script)) == 1


def test_a_silence_stays_on_the_screen_beside_the_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "60")
    display = TrainingDisplay()
    display.record = record = RunRecord("/nowhere", "watch1")
    with display:
        for status in (step(1), JobStatus(state=JobState.UNKNOWN, message="no answer; " + 60 * "x"), step(2), step(3)):
            display.on_status(record, status)
    assert capsys.readouterr().err.count(60 * "x") == 1


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
    *_, record = observe(tmp_path, provider, max_runtime=-DEADLINE_MARGIN_SECONDS - 1)
    assert provider.cancelled == cancels
    asked = record.cancel_request(1)
    assert (asked.asked_by if asked else "") == (DEADLINE if cancels else "")


def run_time(record: RunRecord, ref: JobRef, *looks: tuple[JobState, float, Waiting | None]) -> CancelRequest | None:
    """The wish to stop that an hour of run time leads to; looks at the job so many minutes after its start."""
    start = utc_now()
    limits = TimeLimits(record, ref, 3600 - DEADLINE_MARGIN_SECONDS, {})
    for state, minutes, waiting in looks:
        limits.observe(JobStatus(state=state, waiting=waiting, observed_at=start + timedelta(minutes=minutes)))
    return record.cancel_request(1)


def test_waiting_again_is_no_run_time(tmp_path: Path) -> None:
    """Pre-empted after ten minutes, and queued for hours: only what it trains then counts on."""
    ref, running, unknown = make_ref(tmp_path), JobState.RUNNING, JobState.UNKNOWN
    for number, (state, waiting) in enumerate([(JobState.QUEUED, None), (JobState.STARTING, Waiting.MACHINE)]):
        waited = ((running, 0, None), (running, 10, None), (state, 11, waiting), (state, 300, waiting), (running, 301, None))
        record = RunRecord(str(tmp_path), f"watch{number}")
        assert run_time(record, ref, *waited, (running, 350, None)) is None
        asked = run_time(record, ref, *waited, (running, 352, None))
        assert asked is not None
        assert asked.asked_by == DEADLINE
    unseen = ((running, 0, None), (unknown, 30, None), (running, 61, None))
    assert run_time(RunRecord(str(tmp_path), "unseen"), ref, *unseen) is not None, "it may have run all the time"


def test_a_job_that_waits_for_what_nobody_mends_is_stopped_and_its_cause_told(tmp_path: Path) -> None:
    waits = JobStatus(
        state=JobState.STARTING,
        waiting=Waiting.MENDING,
        reason=FailureReason.IMAGE,
        message="no such image",
        hint="push it",
        started_at=utc_now(),
    )
    provider = ScriptedProvider([waits, waits, JobState.CANCELLED])
    provider.limits = {Waiting.MENDING: 0.0}
    *_, record = observe(tmp_path, provider)
    asked = record.cancel_request(1)
    assert asked is not None
    assert (asked.asked_by, asked.reason, asked.hint, provider.cancelled) == (PENDING_LIMIT, FailureReason.IMAGE, "push it", 1)
    assert "no such image" in asked.why


@pytest.mark.parametrize(
    ("exc", "told"),
    [
        (ServiceUnavailable("no answer", hint="start it"), ["submit attempt 2: no answer; it is tried again, 1 of 5 times (start it)"]),
        (JobNotFound("gone"), []),
        (KeyError("a defect"), []),
    ],
)
def test_a_step_that_is_tried_again_says_so_where_the_flow_was_started(exc: Exception, told: list[str]) -> None:
    heard: list[str] = []
    token = ON_RETRY.set(heard.append)
    try:
        again = asyncio.run(
            _is_transient(None, TaskRun(name="submit attempt 2", task_key="k", dynamic_key="1", run_count=1), Failed(data=exc))
        )
    finally:
        ON_RETRY.reset(token)
    assert (again, heard) == (bool(told), told)


# --- Stalls ----------------------------------------------------------------------------------------------


def step(number: int, *, epoch: int = 0, nonfinite: int = 0) -> JobStatus:
    progress = Progress(
        attempt=1,
        phase=Phase.TRAINING,
        epochs=9,
        epoch=epoch,
        step=number,
        steps=100,
        activity=STEPPING,
        step_seconds=1.0,
        last_step_at=utc_now(),
        nonfinite_losses=nonfinite,
    )
    return JobStatus(state=JobState.RUNNING, progress=progress)


class Die(Exception):
    """The watcher is killed here."""


def endure(tmp_path: Path, script: Sequence[JobState | JobStatus | Exception], on_stall: str) -> tuple[JobStatus | None, int, RunRecord]:
    """Watches a script in which a minute passes between two observations; a step may take five. The status, cancels, the record."""
    provider: Any = ScriptedProvider(script)
    record = RunRecord(str(tmp_path), "watch1")
    now = iter(range(0, 60 * 1000, 60))
    guard = StallGuard(
        record,
        make_ref(tmp_path),
        WatchPolicy.model_validate({"on_stall": on_stall}),
        BOUNDS[1],
        LOG,
        clock=lambda: float(next(now)),
    )
    try:
        status = watch(provider, make_ref(tmp_path), record, 3600, lambda _: None, guard, sleep=lambda _: None)
    except Die:
        status = None
    return status, provider.cancelled, record


def events(record: RunRecord) -> list[tuple[str, Any]]:
    return [(event.kind, event.data["cause"]) for event in record.events()]


def stuck(count: int = 8) -> list[JobState | JobStatus | Exception]:
    return [step(3)] * count


def test_a_stall_and_its_end_are_told_once_whoever_watches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, cancels, record = endure(tmp_path, [*stuck(), Die()], "warn")
    assert events(record) == [("stalled", "no-step")]
    assert "no training step after step 3" in caplog.text
    assert record.events()[0].data["attempt"] == 1
    endure(tmp_path, [*stuck(), Die()], "warn")
    assert events(record) == [("stalled", "no-step")]
    goes_on = [step(4), step(5), *stuck(), step(6), JobState.SUCCEEDED]
    status, more_cancels, record = endure(tmp_path, goes_on, "warn")
    assert events(record) == [("stalled", "no-step"), ("recovered", "no-step")]
    assert status is not None
    assert (status.state, cancels + more_cancels, record.cancel_request(1)) == (JobState.SUCCEEDED, 0, None)


def test_stop_asks_in_the_policys_name(tmp_path: Path) -> None:
    status, cancels, record = endure(tmp_path, [*stuck(), JobState.STOPPING, JobState.CANCELLED], "stop")
    asked = record.cancel_request(1)
    assert asked is not None
    assert (asked.asked_by, cancels) == (STALL_POLICY, 1)
    assert "no training step" in asked.why
    assert status is not None
    assert status.state is JobState.CANCELLED


def test_restart_fails_the_attempt_so_that_another_follows(tmp_path: Path) -> None:
    status, cancels, record = endure(tmp_path, [*stuck(), JobState.STOPPING, JobState.CANCELLED], "restart")
    assert events(record) == [("stalled", "no-step"), ("stall-restart", "no-step")]
    assert (cancels, record.cancel_request(1)) == (1, None)
    assert status is not None
    assert (status.state, status.reason) == (JobState.FAILED, FailureReason.INFRASTRUCTURE)
    assert "no training step" in status.message


def test_restart_survives_the_death_of_its_watcher(tmp_path: Path) -> None:
    """Killed between intent and call, and between call and end: the next watcher goes on from the event."""
    *_, record = endure(tmp_path, [*stuck(), Die()], "restart")
    assert ("stall-restart", "no-step") in events(record)
    _, cancels, _ = endure(tmp_path, [step(3), Die()], "restart")
    assert cancels == 1
    status, _, record = endure(tmp_path, [JobState.STOPPING, JobState.CANCELLED], "restart")
    assert status is not None
    assert status.reason is FailureReason.INFRASTRUCTURE
    assert len(events(record)) == 2


@pytest.mark.parametrize(("on_stall", "cancels"), [("warn", 0), ("restart", 0), ("stop", 1)])
def test_a_training_that_diverged_is_told_or_stopped_and_never_restarted(tmp_path: Path, on_stall: str, cancels: int) -> None:
    script = [step(1), step(2, nonfinite=1), step(7, nonfinite=6), step(8, nonfinite=7), JobState.CANCELLED]
    _, cancelled, record = endure(tmp_path, script, on_stall)
    assert events(record) == [("stalled", "diverged")]
    assert cancelled == cancels
