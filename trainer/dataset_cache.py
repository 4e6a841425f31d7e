"""A dataset version's files on this machine while they are used: from a cache that stays, or fetched into memory or a folder that does not.

A cache holds, for each version::

    <version>/data/          the files
    <version>/lock           shared by who uses them, exclusive for who deletes them
    <version>/data.lock      of who fetches them
    <version>/used           its bytes; its time is that of the last use
    <version>/verified       the state of the files when they were verified last

Versions used longest ago are deleted where a fetch would pass the limit, those in use never. Locks are ``flock``: on a volume
that several machines share, it must reach all of them (NFS 4, or NFS 3 with its lock daemon). Where a volume refuses locks,
each trainer fetches for itself and says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.errors import ExitCode, TrainerError
from trainer.fetching import Fetched, Progress, fetch_version, read_header
from trainer.files import NO_LOCKS, write_atomic
from trainer.locks import try_lock, wait_for_lock
from trainer.memory import read_available_memory
from trainer.packs import ManifestHeader
from trainer.storage import folders_told_plainly

MEMORY_FOLDER = Path("/dev/shm")  # noqa: S108 - a folder of a random name and for this user only is made in it
MEMORY_SHARE = 0.5  # of what is available, and of what is set aside for files; the training needs the rest
FILE_BYTES = 4096  # that a file takes beyond its content, at most about
OWN_PREFIX = "trainyard-dataset-"
DELETED_PREFIX = ".deleted-"
NEW_SECONDS = 60
VERSION = re.compile(r"[0-9a-f]{64}")

LOG = logging.getLogger(__name__)
Place = Literal["cache", "memory", "disk"]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class DatasetFolder:
    """``fetched_bytes`` are 0 where all was in the cache. ``seconds`` went by until the files were there, waiting included."""

    folder: Path
    place: Place
    files: int
    bytes: int
    fetched_files: int
    fetched_bytes: int
    seconds: float


@contextlib.contextmanager
def dataset_folder(
    store_uri: str,
    version: str,
    *,
    cache: Path | None,
    limit_bytes: int | None,
    scratch: Path,
    on_progress: Progress | None = None,
    on_message: Tell | None = None,
) -> Iterator[DatasetFolder]:
    """The files of a version, in a folder that stays while the context is open.

    With `cache` they are kept there for others and for later; without, they lie in memory if that is ample, else below
    `scratch`, and are removed at the end. `on_message` is told what a person would wonder about: who is waited for, what is
    deleted, that the store is silent. Raises TrainerError as `fetch_version` does.
    """
    if not VERSION.fullmatch(version):
        raise TrainerError(
            f"{version[:80]!r} is no dataset version", hint="a version has 64 characters of 0-9 and a-f", code=ExitCode.CONFIG
        )
    started = time.monotonic()
    tell = on_message or LOG.warning
    with contextlib.ExitStack() as stack:
        with folders_told_plainly():
            entry = stack.enter_context(_used_entry(cache, version, tell)) if cache is not None else None
        if cache is not None and entry is not None:
            place: Place = "cache"
            folder, got = _fetch_to_cache(store_uri, version, cache, entry, limit_bytes, on_progress, tell)
        else:
            with folders_told_plainly():
                header = read_header(store_uri, version)
                place = choose_place(header.bytes, header.files, _read_memory_room())
                own = stack.enter_context(_own_folder(MEMORY_FOLDER if place == "memory" else scratch))
            folder = own / "data"
            got = fetch_version(store_uri, version, folder, on_progress, on_silence=tell)
        seconds = time.monotonic() - started
        yield DatasetFolder(folder, place, got.files, got.bytes, got.fetched_files, got.fetched_bytes, seconds)


# --- Cached -------------------------------------------------------------------------------------------


def _fetch_to_cache(
    store_uri: str, version: str, cache: Path, entry: Path, limit: int | None, on_progress: Progress | None, tell: Tell
) -> tuple[Path, Fetched]:
    """A damaged entry is filled where it is: others may use what it has."""

    def wait(holder: str) -> None:
        tell(f"waiting for {holder}, which fetches dataset version {version[:12]} into the cache {cache}")

    def start(header: ManifestHeader, lacking: int) -> None:
        if limit is not None:
            _make_room(entry, header.bytes, lacking, limit, tell)
        elif not lacking:
            _promise(entry, header.bytes)

    folder = entry / "data"
    got = fetch_version(
        *(store_uri, version, folder, on_progress), on_wait=wait, on_silence=tell, repair=start, verified=entry / "verified"
    )
    with folders_told_plainly():
        _promise(entry, got.bytes)
    return folder, got


def _promise(entry: Path, size: int) -> None:
    """Others reckon with so many bytes of it, and know that it was used just now."""
    write_atomic(entry / "used", str(size).encode())


@contextlib.contextmanager
def _used_entry(cache: Path, version: str, tell: Tell) -> Iterator[Path | None]:
    """The version's folder of the cache, kept from being deleted; None where the cache's volume has no locks."""
    entry = cache / version
    try:
        lock = _share(entry / "lock")
    except OSError as exc:
        if exc.errno not in NO_LOCKS:
            raise
        tell(f"the cache {cache} is not used, as its volume has no file locks ({exc.strerror}); each trainer fetches for itself")
        yield None
        return
    try:
        yield entry
    finally:
        os.close(lock)


def _share(path: Path) -> int:
    """The descriptor of a shared lock on a file that is there: who deletes the folder takes it away with its lock."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(lock), path.stat()):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


class Entry(NamedTuple):
    version: str
    bytes: int
    used_at: float
    in_use: bool


def choose_evictions(entries: list[Entry], needed: int, limit: int) -> list[Entry]:
    """What to delete so that `needed` bytes more are within the limit: unused ones, used longest ago first."""
    over = sum(entry.bytes for entry in entries) + needed - limit
    chosen: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.used_at):
        if over <= 0:
            break
        if not entry.in_use:
            chosen.append(entry)
            over -= entry.bytes
    return chosen


def _make_room(fetched: Path, needed: int, lacking: int, limit: int, tell: Tell) -> None:
    """Deletes what was used longest ago. A version larger than the limit is fetched nevertheless, for it is needed now.

    Nothing is deleted where the disk would lack room even then: the fetch is refused.
    """
    cache, version = fetched.parent, fetched.name
    lock = wait_for_lock(cache / "deleting.lock")  # two at once would both delete for the same need
    assert lock is not None, "it waits without end"
    try:
        for left in cache.glob(f"{DELETED_PREFIX}*"):  # by one that was killed
            shutil.rmtree(left)
        entries = [_read_entry(path) for path in cache.iterdir() if VERSION.fullmatch(path.name) and path.name != version]
        chosen = choose_evictions(entries, needed, limit)
        if lacking and lacking > sum(_disk_bytes(cache / entry.version) for entry in chosen):
            return
        _promise(fetched, needed)
        total = sum(entry.bytes for entry in entries) + needed
        for entry in chosen:
            if _delete(cache / entry.version):
                total -= entry.bytes
                tell(f"deleted dataset version {entry.version[:12]} from the cache {cache}: it was used longest ago")
        if total > limit:
            others = "" if total == needed else ", and the others are in use"
            tell(f"the cache {cache} comes to {total} bytes with dataset version {version[:12]}, over its limit of {limit}{others}")
    finally:
        os.close(lock)


def _read_entry(path: Path) -> Entry:
    lock = try_lock(path / "lock")
    if lock is not None:
        os.close(lock)
    used = path / "used"
    try:
        return Entry(path.name, int(used.read_text()), used.stat().st_mtime, lock is None)
    except (FileNotFoundError, ValueError):  # of a fetch that was killed before it knew
        size = sum(file.lstat().st_size for file in path.rglob("*"))
        return Entry(path.name, size, path.stat().st_mtime, lock is None)


def _disk_bytes(path: Path) -> int:
    """By whole blocks."""
    block = os.statvfs(path).f_frsize
    return sum(-(-file.lstat().st_size // block) * block for file in path.rglob("*"))


def _delete(path: Path) -> bool:
    """Takes it aside and away. False where somebody uses it by now."""
    lock = try_lock(path / "lock")
    if lock is None:
        return False
    try:
        aside = path.with_name(f"{DELETED_PREFIX}{secrets.token_hex(8)}")
        path.rename(aside)
        shutil.rmtree(aside)
    finally:
        os.close(lock)
    return True


# --- Not cached ---------------------------------------------------------------------------------------


class MemoryRoom(NamedTuple):
    """Of the memory's file system, and what memory there is at all. Containers often cap the former at 64 MB."""

    free_bytes: int
    free_files: int
    available_bytes: int


def choose_place(size: int, files: int, room: MemoryRoom | None) -> Literal["memory", "disk"]:
    """Memory only where the files leave the training at least half of what is available, and of what is set aside for files: batches
    of its data-loading processes lie there, too."""
    if room is None:
        return "disk"
    needed = size + files * FILE_BYTES
    ample = needed <= room.free_bytes * MEMORY_SHARE and 2 * files < room.free_files and needed <= room.available_bytes * MEMORY_SHARE
    return "memory" if ample else "disk"


def _read_memory_room() -> MemoryRoom | None:
    available = read_available_memory()
    if available is None or not os.access(MEMORY_FOLDER, os.W_OK | os.X_OK):
        return None
    found = os.statvfs(MEMORY_FOLDER)
    return MemoryRoom(found.f_bavail * found.f_frsize, found.f_favail, available)


@contextlib.contextmanager
def _own_folder(parent: Path) -> Iterator[Path]:
    """A new folder that is gone at the end, and with the next one if this process is killed."""
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=OWN_PREFIX, dir=parent))
    lock = try_lock(folder / "lock")
    assert lock is not None, "nobody knows the folder yet"
    try:
        yield folder
    finally:
        # Workers of the training may still write there; what stays is removed by the next one.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    """Folders of processes that were killed: whoever lives holds its lock, but for the moment until it has it."""
    for folder in parent.glob(f"{OWN_PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):  # its owner removes it just now
            found = folder.lstat()
            if found.st_uid != os.getuid() or time.time() - found.st_mtime < NEW_SECONDS:
                continue
            lock = try_lock(folder / "lock")
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(lock)
