from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fit_rig import epochs_of, make_attempt
from trainer import task
from trainer.contract import STEPPING, AttemptLayout, Progress
from trainer.frameworks import yolo_callbacks
from trainer.frameworks.yolo_callbacks import StepClock
from trainer.progress import ProgressWriter, finite, read_lines


def test_progress_holds_no_number_that_json_lacks(tmp_path: Path) -> None:
    writer = ProgressWriter(AttemptLayout(tmp_path), attempt=1, epochs=3)
    writer.update(losses={"a": math.nan, "b": 1.0}, metrics={"map50": math.inf}, learning_rate=math.nan, epoch=1)
    writer.finish_epoch()
    writer.finish_epoch()
    document = json.loads((tmp_path / AttemptLayout.PROGRESS).read_text(), parse_constant=pytest.fail)
    assert (document["losses"], document["metrics"], document["learning_rate"]) == ({"b": 1.0}, {}, None)
    assert len(read_lines(tmp_path / AttemptLayout.PROGRESS_LINES)) == 1
    assert finite({"a": {"b": -math.inf}}) == {"a": {}}


def test_progress_goes_back_to_the_checkpoint_before_it_goes_on(tmp_path: Path) -> None:
    layout = AttemptLayout(tmp_path)
    writer = ProgressWriter(layout, attempt=1, epochs=9)
    for epoch in (1, 2, 3):
        writer.update(epoch=epoch)
        writer.finish_epoch()
    lost = writer.latest.model_copy(update={"epoch": 2})
    with (tmp_path / AttemptLayout.PROGRESS_LINES).open("a") as file:
        file.write('{"epoch": 4, "cut')
    again = ProgressWriter(layout, attempt=1, epochs=9)
    again.rewind(lost, 2)
    again.update(epoch=3)
    again.finish_epoch()
    assert epochs_of(layout) == [1, 2, 3]


def test_a_sign_of_life_is_written_at_most_once_per_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("trainer.progress.time", SimpleNamespace(monotonic=lambda: now))
    writer = ProgressWriter(AttemptLayout(tmp_path), attempt=1, epochs=3)
    writer.update(activity="validating")
    first = (tmp_path / AttemptLayout.PROGRESS).read_text()
    writer.beat()
    assert (tmp_path / AttemptLayout.PROGRESS).read_text() == first
    now += 1
    writer.beat()
    beaten = Progress.model_validate_json((tmp_path / AttemptLayout.PROGRESS).read_text())
    assert beaten.activity == "validating"
    assert beaten.updated_at > Progress.model_validate_json(first).updated_at


def test_steps_and_pauses_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(yolo_callbacks, "time", SimpleNamespace(monotonic=lambda: now))
    clock = StepClock()
    assert (clock.step_seconds, clock.pause_seconds, clock.last_step_at) == (None, None, None)
    for pause in (60, 8, 4):  # the first one builds caches, and is before the first step
        clock.start_epoch()
        now += pause
        clock.end_step()
        for seconds in (1, 1, 5):
            now += seconds
            clock.end_step()
    assert (clock.step_seconds, clock.pause_seconds) == (1, 8)
    assert clock.last_step_at is not None


def test_a_training_tells_its_pace_and_a_loss_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three epochs of two steps; the loss is NaN from the fourth step on, as the callbacks see it."""
    written: list[Progress] = []
    update = ProgressWriter.update

    def note(self: ProgressWriter, **changes: Any) -> Progress:
        written.append(update(self, **changes))
        return written[-1]

    step_end = yolo_callbacks.TrainingCallbacks.on_step_end
    steps = 0

    def spoil(self: Any, trainer: Any) -> None:
        nonlocal steps
        steps += 1
        loss = trainer.loss
        trainer.loss = loss * math.nan if steps >= 4 else loss
        step_end(self, trainer)
        trainer.loss = loss

    monkeypatch.setattr(ProgressWriter, "update", note)
    monkeypatch.setattr(ProgressWriter, "is_due", lambda _self: True)
    monkeypatch.setattr(yolo_callbacks.TrainingCallbacks, "on_step_end", spoil)
    task.fit(make_attempt(tmp_path, epochs=3))
    stepping = [progress for progress in written if progress.activity == STEPPING]
    assert [progress.nonfinite_losses for progress in stepping] == [0, 0, 0, 1, 2, 3]
    assert [(progress.epoch, progress.step) for progress in stepping] == [(epoch, step) for epoch in range(3) for step in (1, 2)]
    assert all(progress.last_step_at for progress in stepping)
    assert stepping[0].step_seconds is None
    assert all(progress.step_seconds for progress in stepping[1:])
    assert all(progress.pause_seconds for progress in stepping[2:])
    activities = [progress.activity for progress in written]
    assert {"validating", "saving"} <= set(activities)
    assert any(progress.activity == "validating" and progress.epoch == 0 for progress in written)


def test_a_fit_that_follows_another_shows_what_was_done_before_it_prepares(tmp_path: Path) -> None:
    layout = AttemptLayout(tmp_path)
    writer = ProgressWriter(layout, attempt=1, epochs=9)
    for epoch in (1, 2):
        writer.update(epoch=epoch)
        writer.finish_epoch()
    later = ProgressWriter(layout, attempt=1, epochs=9)
    assert later.latest.epoch == 2
    later.rewind(None, 0)
    assert read_lines(layout / AttemptLayout.PROGRESS_LINES) == [], "of a training that starts over"
