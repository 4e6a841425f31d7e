from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from blocks.job import FailureReason, JobState, JobStatus, WatchPolicy
from blocks.stalling import CONFIRM_SECONDS, DIVERGED_STEPS, Cause, StallJudge, Verdict, as_restart, step_limit
from trainer.contract import STEPPING, Phase, Progress

START = datetime(2026, 11, 24, 8, tzinfo=UTC)
POLICY = WatchPolicy(stall_factor=30, stall_min_seconds=300, stall_phase_seconds=3600)
POLL_SECONDS = 2.0


class Scene:
    """A job, its watcher, and two clocks: the watcher's own, and the wall's, which everybody reads alike."""

    def __init__(self, policy: WatchPolicy = POLICY) -> None:
        self.policy = policy
        self.now = 1000.0
        self.wall = START
        self.status = JobStatus(state=JobState.QUEUED)
        self.progress = Progress(
            attempt=1, phase=Phase.TRAINING, epochs=9, steps=100, activity=STEPPING, step_seconds=1.0, last_step_at=START
        )
        self.watch_anew()

    def watch_anew(self) -> None:
        self.judge = StallJudge(self.policy, START, POLL_SECONDS)

    def pass_time(self, seconds: float, *, asleep: float = 0.0) -> None:
        """`asleep`: what the wall's clock, but not a monotonic one, counts besides."""
        self.now += seconds
        self.wall += timedelta(seconds=seconds + asleep)

    def look(self) -> Verdict:
        return self.judge.observe(self.status.model_copy(update={"observed_at": self.wall}), self.now)

    def word(self, **changes: Any) -> Verdict:
        """The trainer writes its progress, and the watcher looks."""
        self.progress = self.progress.model_copy(update={**changes, "updated_at": self.wall})
        self.status = JobStatus(state=JobState.RUNNING, progress=self.progress)
        return self.look()

    def step(self, **changes: Any) -> Verdict:
        return self.word(step=self.progress.step + 1, activity=STEPPING, last_step_at=self.wall, **changes)

    def wait(self, seconds: float) -> Verdict:
        """Polls for so long; the first stall, or the last verdict."""
        verdict = Verdict()
        for _ in range(int(seconds / POLL_SECONDS)):
            self.pass_time(POLL_SECONDS)
            verdict = self.look()
            if verdict.stall:
                break
        return verdict


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_no_step_for_longer_than_the_floor_is_a_stall_and_a_step_ends_it(scene: Scene) -> None:
    scene.step()
    assert scene.wait(298) == Verdict()
    stall = scene.wait(10).stall
    assert stall is not None
    assert stall.cause is Cause.NO_STEP
    assert "no training step after step 1 of 100 in epoch 1" in stall.message
    assert "the limit is 300 s" in stall.message
    assert scene.step() == Verdict(alive=True)


def test_long_steps_are_judged_by_their_median(scene: Scene) -> None:
    scene.step(step_seconds=60.0)
    assert scene.wait(1790) == Verdict()
    assert scene.wait(20).stall


def test_steps_that_slow_down_are_no_stall(scene: Scene) -> None:
    """A machine that gets hot: each step takes a tenth longer, from one second to an hour."""
    recent = [1.0]
    while recent[-1] < 3600:
        scene.step(step_seconds=sorted(recent[-50:])[len(recent[-50:]) // 2])
        assert not scene.wait(recent[-1]).stall, recent[-1]
        recent.append(recent[-1] * 1.1)


@pytest.mark.parametrize("activity", ["validating", "saving", ""])
def test_between_epochs_the_limit_is_the_pauses_own(scene: Scene, activity: str) -> None:
    scene.step()
    scene.word(activity=activity)
    assert not scene.wait(3590).stall, "nothing is known of this training's pauses yet"
    stall = scene.wait(20).stall
    assert stall is not None
    assert stall.cause is Cause.SILENT
    scene.word(pause_seconds=20.0)
    assert not scene.wait(598).stall
    assert scene.wait(10).stall
    scene.word(pause_seconds=0.1)
    assert not scene.wait(298).stall
    assert scene.wait(10).stall


def test_a_validation_of_hours_that_gives_signs_of_life_is_no_stall(scene: Scene) -> None:
    scene.word(activity="validating", pause_seconds=1.0)
    for _ in range(100):
        assert not scene.wait(200).stall
        scene.word()


def test_the_boundary_of_epochs_is_a_sign_of_life(scene: Scene) -> None:
    scene.step()
    scene.wait(290)
    assert scene.word(activity="validating").alive
    assert not scene.wait(290).stall
    assert scene.word(activity="saving", epoch=1, step=0).alive
    assert not scene.wait(290).stall
    assert scene.step().alive
    assert not scene.wait(290).stall


def test_words_without_a_step_are_no_steps(scene: Scene) -> None:
    scene.step()
    for _ in range(14):
        assert not scene.wait(20).stall
        scene.word(message="still here")
    assert scene.wait(40).stall


@pytest.mark.parametrize("phase", [Phase.PREPARING, Phase.EVALUATING, Phase.FINISHING])
def test_data_preparation_and_evaluation_have_the_long_limit(scene: Scene, phase: Phase) -> None:
    scene.word(phase=phase, activity="saving", pause_seconds=0.1)
    assert not scene.wait(3590).stall
    stall = scene.wait(20).stall
    assert stall is not None
    assert phase.value in stall.message


@pytest.mark.parametrize(("seconds", "asleep"), [(1.0, 8 * 3600.0), (8 * 3600.0, 0.0)], ids=["clock stands", "clock runs"])
def test_a_laptop_that_slept_is_no_stall(scene: Scene, seconds: float, asleep: float) -> None:
    scene.step()
    scene.wait(200)
    scene.pass_time(seconds, asleep=asleep)
    assert not scene.look().stall
    assert not scene.wait(20).stall
    assert scene.step().alive
    assert not scene.wait(290).stall


def test_a_stall_just_before_a_sleep_is_confirmed_after_it(scene: Scene) -> None:
    scene.step()
    scene.wait(299)
    scene.pass_time(8 * 3600)
    assert not scene.look().stall
    assert not scene.wait(CONFIRM_SECONDS - POLL_SECONDS).stall
    assert scene.wait(10).stall


def test_a_new_watcher_needs_no_history_and_no_full_wait(scene: Scene) -> None:
    """The trainer's own median and time of the last step say how it was; a short look of its own confirms it."""
    scene.step()
    scene.pass_time(1000)
    scene.watch_anew()
    assert not scene.look().stall
    assert not scene.wait(CONFIRM_SECONDS - POLL_SECONDS).stall
    stall = scene.wait(10).stall
    assert stall is not None
    assert "for 10" in stall.message  # 1030 s


def test_a_new_watcher_after_a_sleep_believes_no_old_time(scene: Scene) -> None:
    scene.step()
    scene.pass_time(1, asleep=8 * 3600)
    scene.watch_anew()
    assert not scene.look().stall
    assert not scene.wait(10).stall
    assert scene.step() == Verdict(alive=True)


def test_a_clock_of_another_machine_does_not_matter(scene: Scene) -> None:
    """The trainer's clock is a day ahead or behind: only the first look uses it, and confirms what it says."""
    for offset in (timedelta(days=1), timedelta(days=-1)):
        scene.watch_anew()
        for _ in range(20):
            scene.pass_time(2)
            assert not scene.word(step=scene.progress.step + 1, last_step_at=scene.wall + offset).stall


def test_nan_for_several_steps_is_divergence(scene: Scene) -> None:
    assert not scene.step(nonfinite_losses=DIVERGED_STEPS - 1).stall
    stall = scene.step(nonfinite_losses=DIVERGED_STEPS).stall
    assert stall is not None
    assert stall.cause is Cause.DIVERGED
    assert "not a finite number" in stall.message
    assert scene.step(nonfinite_losses=0) == Verdict(alive=True)


def test_waiting_for_a_machine_has_a_limit_only_where_one_is_set() -> None:
    patient = Scene()
    assert not patient.wait(10_000).stall
    scene = Scene(POLICY.model_copy(update={"queue_limit_seconds": 600}))
    assert not scene.wait(590).stall
    scene.status = JobStatus(state=JobState.STARTING)  # a machine at last, and no word from the trainer
    stall = scene.wait(20).stall
    assert stall is not None
    assert stall.cause is Cause.NOT_STARTED
    assert scene.word(phase=Phase.PREPARING, activity="").alive


def test_a_job_that_stops_or_is_unknown_is_not_judged(scene: Scene) -> None:
    scene.step()
    for state in (JobState.STOPPING, JobState.UNKNOWN):
        scene.status = JobStatus(state=state, progress=scene.progress)
        assert scene.wait(1000) == Verdict()
    scene.status = JobStatus(state=JobState.RUNNING, progress=scene.progress)
    assert not scene.look().stall


def test_a_trainer_of_an_older_version_is_judged_by_the_long_limit() -> None:
    assert step_limit(POLICY, Progress(attempt=1, phase=Phase.TRAINING, epochs=3)) == 3600


@pytest.mark.parametrize(
    ("status", "restarts"),
    [
        (JobStatus(state=JobState.CANCELLED), True),
        (JobStatus(state=JobState.FAILED, reason=FailureReason.PREEMPTED), True),
        (JobStatus(state=JobState.FAILED, reason=FailureReason.INFRASTRUCTURE), True),
        (JobStatus(state=JobState.FAILED, reason=FailureReason.OUT_OF_MEMORY), False),
        (JobStatus(state=JobState.SUCCEEDED), False),
        (JobStatus(state=JobState.STOPPING), False),
    ],
)
def test_a_job_stopped_to_be_restarted_failed_for_its_machine(status: JobStatus, restarts: bool) -> None:
    ended = as_restart(status, "no step for 400 s")
    assert (ended.reason is FailureReason.INFRASTRUCTURE and "no step" in ended.message) == restarts
    assert as_restart(status, "") == status
