from __future__ import annotations

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from blocks.driving import driving
from blocks.job import FailureReason, JobState, TrainRequest
from blocks.pruning import delete, find_leftovers, whole_run, why_in_use
from blocks.record import Outcome, RunRecord, request_hash
from tests.unit.test_blocks_attempts import make_plan
from tests.unit.test_blocks_record import run_file
from trainer.contract import TrainConfig, utc_now
from trainer.locks import try_lock


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    return tmp_path


def make_run(run_id: str, tmp_path: Path, outcome: Outcome | None, weights: str | None = None) -> RunRecord:
    """A run with one attempt: model, figures, checkpoints of epochs 2 (the best) and 3, and a working folder with a link."""
    record = RunRecord(str(tmp_path / "runs"), run_id)
    request = TrainRequest(dataset="/data/bccd", config=TrainConfig(weights=weights))
    stored = {"request": request.model_dump(mode="json"), "request_hash": request_hash(request)}
    record.open(run_file(run_id).model_copy(update=stored))
    record.write_plan(make_plan(record))
    attempt = tmp_path / "runs" / run_id / "attempts" / "1"
    for name, size in {"model/model.pt": 10, "metrics.json": 2, "checkpoints/epoch-0002.pt": 100, "checkpoints/epoch-0003.pt": 100}.items():
        (attempt / name).parent.mkdir(exist_ok=True)
        (attempt / name).write_bytes(b"x" * size)
    for epoch in (2, 3):
        (attempt / f"checkpoints/epoch-000{epoch}.json").write_text(json.dumps({"best_epoch": 2}))
    (attempt / "work").mkdir()
    (tmp_path / "image.jpg").write_bytes(b"y" * 5000)
    (attempt / "work" / "image.jpg").symlink_to(tmp_path / "image.jpg")
    if outcome is not None:
        record.write_outcome(1, outcome)
    return record


def ended(state: JobState, reason: FailureReason | None = None, days: int = 0) -> Outcome:
    return Outcome(state=state, reason=reason, epoch=3, closed_at=utc_now() - timedelta(days=days))


GOOD = ended(JobState.SUCCEEDED)


def names(record: RunRecord) -> set[str]:
    folder = Path(record.uri.removeprefix("file://")) / "attempts" / "1"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_checkpoints_and_work_of_a_success_go_and_the_rest_stays(tmp_path: Path) -> None:
    record = make_run("good1234", tmp_path, GOOD)
    [removal] = find_leftovers([record], now=utc_now())
    assert (removal.files, [path.name for path in removal.paths]) == (5, ["checkpoints", "work"])
    assert 200 < removal.bytes < 5000, "a link is not what it points to"
    assert delete(removal)
    assert names(record) == {"model/model.pt", "metrics.json", "plan.json", "outcome.json"}
    assert (tmp_path / "image.jpg").exists()
    assert find_leftovers([record], now=utc_now()) == []


def test_the_best_checkpoint_is_kept_on_wish(tmp_path: Path) -> None:
    record = make_run("good1234", tmp_path, GOOD)
    [removal] = find_leftovers([record], keep_best=True, now=utc_now())
    assert delete(removal)
    assert {name for name in names(record) if "epoch" in name} == {"checkpoints/epoch-0002.pt", "checkpoints/epoch-0002.json"}


@pytest.mark.parametrize(
    ("outcome", "by_default", "with_failed"),
    [
        (None, False, False),
        (GOOD, True, True),
        (ended(JobState.CANCELLED), False, True),
        (ended(JobState.FAILED, FailureReason.DATA), False, True),
        (ended(JobState.FAILED, FailureReason.PREEMPTED), False, False),  # another attempt follows: it is open
    ],
)
def test_what_is_pruned(tmp_path: Path, outcome: Outcome | None, by_default: bool, with_failed: bool) -> None:
    record = make_run("some1234", tmp_path, outcome)
    assert bool(find_leftovers([record], now=utc_now())) is by_default
    assert bool(find_leftovers([record], failed=True, now=utc_now())) is with_failed


def test_only_what_ended_long_ago(tmp_path: Path) -> None:
    old, young = make_run("old12345", tmp_path, ended(JobState.SUCCEEDED, days=40)), make_run("young123", tmp_path, GOOD)
    found = find_leftovers([old, young], older_than=timedelta(days=30), now=utc_now())
    assert [removal.record for removal in found] == [old]


def test_a_checkpoint_that_an_open_run_starts_from_stays(tmp_path: Path) -> None:
    good = make_run("good1234", tmp_path, GOOD)
    open_run = make_run("open1234", tmp_path, None, weights=str(tmp_path / "runs/good1234/attempts/1/checkpoints/epoch-0002.pt"))
    assert find_leftovers([good, open_run], now=utc_now()) == []


def test_a_run_that_somebody_works_on_is_in_use(tmp_path: Path) -> None:
    record = make_run("good1234", tmp_path, GOOD)
    assert why_in_use(record) == ""
    with driving(record, "flow-1", deployed=False, max_attempts=3):
        assert "works on it" in why_in_use(record)
    descriptor = try_lock(tmp_path / "runs/good1234/attempts/1/lock")
    assert descriptor is not None
    assert "training process" in why_in_use(record)
    os.close(descriptor)
    assert why_in_use(record) == ""


def test_a_run_resumed_between_preview_and_yes_is_left_alone(tmp_path: Path) -> None:
    record = make_run("gone1234", tmp_path, ended(JobState.CANCELLED))
    [removal] = find_leftovers([record], failed=True, now=utc_now())
    plan = make_plan(record)
    record.write_plan(plan.model_copy(update={"spec": plan.spec.model_copy(update={"attempt": 2})}))
    assert why_in_use(record) == "it is open"
    assert not delete(removal)
    assert "checkpoints/epoch-0003.pt" in names(record)


def test_a_whole_run_goes(tmp_path: Path) -> None:
    record = make_run("good1234", tmp_path, GOOD)
    removal = whole_run(record)
    assert removal.files == 10
    assert delete(removal)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_damaged_record_is_never_judged(tmp_path: Path) -> None:
    record = make_run("harm1234", tmp_path, GOOD)
    record.folder.put("attempts/1/outcome.json", b"{")
    assert "damaged" in why_in_use(record)
    assert find_leftovers([record], now=utc_now()) == []
    shutil.rmtree(tmp_path / "runs")
