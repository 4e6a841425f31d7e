"""A disk that is really full: a small file system in memory, which only root may mount."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.fit_rig import epochs_of, make_attempt, make_dataset, start_fit, wait_until
from tests.staged_store import write_store
from trainer import task
from trainer.checkpoint import hash_file, list_checkpoints, read_record
from trainer.contract import ENV_HOME, AttemptLayout, ExitCode, ResultManifest, TrainerError
from trainer.fetching import fetch_version
from trainer.files import write_atomic
from trainer.storage import ObjectFolder

needs_ultralytics = pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra `train`: uv sync --extra train")
SIZE_MIB = 64


def mount(folder: Path, *options: str) -> None:
    result = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], check=False, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"cannot mount a small file system: {result.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount(folder, "-o", f"size={SIZE_MIB}m")
    except FileNotFoundError:
        pytest.skip("cannot mount a small file system: there is no mount(8)")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 65536)
    assert os.statvfs(folder).f_bavail == 0
    return filler


def test_a_full_disk_has_one_error_whatever_writes(disk: Path) -> None:
    folder = ObjectFolder(str(disk / "run"))
    folder.put("a.json", b"old")
    write_atomic(disk / "b.json", b"old")
    fill(disk)
    for write in (
        lambda data: folder.put("a.json", data),
        lambda data: folder.create("c.json", data),
        lambda data: write_atomic(disk / "b.json", data),
    ):
        with pytest.raises(OSError, match=r"2\.0 MiB needed, 0\.0 MiB are free") as caught:
            write(b"x" * 2**21)
        assert caught.value.errno == errno.ENOSPC
        error = task.explain(caught.value)
        assert error.code == ExitCode.DISK_FULL
        assert str(disk) in error.message
    assert folder.get("a.json") == b"old"
    assert (disk / "b.json").read_bytes() == b"old"
    assert folder.names() == ["a.json"]


def test_a_full_disk_is_found_inside_another_librarys_error() -> None:
    wrapper = RuntimeError("could not save")
    wrapper.__cause__ = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "/out/x")
    assert task.explain(wrapper).code == ExitCode.DISK_FULL
    assert "/out/x" in task.explain(wrapper).message
    assert task.explain(RuntimeError("write failed: No space left on device")).code == ExitCode.DISK_FULL


@pytest.mark.parametrize(
    ("options", "folders", "why"),
    [("nr_inodes=60", 1, "more files and folders, and 101 are needed"), (f"size={SIZE_MIB}m", 200, "the disk is full")],
)
def test_folders_that_do_not_fit_are_refused_before_one_is_made(disk: Path, tmp_path: Path, options: str, folders: int, why: str) -> None:
    """A file of one byte may need a hundred; a block each."""
    mount(disk, "-o", f"remount,{options}")
    version = write_store(tmp_path / "store", {f"{number}/{'d/' * 99}1.txt": b"x" for number in range(folders)})
    for _ in ("first", "taken up again"):
        with pytest.raises(TrainerError, match=why) as refused:
            fetch_version(str(tmp_path / "store"), version, disk / "copy")
        assert refused.value.code is ExitCode.DISK_FULL
        assert list((disk / f"copy.partial-{version[:12]}").iterdir()) == []


@needs_ultralytics
def test_a_training_on_a_full_disk_keeps_its_checkpoint_and_goes_on_from_it(
    disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_HOME, str(tmp_path / "home"))
    data = make_dataset(tmp_path / "data", train=48)
    first = make_attempt(disk, data=data, epochs=5)
    process = start_fit(first)
    wait_until(lambda: len(epochs_of(first)) >= 1, process, 120)
    fill(disk)
    assert process.wait(120) == ExitCode.DISK_FULL, (first / AttemptLayout.LOG).read_text()[-2000:]
    failure = json.loads((first / AttemptLayout.FAILURE).read_bytes())
    assert failure["code"] == ExitCode.DISK_FULL
    assert "disk is full" in failure["message"]
    assert str(disk) in failure["message"]
    newest = list_checkpoints(first)[0]
    record = read_record(newest)
    assert record is not None
    assert record.sha256 == hash_file(newest)
    assert not list(first.folder.rglob("*.tmp"))

    mount(disk, "-o", f"remount,size={4 * SIZE_MIB}m")
    second = make_attempt(disk, 2, epochs=5)
    process = start_fit(second)
    assert process.wait(300) == ExitCode.OK, (second / AttemptLayout.LOG).read_text()[-2000:]
    assert epochs_of(second) == list(range(record.epoch + 1, 6))
    assert ResultManifest.model_validate_json((second / AttemptLayout.MANIFEST).read_bytes()).epochs == 5
