from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result

from blocks.deletion import StoredObject
from blocks.garbage import Reason, choose_garbage, open_marker, versions_of_open_runs
from blocks.job import JobState
from blocks.leases import LeaseFile, lease_key
from blocks.outputs import remember_output
from blocks.record import Outcome, RunRecord
from blocks.refs import read_refs
from blocks.staging import stage_folder
from flows.cli import app
from tests.unit.test_blocks_pruning import make_run
from trainer.contract import ExitCode, Task, TrainerError, TrainyardError
from trainer.dataset import DatasetFormat, DatasetIndex
from trainer.storage import list_paths, open_store

NOW = datetime(2026, 11, 24, tzinfo=UTC)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))


def stored(key: str, hours: float, size: int = 10) -> StoredObject:
    return StoredObject(key, key.partition("/")[0], size, NOW - timedelta(hours=hours), "")


def test_garbage_is_what_is_old_and_not_marked_and_manifests_go_first() -> None:
    objects = [
        stored("files/f", 30),
        stored("packs/old", 30),
        stored("packs/new", 1),
        stored("manifests/m", 30),
        stored("packs/used", 99, 7),
    ]
    garbage, kept = choose_garbage(objects, {"packs/used": Reason.PIN}, NOW - timedelta(hours=24))
    assert [found.key for found in garbage] == ["manifests/m", "packs/old", "files/f"]
    assert kept == {Reason.GRACE: (1, 10), Reason.PIN: (1, 7)}


# --- Runs ------------------------------------------------------------------------------------------------


def with_dataset(record: RunRecord, version: str) -> RunRecord:
    record.write_dataset(
        DatasetIndex(
            name="d",
            root="/d",
            format=DatasetFormat.YOLO,
            task=Task.OBJECT_DETECTION,
            classes=("a",),
            images=(),
            label_files=(),
            version=version,
            split_sources={},
        )
    )
    return record


def test_open_runs_need_their_version_and_runs_that_are_over_do_not(tmp_path: Path) -> None:
    remember_output((tmp_path / "runs").as_uri())
    with_dataset(make_run("open1234", tmp_path, None), "of the open one")
    with_dataset(make_run("done1234", tmp_path, Outcome(state=JobState.SUCCEEDED)), "of the one that is over")
    make_run("none1234", tmp_path, None)
    assert versions_of_open_runs() == {"of the open one"}


def test_a_damaged_dataset_index_of_an_open_run_is_one_error(tmp_path: Path) -> None:
    remember_output((tmp_path / "runs").as_uri())
    with_dataset(make_run("open1234", tmp_path, None), "v").folder.put("dataset.json", b"{")
    with pytest.raises(TrainerError, match="index of run open1234 is damaged"):
        versions_of_open_runs()


# --- The commands ----------------------------------------------------------------------------------------


@pytest.fixture
def store_uri(tmp_path: Path) -> str:
    """A store with one version, two days old, that a dataset names."""
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells/1.jpg").write_bytes(b"x" * 5000)
    uri = str(tmp_path / "store")
    stage_folder(tmp_path / "cells", uri)
    then = datetime.now().timestamp() - 2 * 86_400
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (then, then))
    return uri


def call(*arguments: str, keys: str | None = None) -> Result:
    return CliRunner().invoke(app, ["dataset", *arguments], input=keys)


def keys(store_uri: str) -> set[str]:
    return {key for key in list_paths(open_store(store_uri), "") if not key.endswith(".lock")}


def test_rm_and_gc_delete_nothing_where_nobody_can_be_asked(store_uri: str) -> None:
    before = keys(store_uri)
    asked = call("rm", "cells", "--store", store_uri)
    assert asked.exit_code == ExitCode.USAGE
    assert "--yes deletes without asking" in asked.output
    assert "nothing to free" in call("gc", "--store", store_uri).output
    assert keys(store_uri) == before
    assert call("rm", "cells", "--store", store_uri, "--yes").exit_code == 0
    asked = call("gc", "--store", store_uri)
    assert asked.exit_code == ExitCode.USAGE
    assert "manifests" in asked.output
    assert json.loads(call("gc", "--store", store_uri, "--json").stdout)["freed"] is None
    assert keys(store_uri) == before - {"refs/cells.json"}


@pytest.mark.parametrize(("answer", "left"), [("n", True), ("y", False)])
def test_on_a_terminal_a_person_is_asked(store_uri: str, monkeypatch: pytest.MonkeyPatch, answer: str, left: bool) -> None:
    monkeypatch.setattr("flows.cli_clean.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    done = call("rm", "cells", "--store", store_uri, keys=f"{answer}\n")
    assert "remove this dataset from the store?" in done.output
    assert ("refs/cells.json" in keys(store_uri)) is left
    if not left:
        call("gc", "--store", store_uri, keys="n\n")
        assert len(keys(store_uri)) == 2
        assert "delete this garbage for good?" in call("gc", "--store", store_uri, keys="y\n").output
        assert keys(store_uri) == {"gc.json"}


def test_gc_frees_what_is_old_and_not_needed(store_uri: str) -> None:
    call("rm", "cells", "--store", store_uri, "--yes")
    assert "nothing to free" in call("gc", "--store", store_uri, "--grace", "3d", "--yes").output
    done = call("gc", "--store", store_uri, "--yes", "--json")
    told = json.loads(done.stdout)
    assert (told["freed"]["objects"], told["freed"]["left"]) == (2, 0)
    assert told["garbage"]["packs"] == {"objects": 1, "bytes": 5120 + 512 + 1024}
    assert keys(store_uri) == {"gc.json"}


KILLED = """
import os, sys
from pathlib import Path
from blocks.sending import put_file
from trainer.storage import open_store
put_file(open_store(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), bytes(32), 40 * 2**20, lambda: os.kill(os.getpid(), 9))
"""


def test_gc_frees_what_a_killed_stage_left_half_written_in_a_folder(store_uri: str, tmp_path: Path) -> None:
    """obstore writes beside the object, under a name that it never lists, and renames at the end."""
    (tmp_path / "large.bin").write_bytes(bytes(40 * 2**20))
    key, folder = f"files/ab/{'ab' * 32}", Path(store_uri)
    command = [sys.executable, "-c", KILLED, store_uri, key, str(tmp_path / "large.bin")]
    assert subprocess.run(command, check=False, timeout=60).returncode == -signal.SIGKILL
    [half] = folder.glob("files/ab/*")
    assert half.name != Path(key).name
    foreign = [folder / "files/ab/image.jpg#1", folder / "files/report#2", folder / "notes#1"]
    for path in foreign:
        path.write_bytes(b"mine")
    ref = folder / "refs/cells.json#3"
    ref.write_bytes(b"{")
    assert "nothing to free" in call("gc", "--store", store_uri, "--grace", "0s", "--yes").output, "it may be under way"
    for path in (half, ref, *foreign):
        os.utime(path, (1e9, 1e9))
    told = json.loads(call("gc", "--store", store_uri, "--json", "--yes").stdout)
    assert told["garbage"]["unfinished"]["objects"] == told["freed"]["objects"] == 2
    assert told["freed"]["left"] == 0
    assert not half.exists()
    assert not ref.exists()
    assert all(path.exists() for path in foreign)
    assert call("verify", "cells", "--store", store_uri).exit_code == 0


def test_gc_says_what_stays_and_why(store_uri: str) -> None:
    told = json.loads(call("gc", "--store", store_uri, "--json").stdout)
    assert told == {"garbage": {}, "kept": {"ref": {"objects": 2, "bytes": told["kept"]["ref"]["bytes"]}}, "leases": [], "freed": None}
    open_store(store_uri).put(lease_key("of-a-stage"), LeaseFile(dataset="cells", host="laptop").to_json())
    open_store(store_uri).put(lease_key("of-nobody-knows"), b"{}")
    text = call("gc", "--store", store_uri, "--grace", "0s").output
    assert "kept: ref" in text
    for who in ("of 'cells' on laptop", "(leases/of-nobody-knows.json)"):
        assert re.search(re.escape(f"a stage {who} is under way; its lease was renewed ") + r"\d s ago, and ends in (600|59\d) s if", text)


def test_gc_beside_a_stage_is_one_error(store_uri: str) -> None:
    call("rm", "cells", "--store", store_uri, "--yes")
    open_store(store_uri).put(lease_key("of-a-stage"), b"{}")
    before = keys(store_uri)
    for options in ([], ["--yes"], ["--yes", "--json"]):  # also where nobody can be asked
        done = call("gc", "--store", store_uri, *options)
        assert isinstance(done.exception, TrainyardError)
        assert done.exception.code is ExitCode.OCCUPIED
        assert "its lease was renewed" in done.exception.message
    assert keys(store_uri) == before | {"gc.json"}


def test_a_name_that_is_not_there_is_one_error(store_uri: str) -> None:
    done = call("rm", "dogs", "--store", store_uri, "--yes")
    assert isinstance(done.exception, TrainyardError)
    assert done.exception.code is ExitCode.NOT_FOUND
    assert list(read_refs(open_marker(store_uri).store, store_uri).whole) == ["cells"]
