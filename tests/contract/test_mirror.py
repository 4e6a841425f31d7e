"""An attempt's folder on a machine that may go away at any moment, and its objects in a store: complete or absent, never half."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import obstore
import pytest

from blocks.record import RunRecord
from tests.contract.test_object_folder import make_plan
from tests.fit_rig import make_attempt, start_fit
from trainer.checkpoint import CheckpointRecord, find_checkpoint, read_record, save_checkpoint
from trainer.contract import (
    AttemptLayout,
    DatasetRef,
    ExitCode,
    ExitRecord,
    Framework,
    Phase,
    Progress,
    ResultManifest,
    Task,
    TrainConfig,
    TrainerError,
    TrainJob,
    utc_now,
)
from trainer.files import write_json
from trainer.mirror import Mirror, pull_checkpoints
from trainer.result import list_result_files
from trainer.storage import ObjectFolder, list_paths, open_store

SPAWNING = multiprocessing.get_context("forkserver")
SPAWNING.set_forkserver_preload([__name__, "obstore.store"])


class Attempt:
    """An attempt on a machine's disk, with small files where a trainer writes large ones."""

    def __init__(self, base: Path, store_uri: str, number: int = 1) -> None:
        self.layout = AttemptLayout(base / "run/attempts" / str(number))
        self.run_uri = f"{store_uri}/run"
        self.uri = f"{self.run_uri}/attempts/{number}"
        dataset = DatasetRef(root="/d", index_uri="file:///d", version="v", name="d", image_count=1)
        self.job = TrainJob(run_id="run", attempt=number, name="n", config=TrainConfig(epochs=9), dataset=dataset)
        self.checkpoints = self.layout / AttemptLayout.CHECKPOINTS

    def finish_epoch(self, epoch: int, *, best: int | None = None, timeline: str = "") -> None:
        content = json.dumps({"epoch": epoch, "timeline": timeline}).encode()
        record = read_record(self.checkpoints / f"epoch-{best:04d}.pt") if best else None
        save_checkpoint(self.checkpoints, content, self.job, epoch=epoch, best=record)
        progress = Progress(attempt=self.job.attempt, phase=Phase.TRAINING, epoch=epoch, epochs=9)
        write_json(self.layout / AttemptLayout.PROGRESS, progress)
        for name in (AttemptLayout.PROGRESS_LINES, AttemptLayout.LOG):
            (self.layout / name).parent.mkdir(parents=True, exist_ok=True)
            with (self.layout / name).open("a") as file:
                file.write(progress.model_dump_json() + "\n")

    def write_result(self, text: str = "") -> None:
        (self.layout / AttemptLayout.MANIFEST).unlink(missing_ok=True)
        for name in (AttemptLayout.MODEL, AttemptLayout.METRICS, AttemptLayout.EVALUATION, "samples/grid.jpg", "samples/01-ü ß.jpg"):
            (self.layout / name).parent.mkdir(parents=True, exist_ok=True)
            (self.layout / name).write_text(name + text)
        manifest = ResultManifest(
            run_id="run",
            attempt=self.job.attempt,
            framework=Framework.YOLO,
            task=Task.OBJECT_DETECTION,
            model="m",
            dataset_version="v",
            best_epoch=1,
            epochs=1,
            metrics={},
            metrics_split="val",
            files=list_result_files(self.layout),
        )
        write_json(self.layout / AttemptLayout.MANIFEST, manifest)

    def end(self) -> None:
        write_json(self.layout / AttemptLayout.EXIT, ExitRecord(exit_code=0, started_at=utc_now()))

    def assert_nothing_half(self) -> bool:
        """What a reader of the store finds is what it says it is. Whether there is a result."""
        objects = ObjectFolder(self.uri)
        for name in objects.names(AttemptLayout.CHECKPOINTS):
            if name.endswith(".json"):
                record = CheckpointRecord.model_validate_json(objects.get(f"checkpoints/{name}") or b"")
                assert objects.sha256(f"checkpoints/{name.removesuffix('.json')}.pt") == record.sha256
        data = objects.get(AttemptLayout.MANIFEST)
        if data is not None:
            for name, file in ResultManifest.model_validate_json(data).files.items():
                assert objects.sha256(name) == file.sha256, name
        assert data is not None or objects.get(AttemptLayout.EXIT) is None
        return data is not None

    def assert_mirrored(self) -> None:
        names = [name for name in list_paths(open_store(self.uri), "") if not name.endswith("/")]
        local = {str(path.relative_to(self.layout.folder)): path for path in self.layout.folder.rglob("*") if path.is_file()}
        assert sorted(names) == sorted(local)
        for name, path in local.items():
            assert ObjectFolder(self.uri).get(name) == path.read_bytes(), name


@pytest.fixture
def attempt(store_uri: str, tmp_path: Path) -> Attempt:
    return Attempt(tmp_path / "machine", store_uri)


def record_calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []

    def recording(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(store: Any, key: str = "", *rest: Any, **options: Any) -> Any:
            calls.append((name, key.partition("attempts/1/")[2] or key))
            return call(store, key, *rest, **options)

        return recorded

    for name in names:
        monkeypatch.setattr(obstore, name, recording(name, getattr(obstore, name)))
    return calls


def test_a_life_is_mirrored_and_nothing_new_costs_no_request(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(attempt.layout.folder, attempt.uri)
    mirror.sync()
    for epoch in range(1, 6):
        attempt.finish_epoch(epoch, best=1 if epoch > 1 else None)
        mirror.sync()
        attempt.assert_mirrored()
    assert sorted(ObjectFolder(attempt.uri).names("checkpoints"))[::2] == ["epoch-0001.json", "epoch-0004.json", "epoch-0005.json"]
    attempt.write_result()
    mirror.sync()
    attempt.end()
    mirror.sync()
    attempt.assert_mirrored()
    calls = record_calls(monkeypatch, "put", "get", "head", "list", "list_with_delimiter", "delete")
    mirror.sync()
    assert calls == []


def test_what_vouches_for_others_comes_after_them(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt.finish_epoch(1)
    attempt.finish_epoch(2, best=1)
    attempt.write_result()
    attempt.end()
    calls = record_calls(monkeypatch, "put")
    Mirror(attempt.layout.folder, attempt.uri).sync()
    names = [name for _, name in calls]
    assert names[:4] == [f"checkpoints/epoch-000{epoch}.{kind}" for epoch in (1, 2) for kind in ("pt", "json")]
    assert names[-2:] == [AttemptLayout.MANIFEST, AttemptLayout.EXIT]


def push_and_die(at: int, folder: str, uri: str, environment: dict[str, str]) -> None:
    """A mirror whose machine goes away before its write number `at`."""
    os.environ.update(environment)
    left = at

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)

        return counted

    obstore.put, obstore.delete = dying(obstore.put), dying(obstore.delete)
    Mirror(Path(folder), uri).sync()


def test_killed_at_each_write_then_repeated_nothing_is_ever_half(attempt: Attempt) -> None:
    steps: list[Callable[[], Any]] = [
        lambda: [attempt.finish_epoch(epoch) for epoch in (1, 2)],
        lambda: attempt.finish_epoch(3),
        lambda: attempt.finish_epoch(3, timeline="another"),
        attempt.write_result,
        lambda: attempt.write_result("evaluated again"),
        attempt.end,
    ]
    killed: list[int] = []
    for step in steps:
        step()
        for at in range(30):
            arguments = (at, str(attempt.layout.folder), attempt.uri, dict(os.environ))
            process = SPAWNING.Process(target=push_and_die, args=arguments)
            process.start()
            process.join()
            assert process.exitcode in (0, -signal.SIGKILL)
            complete = attempt.assert_nothing_half()
            if process.exitcode == 0:
                break
            killed.append(at)
        assert complete == (attempt.layout / AttemptLayout.MANIFEST).exists()
        attempt.assert_mirrored()
    assert len(killed) > 3 * len(steps)


def test_a_mirror_keeps_up_with_a_trainer_that_writes_all_the_time(attempt: Attempt) -> None:
    mirror = Mirror(attempt.layout.folder, attempt.uri)

    def train() -> None:
        for epoch in range(1, 40):
            attempt.finish_epoch(epoch, best=epoch - 1 if epoch % 3 == 0 else None)
        attempt.write_result()
        attempt.end()

    trainer = threading.Thread(target=train)
    trainer.start()
    while trainer.is_alive():
        mirror.sync()
        attempt.assert_nothing_half()
    mirror.sync()
    attempt.assert_mirrored()


def test_a_result_that_is_not_what_the_manifest_says_stays_away(attempt: Attempt) -> None:
    attempt.write_result()
    (attempt.layout / AttemptLayout.MODEL).write_text("damaged")
    with pytest.raises(TrainerError, match=r"model\.pt is not what it was") as refused:
        Mirror(attempt.layout.folder, attempt.uri).sync()
    assert refused.value.code is ExitCode.DATA
    assert not attempt.assert_nothing_half()


def test_a_manifest_that_is_taken_back_is_taken_back_there_too(attempt: Attempt) -> None:
    mirror = Mirror(attempt.layout.folder, attempt.uri)
    attempt.write_result()
    mirror.sync()
    assert attempt.assert_nothing_half()
    (attempt.layout / AttemptLayout.MANIFEST).unlink()
    mirror.sync()
    assert not attempt.assert_nothing_half()


def test_the_result_of_an_attempt_that_has_a_follower_is_kept_back(
    attempt: Attempt, store_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = Mirror(attempt.layout.folder, attempt.uri)
    attempt.finish_epoch(1)
    attempt.write_result()
    put = obstore.put

    def planning(store: Any, key: str, data: Any, **options: Any) -> Any:
        monkeypatch.setattr(obstore, "put", put)
        record = RunRecord(store_uri, "run")
        record.write_plan(make_plan(record, 2))  # while the result is on its way
        return put(store, key, data, **options)

    monkeypatch.setattr(obstore, "put", planning)
    with pytest.raises(TrainerError, match="newer attempt exists") as refused:
        mirror.sync()
    assert refused.value.code is ExitCode.OCCUPIED
    assert not attempt.assert_nothing_half()


def test_a_damaged_checkpoint_is_left_out_and_others_stay(attempt: Attempt) -> None:
    mirror = Mirror(attempt.layout.folder, attempt.uri)
    attempt.finish_epoch(1)
    mirror.sync()
    attempt.finish_epoch(2)
    (attempt.checkpoints / "epoch-0002.pt").write_bytes(b"damaged")
    (attempt.checkpoints / "epoch-0001.pt").unlink()
    mirror.sync()
    assert ObjectFolder(attempt.uri).names("checkpoints") == ["epoch-0001.json", "epoch-0001.pt"]


def test_a_new_machine_takes_nothing_away_before_it_has_something(attempt: Attempt, store_uri: str, tmp_path: Path) -> None:
    """The same attempt, started again on an empty disk."""
    for epoch in (1, 2):
        attempt.finish_epoch(epoch)
    Mirror(attempt.layout.folder, attempt.uri).sync()
    other = Attempt(tmp_path / "other", store_uri)
    mirror = Mirror(other.layout.folder, other.uri)
    mirror.sync()
    assert len(ObjectFolder(attempt.uri).names("checkpoints")) == 4
    pull_checkpoints(other.run_uri, other.layout.folder.parents[1])
    other.finish_epoch(3)
    mirror.sync()
    assert ObjectFolder(attempt.uri).names("checkpoints")[::2] == ["epoch-0002.json", "epoch-0003.json"]


def test_a_long_log_is_not_sent_for_every_line(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(attempt.layout.folder, attempt.uri)
    log = attempt.layout / AttemptLayout.LOG
    log.parent.mkdir(parents=True)
    log.write_bytes(b"x" * 2**21)
    mirror.sync()
    calls = record_calls(monkeypatch, "put")
    with log.open("ab") as file:
        for _ in range(100):
            file.write(b"y" * 1000)
            file.flush()
            mirror.sync()
    assert 0 < len(calls) <= 3
    attempt.end()
    mirror.sync()
    assert ObjectFolder(attempt.uri).get(AttemptLayout.LOG) == log.read_bytes()


# --- Going on elsewhere --------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    return {"epoch": json.loads(path.read_bytes())["epoch"] - 1, "optimizer": True, "ema": True}


def mirrored(base: Path, store_uri: str, number: int, epochs: dict[int, int | None]) -> Attempt:
    attempt = Attempt(base, store_uri, number)
    for epoch, best in epochs.items():
        attempt.finish_epoch(epoch, best=best)
    Mirror(attempt.layout.folder, attempt.uri).sync()
    return attempt


def pull(base: Path, store_uri: str) -> tuple[str, list[str]]:
    """What the trainer of attempt 3 goes on from on an empty disk, and all the checkpoints that came."""
    attempt = Attempt(base, store_uri, 3)
    attempt.layout.folder.mkdir(parents=True)
    attempts = attempt.layout.folder.parent
    path = pull_checkpoints(attempt.run_uri, attempts.parent)
    checkpoint, problems = find_checkpoint(attempt.layout, attempt.job, load)
    assert problems == []
    assert (checkpoint and checkpoint.path) == path
    came = sorted(str(one.relative_to(attempts)) for one in attempts.glob("*/checkpoints/*.pt"))
    return str(path.relative_to(attempts)) if path else "", came


def test_the_newest_checkpoint_and_its_best_come_to_a_new_machine(store_uri: str, tmp_path: Path) -> None:
    assert pull(tmp_path / "none", store_uri) == ("", [])
    mirrored(tmp_path / "1", store_uri, 1, {1: None, 2: 1, 3: 1})
    newest = "1/checkpoints/epoch-0003.pt"
    assert pull(tmp_path / "a", store_uri) == (newest, ["1/checkpoints/epoch-0001.pt", newest])
    mirrored(tmp_path / "2", store_uri, 2, {4: None})
    newest = "2/checkpoints/epoch-0004.pt"
    assert pull(tmp_path / "b", store_uri) == (newest, [newest])


@pytest.mark.parametrize("damage", ["flipped", "gone", "no record", "cut"])
def test_a_damaged_one_is_passed_over(store_uri: str, tmp_path: Path, damage: str) -> None:
    attempt = mirrored(tmp_path / "1", store_uri, 1, {1: None, 2: None})
    objects = ObjectFolder(attempt.uri)
    name = f"checkpoints/epoch-0002.{'json' if damage == 'no record' else 'pt'}"
    data = objects.get(name) or b""
    if damage in ("gone", "no record"):
        objects.delete(name)
    else:
        objects.put(name, data[:-1] + (b"!" if damage == "flipped" else b""))
    left = "1/checkpoints/epoch-0001.pt"
    assert pull(tmp_path / "a", store_uri) == (left, [left])
    objects.put("checkpoints/epoch-0001.pt", b"damaged")
    with pytest.raises(TrainerError, match="none is whole") as refused:
        pull(tmp_path / "b", store_uri)
    assert refused.value.code is ExitCode.CONFIG


@pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra `train`: uv sync --extra train")
@pytest.mark.parametrize("store_uri", ["s3"], indirect=True)
def test_a_training_whose_machine_goes_away_is_finished_on_another(store_uri: str, tmp_path: Path) -> None:
    first = make_attempt(tmp_path / "first", epochs=3)
    uri = f"{store_uri}/run/attempts"
    mirror = Mirror(first.folder, f"{uri}/1")
    fit = start_fit(first)
    while not any(name.endswith(".json") for name in ObjectFolder(f"{uri}/1").names(AttemptLayout.CHECKPOINTS)):
        assert fit.poll() is None, (first / AttemptLayout.LOG).read_text()
        mirror.sync()
        time.sleep(0.1)
    fit.kill()
    fit.wait()
    record = RunRecord(store_uri, "run")
    record.write_plan(make_plan(record, 2))

    second = make_attempt(tmp_path / "second", 2, data=tmp_path / "first/data", epochs=3)
    pulled = pull_checkpoints(f"{store_uri}/run", second.folder.parents[1])
    assert pulled is not None
    fit = start_fit(second)
    mirror = Mirror(second.folder, f"{uri}/2")
    while fit.poll() is None:
        mirror.sync()
        time.sleep(0.1)
    mirror.sync()
    assert fit.returncode == 0
    assert "resuming after epoch" in (second / AttemptLayout.LOG).read_text()
    objects = ObjectFolder(f"{uri}/2")
    manifest = ResultManifest.model_validate_json(objects.get(AttemptLayout.MANIFEST) or b"")
    assert manifest.epochs == 3
    assert {name: objects.sha256(name) for name in manifest.files} == {name: file.sha256 for name, file in manifest.files.items()}
