"""Stagers that die at any step, and stagers that meet: real processes, on all three stores."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from blocks.refs import read_ref, read_refs
from blocks.staging import stage_folder
from blocks.uploads import LARGE_BYTES
from tests.contract.staged import assert_no_duplicates, assert_same, contents, packed_bytes, record_puts, sizes, touch_old
from tests.faults import Fault, FaultProxy
from tests.stack import BIN, wait_for
from tests.stores import StoreServer, new_store
from trainer.fetching import fetch_version
from trainer.packs import END
from trainer.storage import open_store
from trainer.verifying import verify_version

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
import blocks.staging, blocks.uploads
blocks.uploads.PACK_BYTES = 60_000
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
    assert_no_duplicates(store_uri, before, contents(source), beyond=0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("part", "number"), STEPS)
def test_killed_at_a_step_then_complete(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, number: int, when: str
) -> None:
    monkeypatch.setattr("blocks.uploads.PACK_BYTES", PACK_BYTES)
    check_crash(part, when, number, store_uri, source, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", [1, 3, 4, 5])
def test_killed_at_each_pack_then_complete(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, when: str
) -> None:
    monkeypatch.setattr("blocks.uploads.PACK_BYTES", PACK_BYTES)
    check_crash("packs/", when, number, store_uri, source, tmp_path)


def test_killed_again_and_again_it_gets_on(store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stage of all dies at each of its writes in turn; each try goes on from the one before."""
    monkeypatch.setattr("blocks.uploads.PACK_BYTES", PACK_BYTES)
    for part, when in (("packs/", "before"), ("packs/", "after"), ("manifests/", "after"), ("refs/", "after")):
        crash(part, when, 1, source, store_uri)
    staged = stage_folder(source, store_uri)
    assert staged.sent_bytes == 0, "all was there"
    fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")
    assert_no_duplicates(store_uri, contents(source), beyond=0)


def test_a_large_file_that_arrived_before_the_kill_is_not_sent_again(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "large files"
    root.mkdir()
    for number in range(8):
        touch_old(root / f"{number}.bin", os.urandom(LARGE_BYTES + 1))
    crash("files/", "after", 3, root, store_uri)
    arrived = {key for key in sizes(store_uri) if key.startswith("files/")}
    assert arrived
    sent = record_puts(monkeypatch)
    staged = stage_folder(root, store_uri)
    assert not arrived & set(sent)
    files = [key for key in sent if key.startswith("files/")]
    assert len(files) <= 8 - len(arrived), "what was under way at the kill may arrive after it"
    assert verify_version(store_uri, staged.version).files == 8
    fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert_same(root, tmp_path / "copy")


# Larger files than LARGE_BYTES are sent from the disk, in a process that is killed.
STAGE = """
import sys
from pathlib import Path
import blocks.staging, blocks.uploads
blocks.uploads.PACK_BYTES = 60_000
blocks.staging.MEMORY_BYTES = blocks.uploads.LARGE_BYTES
blocks.staging.stage_folder(Path(sys.argv[1]), sys.argv[2])
"""


def count_placed(home: Path) -> int:
    """Of how many contents the stage's cache knows that the store has them."""
    [path] = (home / "staging").glob("*.sqlite")
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as cache:
        return cache.execute("SELECT count(*) FROM placed").fetchone()[0]


def test_a_kill_costs_what_was_under_way_and_nothing_that_had_arrived(
    server: StoreServer, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One large file and one pack never arrive, all that was handed in after them does. Bytes are counted before the server."""
    store_uri = new_store(server, monkeypatch, proxy.address)
    root = tmp_path / "set"
    root.mkdir()
    large_bytes, small_bytes, pack_files = LARGE_BYTES + 1, 5000, 11
    for number in range(12):
        touch_old(root / f"{number:02d}.bin", os.urandom(large_bytes))
    for number in range(200):
        touch_old(root / f"{number:03d}.jpg", os.urandom(small_bytes))
    proxy.add(Fault("stall", "PUT|POST", "/files/"), Fault("stall", "PUT", "/packs/"))
    with subprocess.Popen([sys.executable, "-c", STAGE, str(root), store_uri]) as process:
        wait_for(
            "all but two objects", lambda: proxy.met("stall") == 2 and count_placed(tmp_path / "home") == 12 + 200 - 1 - pack_files, 60
        )
        process.kill()
    proxy.requests.clear()
    monkeypatch.setattr("blocks.uploads.PACK_BYTES", PACK_BYTES)
    monkeypatch.setattr("blocks.staging.MEMORY_BYTES", LARGE_BYTES)
    staged = stage_folder(root, store_uri)
    sent = [request for request in proxy.requests if re.search(r"/(files|packs)/", request.path) and request.bytes_up]
    beside = sum(request.bytes_up for request in sent) - (large_bytes + pack_files * packed_bytes(small_bytes) + len(END))
    assert 0 <= beside < 1000, "the list of its parts, with which a file sent from the disk ends"
    assert verify_version(store_uri, staged.version).files == 212
    assert_no_duplicates(store_uri, contents(root), beyond=0)


def test_packs_that_arrived_before_anybody_wrote_it_down_are_found_by_their_names(
    store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the machine that staged is gone, and its cache with it."""
    monkeypatch.setattr("blocks.uploads.PACK_BYTES", PACK_BYTES)
    crash("packs/", "after", 4, source, store_uri)
    arrived = {key for key in sizes(store_uri) if key.startswith("packs/")}
    assert arrived
    shutil.rmtree(os.environ["TRAINYARD_HOME"])
    sent = record_puts(monkeypatch)
    staged = stage_folder(source, store_uri)
    assert not arrived & set(sent)
    assert verify_version(store_uri, staged.version).files == staged.files
    assert_no_duplicates(store_uri, contents(source), beyond=0)


def interrupt(command: list[str], proxy: FaultProxy) -> str:
    """What the command says that is stopped by Ctrl-C while the store lets a large file wait."""
    proxy.add(Fault("stall", "PUT|GET", "/files/[0-9a-f]", seconds=1.5))
    met = proxy.met("stall")
    with subprocess.Popen([str(BIN / "trainyard"), "dataset", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for("a large file under way", lambda: proxy.met("stall") > met, 30, 0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().endswith("stopped\n")
    return err.decode()


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(
    server: StoreServer, proxy: FaultProxy, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store_uri = new_store(server, monkeypatch, proxy.address)
    assert "the store keeps what has arrived: the same command goes on from there" in interrupt(
        ["stage", str(source), "--store", store_uri], proxy
    )
    proxy.requests.clear()
    staged = stage_folder(source, store_uri)
    assert not [request for request in proxy.requests if "/files/" in request.path and request.bytes_up], "it was under way, and arrived"
    copy = tmp_path / "copy"
    said = interrupt(["fetch", "source", "--store", store_uri, "--to", str(copy)], proxy)
    assert f"{copy}.partial-{staged.version[:12]} keeps what has come: the same command goes on from there" in said
    fetch_version(store_uri, staged.version, copy)
    assert_same(source, copy)


def stage_at_once(store_uri: str, *stages: tuple[Path, str, Path]) -> None:
    """The command, as several people run it: of a folder, as a dataset, with a home, whose other commands it would wait for."""
    command = [str(BIN / "trainyard"), "dataset", "stage", "--store", store_uri]
    running = [
        subprocess.Popen(
            [*command, "--name", name, str(root)],
            env={**os.environ, "TRAINYARD_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for root, name, home in stages
    ]
    for process in running:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out.decode()


def test_two_commands_stage_one_folder_at_once(store_uri: str, source: Path, tmp_path: Path) -> None:
    stage_at_once(store_uri, (source, "shared", tmp_path / "home"), (source, "shared", tmp_path / "other home"))
    ref, _ = read_ref(open_store(store_uri), store_uri, "shared")
    assert ref is not None
    assert ref.previous == ()
    assert verify_version(store_uri, ref.version).files == len(contents(source))
    assert_no_duplicates(store_uri, contents(source), beyond=0)


def test_two_commands_of_one_home_stage_one_folder_under_two_names_at_once(store_uri: str, source: Path, tmp_path: Path) -> None:
    stage_at_once(store_uri, *((source, name, tmp_path / "home") for name in ("one", "other")))
    refs = read_refs(open_store(store_uri), store_uri).whole
    assert refs["one"].version == refs["other"].version
    assert verify_version(store_uri, refs["one"].version).files == len(contents(source))
    assert_no_duplicates(store_uri, contents(source), beyond=0)


def test_two_commands_stage_two_folders_under_one_name_at_once(store_uri: str, source: Path, tmp_path: Path) -> None:
    other = shutil.copytree(source, tmp_path / "other")
    touch_old(other / "d1/img 0001 ü.jpg", b"of the other")
    stage_at_once(store_uri, (source, "shared", tmp_path / "home"), (other, "shared", tmp_path / "other home"))
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
