"""Stagers that die at any step, and stagers that meet: real processes, on all three stores."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from blocks.refs import read_ref
from blocks.staging import LARGE_BYTES, stage_folder
from tests.contract.staged import assert_no_duplicates, assert_same, contents, sizes, touch_old
from tests.stack import BIN
from trainer.fetching import fetch_version, verify_version
from trainer.storage import open_store

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PACK_BYTES = 60_000
# Dies before or after the n-th write whose key has a given part. Threads write, so the n-th of one kind is what can be told.
CRASH = """
import os, sys
import obstore
from pathlib import Path
part, when, number, root, store = sys.argv[1:]
put, seen = obstore.put, 0
def dying(to, path, data, **options):
    global seen
    mine = part in str(path)
    seen += mine
    if mine and when == "before" and seen == int(number):
        os.kill(os.getpid(), 9)
    answer = put(to, path, data, **options)
    if mine and when == "after" and seen >= int(number):
        os.kill(os.getpid(), 9)
    return answer
obstore.put = dying
import blocks.staging
blocks.staging.PACK_BYTES = 60_000
blocks.staging.stage_folder(Path(root), store)
"""
STEPS = [("packs/", 2), ("files/", 1), ("manifests/", 1), ("refs/", 1)]


def crash(part: str, when: str, number: int, root: Path, store_uri: str) -> None:
    command = [sys.executable, "-c", CRASH, part, when, str(number), str(root), store_uri]
    done = subprocess.run(command, check=False, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def check_crash(part: str, when: str, number: int, store_uri: str, source: Path, folder: Path) -> None:
    """A version is there; the next one dies on its way; the first is whole, and staging again completes without sending anything twice."""
    before = contents(source)
    first = stage_folder(source, store_uri)
    for path in sorted(source.rglob("img *.jpg"))[::2]:
        touch_old(path, path.read_bytes() + b"changed")
    touch_old(source / "large.bin", (source / "large.bin").read_bytes() + b"changed")
    crash(part, when, number, source, store_uri)
    ref, _ = read_ref(open_store(store_uri), store_uri, "source")
    assert ref is not None
    moved = ref.version != first.version
    assert moved == ((part, when) == ("refs/", "after")), "the ref moves last"
    assert verify_version(store_uri, first.version).files == first.files
    assert verify_version(store_uri, ref.version).files == first.files
    second = stage_folder(source, store_uri)
    assert second.version != first.version
    fetch_version(store_uri, second.version, folder / "copy")
    assert_same(source, folder / "copy")
    assert_no_duplicates(store_uri, before, contents(source), beyond=PACK_BYTES)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("part", "number"), STEPS)
def test_killed_at_a_step_then_complete(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, number: int, when: str
) -> None:
    monkeypatch.setattr("blocks.staging.PACK_BYTES", PACK_BYTES)
    check_crash(part, when, number, store_uri, source, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_killed_at_each_pack_then_complete(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, when: str
) -> None:
    monkeypatch.setattr("blocks.staging.PACK_BYTES", PACK_BYTES)
    check_crash("packs/", when, number, store_uri, source, tmp_path)


def test_killed_again_and_again_it_gets_on(store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage of all dies after each of its writes in turn; each try goes on from the one before."""
    monkeypatch.setattr("blocks.staging.PACK_BYTES", PACK_BYTES)
    for part in ("files/", "packs/", "packs/", "manifests/", "refs/"):
        crash(part, "after", 1, source, store_uri)
    staged = stage_folder(source, store_uri)
    assert staged.sent_bytes == 0, "all was there"
    fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")
    assert_no_duplicates(store_uri, contents(source), beyond=PACK_BYTES)


def test_a_large_file_that_arrived_before_the_kill_is_not_sent_again(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    root = tmp_path / "large files"
    root.mkdir()
    for number in range(8):
        touch_old(root / f"{number}.bin", os.urandom(LARGE_BYTES + 1))
    crash("files/", "after", 3, root, store_uri)
    arrived = {key for key in sizes(store_uri) if key.startswith("files/")}
    assert arrived
    sent: dict[str, int] = {}
    put = obstore.put

    def counted(to: ObjectStore, path: str, data: Any, **options: Any) -> object:
        if path.startswith("files/"):
            sent[path] = sent.get(path, 0) + len(data)
        return put(to, path, data, **options)

    monkeypatch.setattr(obstore, "put", counted)
    staged = stage_folder(root, store_uri)
    assert not arrived & set(sent)
    assert sum(sent.values()) <= (8 - len(arrived)) * (LARGE_BYTES + 1), "what was under way at the kill may arrive after it"
    assert verify_version(store_uri, staged.version).files == 8
    fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert_same(root, tmp_path / "copy")


def stage_at_once(store_uri: str, *roots: Path) -> None:
    """The command, as two people run it."""
    command = [str(BIN / "trainyard"), "dataset", "stage", "--store", store_uri, "--name", "shared"]
    running = [subprocess.Popen([*command, str(root)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for root in roots]
    for process in running:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out.decode()


def test_two_commands_stage_one_folder_at_once(store_uri: str, source: Path) -> None:
    stage_at_once(store_uri, source, source)
    ref, _ = read_ref(open_store(store_uri), store_uri, "shared")
    assert ref is not None
    assert ref.previous == ()
    assert verify_version(store_uri, ref.version).files == len(contents(source))
    assert_no_duplicates(store_uri, contents(source), beyond=0)


def test_two_commands_stage_two_folders_under_one_name_at_once(store_uri: str, source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    touch_old(other / "d1/img 0001 ü.jpg", b"of the other")
    stage_at_once(store_uri, source, other)
    ref, _ = read_ref(open_store(store_uri), store_uri, "shared")
    assert ref is not None
    versions = {ref.version, *ref.previous}
    assert len(versions) == 2, "neither is lost"
    for number, version in enumerate(versions):
        fetch_version(store_uri, version, tmp_path / f"copy {number}")
    copies = [contents(tmp_path / f"copy {number}") for number in range(2)]
    assert contents(source) in copies
    assert contents(other) in copies


@pytest.fixture(scope="module")
def twenty_thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many") / "twenty thousand"
    for folder in range(100):
        (root / f"{folder:02d}").mkdir(parents=True)
        for number in range(200):
            path = root / f"{folder:02d}/{number:03d}.txt"
            path.write_bytes(f"{folder} {number}".encode())
            os.utime(path, (1e9, 1e9))
    return root


def test_one_changed_file_of_twenty_thousand_sends_that_file(store_uri: str, twenty_thousand: Path) -> None:
    """Its pack, a manifest that says what differs, and the ref: together at most 4 KiB more than the file."""
    changed = twenty_thousand / "50/100.txt"
    changed.write_bytes(b"as at first")
    os.utime(changed, (1e9, 1e9))
    first = stage_folder(twenty_thousand, store_uri, "many")
    assert first.files == 20_000
    before = sizes(store_uri)
    touch_old(changed, os.urandom(8192))
    second = stage_folder(twenty_thousand, store_uri, "many")
    assert second.changed_files == 1
    after = sizes(store_uri)
    written = {key: size for key, size in after.items() if key not in before or key == "refs/many.json"}
    assert sorted(key.split("/")[0] for key in written) == ["manifests", "packs", "refs"]
    assert 8192 <= sum(written.values()) <= 8192 + 4096
    assert second.sent_bytes <= 8192 + 4096
    assert verify_version(store_uri, second.version).files == 20_000
