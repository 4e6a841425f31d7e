from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.fit_rig import epochs_of, make_attempt, make_dataset, start_fit, wait_until
from trainer import task
from trainer.contract import ENV_HOME, AttemptLayout, ExitCode, Phase, Progress, ResultManifest, TrainerError
from trainer.progress import ProgressWriter, read_lines
from trainer.stopping import Stopper, StopRequested

# Not importorskip: an import here would come before a fit sets where Ultralytics keeps its settings, and ask the network.
pytestmark = pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra `train`: uv sync --extra train")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home of its own, and the environment as it was: a fit inside this process changes it."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("home")
    os.environ[ENV_HOME] = str(folder)
    yield folder
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> AttemptLayout:
    """An attempt that was trained for two epochs."""
    layout = make_attempt(tmp_path_factory.mktemp("finished"))
    task.fit(layout)
    return layout


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> AttemptLayout:
    """An attempt of four epochs whose process was killed in the third."""
    layout = make_attempt(tmp_path_factory.mktemp("killed"), epochs=4)
    process = start_fit(layout)
    # The checkpoint comes first, the epoch's line a moment later.
    progress = layout / AttemptLayout.PROGRESS_LINES
    wait_until(lambda: progress.exists() and len(progress.read_text().splitlines()) == 2, process)
    process.kill()
    process.wait()
    return layout


def copy_run(layout: AttemptLayout, base: Path) -> AttemptLayout:
    """The run's folder copied to `base`, where a test may damage it. The dataset stays where it is."""
    source = layout.folder.parents[2]
    shutil.copytree(source / "run", base / "run", symlinks=True)
    (base / "index.json").write_bytes((source / "index.json").read_bytes())
    return AttemptLayout(base / "run" / "attempts" / layout.folder.name)


def read(layout: AttemptLayout, name: str) -> dict[str, Any]:
    return json.loads((layout / name).read_text(), parse_constant=pytest.fail)


# --- A whole fit ---------------------------------------------------------------------------------------


def test_the_manifest_lists_every_result_file_with_its_hash(finished: AttemptLayout) -> None:
    manifest = ResultManifest.model_validate_json((finished / AttemptLayout.MANIFEST).read_bytes())
    assert {*AttemptLayout.RESULT_FILES, "samples/grid.jpg"} <= manifest.files.keys()
    for name, file in manifest.files.items():
        data = (finished / name).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (file.sha256, file.bytes), name
    assert (manifest.epochs, manifest.metrics_split, manifest.run_id) == (2, "test", "run")
    assert {"torch", "ultralytics", "albumentations", "python"} <= manifest.versions.keys()


def test_progress_has_one_line_per_epoch_and_ends_as_finishing(finished: AttemptLayout) -> None:
    lines = read_lines(finished / AttemptLayout.PROGRESS_LINES)
    assert [line.epoch for line in lines] == [1, 2]
    for line in lines:
        assert line.metrics.keys() == {"map50", "map50_95", "precision", "recall"}
        assert any(name.startswith("train/") for name in line.losses)
        assert line.steps == 2
        assert line.images_per_second
        assert line.data_wait_share is not None
        assert 0 <= line.data_wait_share <= 1
        assert line.memory_gib
    latest = Progress.model_validate_json((finished / AttemptLayout.PROGRESS).read_bytes())
    assert (latest.phase, latest.epoch, latest.fraction) == (Phase.FINISHING, 2, 1.0)


def test_metrics_and_evaluation_describe_the_test_split(finished: AttemptLayout) -> None:
    metrics = read(finished, AttemptLayout.METRICS)
    assert metrics["split"] == "test"
    assert metrics["val"].keys() == {"map50", "map50_95", "precision", "recall"}
    evaluation = read(finished, AttemptLayout.EVALUATION)
    assert [row["name"] for row in evaluation["classes"]] == ["circle", "square", "triangle"]
    assert evaluation["images"] == 6
    confusion = evaluation["confusion_matrix"]
    assert confusion["classes"][-1] == "background"
    for row, counts in zip(evaluation["classes"], confusion["counts"], strict=False):
        assert sum(counts) == row["instances"]
        if row["instances"]:
            assert len(row["pr_curve"]["recall"]) == len(row["pr_curve"]["precision"]) <= 101


def test_what_the_fit_needed_is_gone_and_what_it_measured_stays(finished: AttemptLayout) -> None:
    assert not (finished / AttemptLayout.WORK).exists()
    assert not (finished / AttemptLayout.FAILURE).exists()
    assert read(finished, task.PHASES).keys() == {"fetching", "importing", "preparing", "training", "evaluating", "finishing"}


def test_a_checkpoint_of_the_last_epoch_is_only_finished(finished: AttemptLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = copy_run(finished, tmp_path)
    (copied / AttemptLayout.MANIFEST).unlink()
    layout = make_attempt(tmp_path, 2)
    monkeypatch.setattr(task, "train", lambda *_: pytest.fail("it trained"))
    manifest = task.fit(layout)
    assert (manifest.epochs, manifest.attempt) == (2, 2)
    assert read(layout, AttemptLayout.METRICS) == read(finished, AttemptLayout.METRICS)


def test_an_old_attempt_keeps_its_result_back(finished: AttemptLayout, tmp_path: Path) -> None:
    layout = copy_run(finished, tmp_path)
    make_attempt(tmp_path, 3)
    with pytest.raises(TrainerError, match=r"newer attempt exists \(3\)") as caught:
        task.fit(layout)
    assert caught.value.code == ExitCode.OCCUPIED
    assert not (layout / AttemptLayout.MANIFEST).exists()


def test_a_newer_attempt_that_comes_while_the_manifest_is_written_wins(
    finished: AttemptLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = copy_run(finished, tmp_path)
    (layout.folder.parent / "2").mkdir()  # a folder alone is nobody's attempt
    real = task.write_json

    def write(path: Path, value: Any) -> None:
        real(path, value)
        if path.name == AttemptLayout.MANIFEST:
            (layout.folder.parent / "2" / AttemptLayout.PLAN).write_text("{}")

    monkeypatch.setattr(task, "write_json", write)
    assert task.run(layout, Stopper()) == ExitCode.OCCUPIED
    assert not (layout / AttemptLayout.MANIFEST).exists()
    assert "newer attempt exists (2)" in read(layout, AttemptLayout.FAILURE)["message"]


# --- The data ------------------------------------------------------------------------------------------


def test_data_that_changed_before_the_start_are_refused(tmp_path: Path) -> None:
    layout = make_attempt(tmp_path)
    changed = sorted((tmp_path / "data").rglob("*.txt"))[0]
    changed.write_text("0 0.5 0.5 0.1 0.1\n")
    assert task.run(layout, Stopper()) == ExitCode.DATA
    failure = read(layout, AttemptLayout.FAILURE)
    assert changed.name in failure["message"]
    assert failure["reason"] == "data"


def test_data_that_change_during_the_training_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_attempt(tmp_path, epochs=3)
    victim = sorted((tmp_path / "data").rglob("*.txt"))[0]
    finish = ProgressWriter.finish_epoch

    def finish_and_change(self: ProgressWriter) -> None:
        finish(self)
        victim.write_text("0 0.5 0.5 0.1 0.1\n")

    monkeypatch.setattr(ProgressWriter, "finish_epoch", finish_and_change)
    assert task.run(layout, Stopper()) == ExitCode.DATA
    assert victim.name in read(layout, AttemptLayout.FAILURE)["message"]
    assert [path.name for path in (layout / "checkpoints").glob("*.pt")] == ["epoch-0001.pt"]


def test_another_dataset_version_is_refused(tmp_path: Path) -> None:
    layout = make_attempt(tmp_path)
    config = read(layout, AttemptLayout.CONFIG)
    config["dataset"]["version"] = "0" * 64
    (layout / AttemptLayout.CONFIG).write_text(json.dumps(config))
    with pytest.raises(TrainerError, match="the index describes dataset version") as caught:
        task.fit(layout)
    assert caught.value.code == ExitCode.DATA


# --- Resuming ------------------------------------------------------------------------------------------


def steps_in(checkpoint: Path) -> int:
    """Optimizer steps that the checkpoint counts."""
    import torch

    state = torch.load(checkpoint, map_location="cpu", weights_only=False)["optimizer"]["state"]
    return max(int(value["step"]) for value in state.values())


def test_a_killed_training_goes_on_where_it_was(killed: AttemptLayout, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy_run(killed, tmp_path)
    layout = make_attempt(tmp_path, 2, epochs=4)
    with caplog.at_level("INFO", logger="trainer"):
        manifest = task.fit(layout)
    assert manifest.epochs == 4
    assert epochs_of(killed) == [1, 2]
    assert epochs_of(layout) == [3, 4]
    # Two steps an epoch: the optimizer's own count tells that its state came along.
    assert steps_in(killed / "checkpoints" / "epoch-0002.pt") == 4
    assert steps_in(layout / "checkpoints" / "epoch-0004.pt") == 8
    assert "resuming after epoch 2 of 4 (attempt 1)" in caplog.text
    assert "4 steps" in caplog.text


def test_the_learning_rate_goes_on_as_if_uninterrupted(killed: AttemptLayout, tmp_path: Path) -> None:
    whole = make_attempt(tmp_path / "whole", epochs=4, data=killed.folder.parents[2] / "data")
    task.fit(whole)
    copy_run(killed, tmp_path / "resumed")
    layout = make_attempt(tmp_path / "resumed", 2, epochs=4)
    task.fit(layout)
    rates = [line.learning_rate for line in read_lines(whole / AttemptLayout.PROGRESS_LINES)]
    again = [line.learning_rate for part in (killed, layout) for line in read_lines(part / AttemptLayout.PROGRESS_LINES)]
    assert again == pytest.approx(rates)


def test_a_truncated_newest_checkpoint_falls_back(killed: AttemptLayout, tmp_path: Path) -> None:
    copied = copy_run(killed, tmp_path)
    newest = copied / "checkpoints" / "epoch-0002.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    before = {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*")}
    layout = make_attempt(tmp_path, 2, epochs=4)
    messages: list[str] = []

    def note(context: Any, *_: Any) -> None:
        messages.append(context.progress.latest.message)
        raise StopRequested("seen enough")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "train", note)
        assert task.run(layout, Stopper()) == ExitCode.PREEMPTED
    assert "resuming after epoch 1 of 4" in messages[0]
    assert "epoch-0002.pt" in messages[0]
    task.fit(layout)
    assert epochs_of(layout) == [2, 3, 4]
    assert before == {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*")}


def test_a_changed_configuration_is_refused(killed: AttemptLayout, tmp_path: Path) -> None:
    copy_run(killed, tmp_path)
    layout = make_attempt(tmp_path, 2, epochs=5)
    assert task.run(layout, Stopper()) == ExitCode.CONFIG
    assert "epochs was 4, is 5" in read(layout, AttemptLayout.FAILURE)["message"]
    assert not epochs_of(layout)


# --- Stopping ------------------------------------------------------------------------------------------


def test_sigterm_while_training_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    layout = make_attempt(tmp_path, epochs=500)
    process = start_fit(layout)
    wait_until((layout / "checkpoints" / "epoch-0001.pt").exists, process)
    sent = time.monotonic()
    process.terminate()
    assert process.wait(20) == ExitCode.PREEMPTED
    assert time.monotonic() - sent < 5
    failure = read(layout, AttemptLayout.FAILURE)
    epoch = epochs_of(layout)[-1]
    assert failure["code"] == ExitCode.PREEMPTED
    assert f"told to stop (SIGTERM); checkpoint of epoch {epoch} saved" == failure["message"]
    assert not (layout / AttemptLayout.WORK).exists()


def test_sigterm_while_importing_stops_at_once(tmp_path: Path) -> None:
    layout = make_attempt(tmp_path)
    process = start_fit(layout)
    progress = layout / AttemptLayout.PROGRESS
    wait_until(lambda: progress.exists() and "loading yolo" in progress.read_text(), process)
    process.terminate()
    assert process.wait(20) == ExitCode.PREEMPTED
    assert "no epoch was finished yet" in read(layout, AttemptLayout.FAILURE)["message"]


# --- The network ---------------------------------------------------------------------------------------

_SPY = """
import socket, sys
def spy(name, real):
    def call(*args, **kwargs):
        print("LOOKUP", name, args[:2], file=sys.stderr, flush=True)
        return real(*args, **kwargs)
    return call
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection"):
    setattr(socket, name, spy(name, getattr(socket, name)))
def refuse(event, args):
    if event == "socket.connect" and args[0].family != socket.AF_UNIX:
        print("LOOKUP connect", args[1], file=sys.stderr, flush=True)
sys.addaudithook(refuse)
sys.addaudithook(lambda event, args: event.startswith("socket.getaddrinfo") and print("LOOKUP", args, file=sys.stderr, flush=True))
from trainer.task import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_whole_fit_looks_up_no_host(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "data")
    description = data / "data.yaml"
    description.write_text(description.read_text().replace("circle", "Kreisförmig 円"))  # asks for another font
    layout = make_attempt(tmp_path, data=data, epochs=1)
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("YOLO_", "NO_ALBUMENTATIONS"))}
    result = subprocess.run(
        [sys.executable, "-c", _SPY, "--attempt-dir", str(layout.folder)],
        cwd=root,
        env={**environment, ENV_HOME: str(tmp_path / "home"), "ULTRALYTICS_API_KEY": "ul_" + "0" * 40},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "LOOKUP" not in result.stderr
    assert (layout / AttemptLayout.MANIFEST).exists()


# --- Failures -------------------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as torch's, which this test need not import."""


@pytest.mark.parametrize(
    ("exc", "code", "words"),
    [
        (TrainerError("x", code=ExitCode.DATA), ExitCode.DATA, "x"),
        (MemoryError(), ExitCode.OUT_OF_MEMORY, "out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried"), ExitCode.OUT_OF_MEMORY, "CUDA"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), ExitCode.OUT_OF_MEMORY, "allocate"),
        (OSError(28, "No space left on device", "/out/a"), ExitCode.DISK_FULL, "/out/a"),
        (PermissionError(13, "Permission denied", "/out/b"), ExitCode.PERMISSION, "/out/b"),
        (ValueError("two\nlines"), ExitCode.USER_CODE, "ValueError: two lines"),
    ],
)
def test_every_failure_has_a_code_and_says_what_happened(exc: Exception, code: ExitCode, words: str) -> None:
    error = task.explain(exc)
    assert error.code == code
    assert words in error.message
    assert "\n" not in error.message


def test_an_unexpected_failure_is_explained_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make_attempt(tmp_path)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(task, "train", fail)
    assert task.run(layout, Stopper()) == ExitCode.USER_CODE
    assert read(layout, AttemptLayout.FAILURE) == {
        "code": 70,
        "reason": "user-code",
        "message": "ZeroDivisionError: division by zero",
        "hint": "the log has the traceback",
    }


def test_a_folder_without_a_job_is_refused(tmp_path: Path) -> None:
    assert task.run(AttemptLayout(tmp_path / "1"), Stopper()) == ExitCode.CONFIG
