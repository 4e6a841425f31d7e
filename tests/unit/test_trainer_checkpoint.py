from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from trainer import checkpoint as checkpoints
from trainer.checkpoint import adopt_checkpoint, find_best, find_checkpoint, hash_config, list_checkpoints, save_checkpoint
from trainer.contract import AttemptLayout, DatasetRef, ExitCode, TrainConfig, TrainerError, TrainJob
from trainer.task import explain

DATASET = DatasetRef(root="/data", index_uri="/index.json", version="v" * 64, name="shapes", image_count=4)


def make_job(attempt: int = 1, *, version: str = DATASET.version, run_id: str = "run", **config: Any) -> TrainJob:
    dataset = DATASET.model_copy(update={"version": version})
    values = {"model": "yolo11-pico", "epochs": 9, **config}
    return TrainJob(run_id=run_id, attempt=attempt, name="t", config=TrainConfig.model_validate(values), dataset=dataset)


def make_layout(base: Path, attempt: int = 1) -> AttemptLayout:
    layout = AttemptLayout(base / str(attempt))
    layout.folder.mkdir(parents=True)
    return layout


def state(epoch: int, **changes: Any) -> bytes:
    """A stand-in for what torch saves, with what is looked at. The framework counts epochs from 0."""
    return json.dumps({"epoch": epoch - 1, "optimizer": {"state": 1}, "ema": 1, **changes}).encode()


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_bytes())


def save(layout: AttemptLayout, epoch: int, best: Any = None, job: TrainJob | None = None) -> Any:
    return save_checkpoint(layout / "checkpoints", state(epoch), job or make_job(layout.number), epoch=epoch, best=best)


def names(layout: AttemptLayout) -> list[str]:
    return sorted(path.name for path in (layout / "checkpoints").iterdir())


def test_the_newest_two_and_the_best_epoch_are_kept(tmp_path: Path) -> None:
    layout = make_layout(tmp_path)
    best = save(layout, 1).record
    for epoch in (2, 3, 4):
        save(layout, epoch, best)
    assert names(layout) == [f"epoch-000{n}.{ending}" for n in (1, 3, 4) for ending in ("json", "pt")]
    found, problems = find_checkpoint(layout, make_job(), load)
    assert found is not None
    assert (found.record.epoch, found.record.best_epoch, problems) == (4, 1, [])
    kept = find_best(layout, found)
    assert kept is not None
    assert kept.path.name == "epoch-0001.pt"


def test_a_run_without_checkpoints_starts_from_scratch(tmp_path: Path) -> None:
    assert find_checkpoint(make_layout(tmp_path), make_job(), load) == (None, [])


def test_the_latest_epoch_wins_and_of_equal_ones_the_newest_attempt(tmp_path: Path) -> None:
    first, second, third = (make_layout(tmp_path, number) for number in (1, 2, 3))
    save(first, 3)
    save(second, 2)
    save(second, 3)
    assert [path.parent.parent.name for path in list_checkpoints(third)] == ["2", "1", "2"]
    assert list_checkpoints(first) == [first / "checkpoints" / "epoch-0003.pt"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "no record", "wrong epoch", "no optimizer", "not a checkpoint"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    layout = make_layout(tmp_path)
    save(layout, 1)
    data = {"wrong epoch": state(7), "no optimizer": state(2, optimizer=None), "not a checkpoint": b"PK junk"}.get(damage, state(2))
    path = save_checkpoint(layout / "checkpoints", data, make_job(), epoch=2, best=None).path
    if damage == "truncate":
        path.write_bytes(data[:-3])
    elif damage == "flip":
        path.write_bytes(data[:-1] + b"x")
    elif damage == "no record":
        path.with_suffix(".json").unlink()
    found, problems = find_checkpoint(layout, make_job(), load)
    assert found is not None
    assert found.record.epoch == 1
    assert len(problems) == 1
    assert "epoch-0002.pt" in problems[0]


def test_only_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    layout = make_layout(tmp_path)
    save(layout, 1).path.write_bytes(b"")
    with pytest.raises(TrainerError, match="none can be resumed") as caught:
        find_checkpoint(layout, make_job(), load)
    assert caught.value.code == ExitCode.CONFIG


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (make_job(epochs=10), "epochs was 9, is 10"),
        (make_job(model="yolo26-pico"), "model was 'yolo11-pico', is 'yolo26-pico'"),
        (make_job(version="w" * 64), "dataset version"),
        (make_job(run_id="other"), "belongs to run run"),
    ],
)
def test_another_training_is_refused(tmp_path: Path, job: TrainJob, reason: str) -> None:
    layout = make_layout(tmp_path)
    save(layout, 1)
    with pytest.raises(TrainerError, match=reason) as caught:
        find_checkpoint(layout, job, load)
    assert caught.value.code == ExitCode.CONFIG


def test_device_and_workers_may_change() -> None:
    assert hash_config(make_job(device="cuda:0", workers=8).config) == hash_config(make_job(device="cpu").config)


def test_a_field_that_this_version_added_is_no_change_of_the_configuration(tmp_path: Path) -> None:
    layout = make_layout(tmp_path)
    path = save(layout, 1).path.with_suffix(".json")
    record = json.loads(path.read_text())
    del record["config"]["patience"]
    older = {**record, "config_hash": "of fewer fields"}
    path.write_text(json.dumps(older))
    assert find_checkpoint(layout, make_job(), load)[0] is not None
    with pytest.raises(TrainerError, match="patience was None, is 3"):
        find_checkpoint(layout, make_job(patience=3), load)
    path.write_text(json.dumps({**older, "config": {**record["config"], "from_the_future": 1}}))
    with pytest.raises(TrainerError, match="from_the_future was 1, is unknown"):
        find_checkpoint(layout, make_job(), load)


def test_an_interrupted_save_is_no_damage(tmp_path: Path) -> None:
    layout = make_layout(tmp_path)
    save(layout, 1)
    # Killed between the record and the file.
    record = save(layout, 2).path
    record.unlink()
    found, problems = find_checkpoint(layout, make_job(), load)
    assert found is not None
    assert (found.record.epoch, problems) == (1, [])


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_layout(tmp_path)
    save(layout, 1)
    real = checkpoints.write_atomic

    def write(path: Path, data: bytes) -> None:
        if path.suffix == ".pt":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    monkeypatch.setattr(checkpoints, "write_atomic", write)
    with pytest.raises(OSError, match="space") as caught:
        save(layout, 2)
    error = explain(caught.value)
    assert error.code == ExitCode.DISK_FULL
    assert "disk is full" in error.message
    assert names(layout) == ["epoch-0001.json", "epoch-0001.pt"]
    found, problems = find_checkpoint(layout, make_job(), load)
    assert found is not None
    assert (found.record.epoch, problems) == (1, [])


def test_the_best_epoch_is_found_in_an_earlier_attempt_and_adopted(tmp_path: Path) -> None:
    first, second = make_layout(tmp_path, 1), make_layout(tmp_path, 2)
    best = save(first, 1).record
    newest = save(first, 2, best)
    found = find_best(second, newest)
    assert found is not None
    before = {path: path.stat().st_mtime_ns for path in (first / "checkpoints").iterdir()}
    adopted = adopt_checkpoint(found, second / "checkpoints")
    assert adopted.path.parent == second / "checkpoints"
    assert before == {path: path.stat().st_mtime_ns for path in (first / "checkpoints").iterdir()}
    # The same epoch of another timeline is not the best.
    adopted.path.write_bytes(state(1, other=True))
    found.path.unlink()
    assert find_best(second, newest) is None
