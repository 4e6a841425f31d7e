from __future__ import annotations

import errno
import fcntl
import io
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.staged_store import read_tree, write, write_store
from trainer import dataset_cache
from trainer.contract import ExitCode, TrainerError
from trainer.dataset_cache import DatasetFolder, Entry, MemoryRoom, choose_evictions, choose_place, dataset_folder
from trainer.memory import read_available_memory
from trainer.packs import ManifestHeader, StagedFile, VersionHash, manifest_key, write_manifest

ROOT = Path(__file__).resolve().parents[2]
MIB = 2**20


def files(seed: int, count: int = 20, size: int = 1000) -> dict[str, bytes]:
    rng = random.Random(seed)
    return {f"images/{seed}-{number}.jpg": rng.randbytes(size) for number in range(count)}


@pytest.fixture
def cached(tmp_path: Path) -> Any:
    """A version's files by way of the cache, from a store of its own."""
    messages: list[str] = []

    @contextmanager
    def use(seed: int, limit: int | None = None) -> Iterator[DatasetFolder]:
        version = write_store(tmp_path / "store", files(seed))
        with dataset_folder(
            str(tmp_path / "store"),
            version,
            cache=tmp_path / "cache",
            limit_bytes=limit,
            scratch=tmp_path / "scratch",
            on_message=messages.append,
        ) as found:
            yield found

    use.messages = messages  # pyright: ignore[reportFunctionMemberAccess]
    return use


USER = """
import sys, time
from pathlib import Path
import obstore
store, version, cache, log, pause = sys.argv[1:]
real = obstore.get_range
def counted(store, path, **range):
    with open(log, "a") as out:
        out.write(path + "\\n")
    time.sleep(float(pause))
    return real(store, path, **range)
obstore.get_range = counted
from trainer.dataset_cache import dataset_folder
tell = lambda message: print(message, flush=True)
with dataset_folder(store, version, cache=Path(cache), limit_bytes=None, scratch=Path(cache), on_message=tell) as found:
    print("has", found.fetched_files, flush=True)
    sys.stdin.read()
"""


@contextmanager
def user(tmp_path: Path, version: str, pause: float = 0.0) -> Iterator[subprocess.Popen[str]]:
    """Another process that uses a version of the cache until its input ends."""
    arguments = [str(tmp_path / "store"), version, str(tmp_path / "cache"), str(tmp_path / "reads.log"), str(pause)]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", USER, *arguments], cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def reads(tmp_path: Path) -> int:
    log = tmp_path / "reads.log"
    return len(log.read_text().splitlines()) if log.exists() else 0


def wait_for_reads(tmp_path: Path) -> None:
    deadline = time.monotonic() + 30
    while not reads(tmp_path):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def leave(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


# --- One fetch for all ----------------------------------------------------------------------------------


def test_a_second_use_fetches_nothing(cached: Any, tmp_path: Path) -> None:
    with cached(1) as first:
        assert (first.place, first.fetched_files) == ("cache", 20)
        assert read_tree(first.folder) == files(1)
    with cached(1) as again:
        assert (again.fetched_files, again.fetched_bytes, again.files, again.bytes) == (0, 0, 20, 20_000)
        assert read_tree(again.folder) == files(1)
    assert not (tmp_path / "scratch").exists()


def test_two_processes_at_once_fetch_once_and_the_second_says_for_whom_it_waits(tmp_path: Path) -> None:
    version = write_store(tmp_path / "store", files(1))
    with user(tmp_path, version, pause=1.5) as first:
        wait_for_reads(tmp_path)
        with user(tmp_path, version) as second:
            assert said(second).startswith(f"waiting for process {first.pid} on ")
            assert said(first) == "has 20"
            assert said(second) == "has 0"
            leave(second)
        leave(first)
    assert reads(tmp_path) == 1


def test_after_a_fetcher_that_was_killed_the_next_one_completes(cached: Any, tmp_path: Path) -> None:
    version = write_store(tmp_path / "store", files(1))
    with user(tmp_path, version, pause=30) as killed:
        wait_for_reads(tmp_path)
        killed.kill()
    with cached(1) as found:
        assert read_tree(found.folder) == files(1)
        assert sorted(path.name for path in found.folder.parent.iterdir()) == ["data", "lock", "used", "verified"]


@pytest.mark.parametrize("damage", ["gone", "cut", "another byte"])
def test_a_damaged_entry_is_mended_by_what_is_missing(cached: Any, damage: str) -> None:
    with cached(1) as first:
        victim = first.folder / "images/1-7.jpg"
    victim.unlink() if damage == "gone" else victim.write_bytes(b"half" if damage == "cut" else b"?" + victim.read_bytes()[1:])
    with cached(1) as mended:
        assert (mended.fetched_files, mended.fetched_bytes) == (1, 1000)
        assert read_tree(mended.folder) == files(1)


def test_a_volume_without_locks_is_said_and_not_used(cached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if "/cache/" in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with cached(1) as found:
        assert found.place != "cache"
        assert read_tree(found.folder) == files(1)
    assert ["no file locks" in message for message in cached.messages] == [True]


def test_what_is_no_version_names_no_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(TrainerError, match="is no dataset version") as refused,
        dataset_folder(str(tmp_path), "../../x", cache=tmp_path, limit_bytes=None, scratch=tmp_path),
    ):
        raise AssertionError("it is refused")
    assert refused.value.code is ExitCode.CONFIG


# --- The limit ------------------------------------------------------------------------------------------


def test_what_was_used_longest_ago_goes_first(cached: Any, tmp_path: Path) -> None:
    (tmp_path / "cache/not ours").mkdir(parents=True)
    folders: dict[int, Path] = {}
    for seed in (1, 2, 3, 1, 4):  # the fourth does not fit, and 1 was used after 2
        with cached(seed, limit=70_000) as found:
            folders[seed] = found.folder
            os.utime(found.folder.parent / "used", (1e9 + len(folders), 1e9 + len(folders) + (seed == 1)))
    assert {seed for seed, folder in folders.items() if folder.exists()} == {1, 3, 4}
    assert (tmp_path / "cache/not ours").exists()
    assert [message for message in cached.messages if "deleted" in message]
    with cached(2, limit=70_000) as again:
        assert again.fetched_files == 20


def test_a_version_in_use_is_never_deleted(cached: Any, tmp_path: Path) -> None:
    version = write_store(tmp_path / "store", files(1))
    with user(tmp_path, version) as process:
        assert said(process) == "has 20"
        with cached(2, limit=25_000) as found:
            assert read_tree(found.folder) == files(2)
            assert read_tree(tmp_path / "cache" / version / "data") == files(1)
        assert "the others are in use" in cached.messages[-1]
        leave(process)
    with cached(3, limit=25_000):
        assert not (tmp_path / "cache" / version).exists()


def test_a_version_above_the_limit_is_fetched_with_a_warning(cached: Any) -> None:
    with cached(1, limit=100) as found:
        assert read_tree(found.folder) == files(1)
    assert "over its limit of 100" in cached.messages[0]


def test_what_a_killed_fetch_or_deletion_left_is_deleted_too(cached: Any, tmp_path: Path) -> None:
    half = tmp_path / "cache" / ("0" * 64)
    write(half / "data.partial-000000000000/large", bytes(50_000))
    write(tmp_path / "cache/.deleted-1/x", b"x")
    with cached(1, limit=60_000):
        assert sorted(path.name for path in (tmp_path / "cache").iterdir() if path.name in (half.name, ".deleted-1")) == []


def write_manifest_of(store: Path, path: str, size: int) -> str:
    """A version of one file, by its own word whole and right; the store has nothing of it."""
    total = VersionHash()
    total.add(path, bytes(32), size)
    out = io.BytesIO()
    header = ManifestHeader(version=total.hexdigest(), files=1, bytes=size, packs=())
    write_manifest(out, header, [StagedFile(path, bytes(32), size, "", 0)])
    write(store / manifest_key(header.version), out.getvalue())
    return header.version


@pytest.mark.parametrize("limit", [30_000, None])
@pytest.mark.parametrize("lie", ["the header", "the header and a line"])
def test_a_version_that_fits_on_no_disk_empties_no_cache(cached: Any, tmp_path: Path, lie: str, limit: int | None) -> None:
    """Neither now nor, by the bytes that are remembered of it, with the next fetch."""
    with cached(1):
        pass
    if lie == "the header":
        version = write_store(tmp_path / "store", files(2), bytes=2**60)
    else:
        version = write_manifest_of(tmp_path / "store", "a", 2**60)
    told = "its files are not those of the version" if lie == "the header" else "the disk is full"
    options: dict[str, Any] = {"cache": tmp_path / "cache", "limit_bytes": limit, "scratch": tmp_path}
    with pytest.raises(TrainerError, match=told), dataset_folder(str(tmp_path / "store"), version, **options):
        raise AssertionError("it is refused")
    for seed, fetched in ((3, 20), (1, 0)):
        with cached(seed, limit=60_000) as found:
            assert found.fetched_files == fetched


def test_a_full_disk_has_room_where_an_unused_version_goes(cached: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def thirty_blocks(descriptor: int) -> Any:
        """A disk of which 20 files of less than a block take two thirds."""
        used = sum(file.is_file() and file.name.endswith(".jpg") for file in (tmp_path / "cache").rglob("*"))
        return SimpleNamespace(f_frsize=4096, f_bavail=30 - used, f_files=0, f_favail=0)

    monkeypatch.setattr(os, "fstatvfs", thirty_blocks)
    with cached(1) as first:
        pass
    with pytest.raises(TrainerError, match="the disk is full"), cached(2, limit=45_000):
        raise AssertionError("nothing has to go for the limit")
    assert read_tree(first.folder) == files(1)
    with cached(2, limit=25_000) as second:
        assert read_tree(second.folder) == files(2)
    assert not first.folder.exists()


@pytest.mark.parametrize(
    ("needed", "limit", "chosen"),
    [(10, 100, ""), (10, 60, ""), (10, 59, "a"), (10, 40, "a"), (10, 39, "ac"), (10, 5, "ac"), (100, 50, "ac")],
)
def test_unused_versions_are_chosen_by_their_last_use(needed: int, limit: int, chosen: str) -> None:
    entries = [Entry("c", 20, 3.0, False), Entry("b", 10, 2.0, True), Entry("a", 20, 1.0, False)]
    assert "".join(entry.version for entry in choose_evictions(entries, needed, limit)) == chosen


# --- Without a cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "room", "place"),
    [
        (10 * MIB, MemoryRoom(64 * MIB, 10_000, 100 * MIB), "memory"),
        (40 * MIB, MemoryRoom(64 * MIB, 10_000, 1000 * MIB), "disk"),  # /dev/shm of a container
        (60 * MIB, MemoryRoom(1000 * MIB, 10_000, 100 * MIB), "disk"),  # more than half of the memory
        (10 * MIB, MemoryRoom(64 * MIB, 150, 100 * MIB), "disk"),  # too few files
        (10 * MIB, None, "disk"),
    ],
)
def test_memory_is_chosen_only_where_it_is_ample(size: int, room: MemoryRoom | None, place: str) -> None:
    assert choose_place(size, 100, room) == place


@pytest.mark.parametrize(("room", "place"), [(None, "disk"), (MemoryRoom(2**40, 2**20, 2**40), "memory")])
def test_without_a_cache_the_files_are_gone_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: MemoryRoom | None, place: str
) -> None:
    version = write_store(tmp_path / "store", files(1))
    monkeypatch.setattr(dataset_cache, "MEMORY_FOLDER", tmp_path / "memory")
    monkeypatch.setattr(dataset_cache, "_read_memory_room", lambda: room)
    abandoned = tmp_path / {"disk": "scratch", "memory": "memory"}[place] / "trainyard-dataset-x"
    write(abandoned / "data/1.jpg", b"of a trainer that was killed")
    os.utime(abandoned, (1e9, 1e9))
    with dataset_folder(str(tmp_path / "store"), version, cache=None, limit_bytes=None, scratch=tmp_path / "scratch") as found:
        assert (found.place, found.fetched_bytes) == (place, found.bytes)
        assert read_tree(found.folder) == files(1)
        assert found.folder.parent.parent == abandoned.parent
        os.utime(found.folder.parent, (1e9, 1e9))
        with dataset_folder(str(tmp_path / "store"), version, cache=None, limit_bytes=None, scratch=tmp_path / "scratch") as other:
            assert other.folder != found.folder
        assert read_tree(found.folder) == files(1), "it is in use, however old"
    assert list(abandoned.parent.iterdir()) == []


def test_available_memory_is_the_least_of_machine_and_control_groups(tmp_path: Path) -> None:
    assert read_available_memory(tmp_path) is None
    write(tmp_path / "proc/meminfo", b"MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert read_available_memory(tmp_path) == 4000 * 1024
    write(tmp_path / "proc/self/cgroup", b"4:cpu,memory:/v1/inner\n0::/pod/container\n")
    for folder, limit in (("pod", b"3000000"), ("pod/container", b"max")):
        group = tmp_path / "sys/fs/cgroup" / folder
        write(group / "memory.max", limit + b"\n")
        write(group / "memory.current", b"1500000\n")
        write(group / "memory.stat", b"anon 7\ninactive_file 500000\n")
    assert read_available_memory(tmp_path) == 2_000_000, "a limit of the group above counts"
    old = tmp_path / "sys/fs/cgroup/memory"  # a container of cgroup 1 sees its own group at the top
    write(old / "memory.limit_in_bytes", b"1000000")
    write(old / "memory.usage_in_bytes", b"900000")
    write(old / "memory.stat", b"inactive_file 1\ntotal_inactive_file 200000\n")
    assert read_available_memory(tmp_path) == 300_000
