"""Brings a staged dataset version to a folder: packs in parallel, every file's sha256 compared, taken up again after a cut.

Files are written into ``<folder>.partial-<version>`` and renamed once all are there, so the folder is whole or absent.
What a fetch that was cut left there is compared again and kept where it is right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.contract import ExitCode, TrainerError
from trainer.files import DISK_FULL, disk_full_error
from trainer.in_place import fetch_in_place, verify_in_place
from trainer.locks import wait_for_lock
from trainer.packs import (
    STAGE_AGAIN,
    ManifestHeader,
    StagedFile,
    check_version,
    manifest_key,
    merge_manifests,
    merge_ranges,
    object_key,
    open_manifest,
)
from trainer.storage import folders_told_plainly, open_store, told_plainly

if TYPE_CHECKING:
    from obstore.store import ObjectStore

WORKERS = 8
MAX_DEPTH = 64
GAP_BYTES = 2**20  # a request costs about as much as this many bytes
READ_BYTES = 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Fetched:
    version: str
    files: int
    bytes: int
    fetched_files: int
    fetched_bytes: int


def read_version(store: ObjectStore, version: str) -> tuple[ManifestHeader, Iterator[StagedFile]]:
    """Header and files of a version, in the order of their paths; they are checked while they are read.

    Raises TrainerError: NOT_FOUND for a version that is not there, DATA for a damaged manifest.
    """
    import obstore

    parts: list[Iterator[StagedFile | str]] = []
    newest: ManifestHeader | None = None
    wanted: str | None = version
    while wanted:
        try:
            data = obstore.get(store, manifest_key(wanted)).bytes()
        except FileNotFoundError as exc:
            raise TrainerError(
                f"the store has no dataset version {wanted[:12]}",
                hint="trainyard dataset list shows what it has; stage the dataset again",
                code=ExitCode.NOT_FOUND,
            ) from exc
        header, lines = open_manifest(bytes(data), wanted)
        newest = newest or header
        parts.append(lines)
        wanted = header.base
        if len(parts) > MAX_DEPTH:
            raise TrainerError(f"the manifests of version {version[:12]} name each other without end", code=ExitCode.DATA)
    assert newest is not None
    return newest, check_version(newest, merge_manifests(parts))


def fetch_version(store_uri: str, version: str, to: Path, on_progress: Progress | None = None) -> Fetched:
    """Makes `to` the files of a version. Nothing is done where it is there already.

    `on_progress` gets bytes done and bytes in all. Raises TrainerError: NOT_FOUND, DATA (damaged or hostile),
    DISK_FULL, OCCUPIED (`to` holds something else), PERMISSION and UNAVAILABLE from the store.
    """
    with told_plainly(store_uri), folders_told_plainly():
        return _fetch_locked(store_uri, version, to, on_progress)


def _fetch_locked(store_uri: str, version: str, to: Path, on_progress: Progress | None) -> Fetched:
    """One fetch at a time into a folder: concurrent trainers of a machine share it."""
    partial = to.with_name(f"{to.name}.partial-{version[:12]}")
    lock_path = to.with_name(f"{to.name}.lock")
    store = open_store(store_uri)
    lock = wait_for_lock(lock_path)
    assert lock is not None, "it waits without end"
    try:
        header, files = read_version(store, version)
        if to.exists() and any(to.iterdir()):
            got = Fetched(version, header.files, header.bytes, 0, 0) if _is_whole(to, files) else _refuse_occupied(to)
        else:
            got = _fetch_into(store, store_uri, header, list(files), partial, on_progress)
            if to.exists():
                to.rmdir()
            partial.rename(to)
        # Whoever waits for it finds the folder whole, so a lock that others cannot see any more does no harm.
        lock_path.unlink(missing_ok=True)
        return got
    finally:
        os.close(lock)


def _refuse_occupied(to: Path) -> Fetched:
    raise TrainerError(f"{to} holds other files", hint="give a new or empty folder", code=ExitCode.OCCUPIED)


def _is_whole(folder: Path, files: Iterator[StagedFile]) -> bool:
    """By size, as a rename has proven the content."""
    try:
        return all((folder / file.path).stat().st_size == file.size for file in files)
    except FileNotFoundError:
        return False


def _fetch_into(
    store: ObjectStore, store_uri: str, header: ManifestHeader, files: list[StagedFile], folder: Path, on_progress: Progress | None
) -> Fetched:
    folder.mkdir(parents=True, exist_ok=True)
    for parent in sorted({os.path.dirname(file.path) for file in files}):  # noqa: PTH120 - a million paths
        _make_folder(folder / parent, header.version)
    missing = [file for file in files if not _is_there(folder / file.path, file)]
    needed = sum(file.size for file in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrainerError(
            f"the disk is full at {folder}: {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB are free",
            hint="free some space, or choose another folder",
            code=ExitCode.DISK_FULL,
        )
    done = header.bytes - needed
    staged, in_place = [file for file in missing if not file.in_place], [file for file in missing if file.in_place]
    _in_parallel(staged, lambda same: _fetch_object(store, same, folder), done, header.bytes, on_progress)
    done += sum(file.size for file in staged)
    fetch_in_place(in_place, store_uri, partial(_write_in_place, folder), _counting(done, header.bytes, on_progress))
    return Fetched(header.version, header.files, header.bytes, len(missing), needed)


def _make_folder(path: Path, version: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as exc:
        raise TrainerError(f"version {version[:12]} has {path.name!r} as a file and as a folder", code=ExitCode.DATA) from exc


def _is_there(path: Path, file: StagedFile) -> bool:
    """Whether an earlier fetch has brought it. What is wrong is removed."""
    try:
        if path.lstat().st_size == file.size and not path.is_symlink():
            if file.in_place:  # the folder is of this version, which knows one content of the object; what fails half way is removed
                return True
            with path.open("rb") as opened:
                if hashlib.file_digest(opened, "sha256").digest() == file.sha256:
                    return True
        path.unlink()
    except FileNotFoundError:
        pass
    except IsADirectoryError as exc:
        raise TrainerError(f"{path} is a folder and should be a file", code=ExitCode.DATA) from exc
    return False


def _fetch_object(store: ObjectStore, files: list[StagedFile], folder: Path) -> int:
    """The files of one pack, or one large file. Returns their bytes."""
    if files[0].pack:
        for file, content in _read_pack(store, files):
            _write(folder / file.path, content)
    else:
        _fetch_large(store, object_key(files[0]), files, folder)
    return sum(file.size for file in files)


def _read_pack(store: ObjectStore, files: list[StagedFile]) -> Iterator[tuple[StagedFile, memoryview]]:
    """Files of one pack, sorted by offset, with their proven content. What nobody wants is not read where it is worth a request."""
    import obstore

    key = object_key(files[0])
    ranges = merge_ranges([(file.offset, file.offset + file.size) for file in files if file.size], GAP_BYTES)
    try:
        buffers = obstore.get_ranges(store, key, starts=[a for a, _ in ranges], ends=[b for _, b in ranges]) if ranges else []
    except FileNotFoundError as exc:
        raise _missing(key) from exc
    views = [(start, memoryview(buffer)) for (start, _), buffer in zip(ranges, buffers, strict=True)]
    at = 0
    for file in files:
        while at + 1 < len(views) and views[at + 1][0] <= file.offset:
            at += 1
        content = views[at][1][file.offset - views[at][0] :][: file.size] if file.size else memoryview(b"")
        if hashlib.sha256(content).digest() != file.sha256:
            raise _wrong(key, file)
        yield file, content


def _verify_object(store: ObjectStore, files: list[StagedFile]) -> int:
    if files[0].pack:
        return sum(file.size for file, _ in _read_pack(store, files))
    for _ in _read_large(store, object_key(files[0]), files[0]):
        pass
    return sum(file.size for file in files)


def verify_version(store_uri: str, version: str, on_progress: Progress | None = None) -> Fetched:
    """Reads every file of a version in the store and compares its sha256; writes nothing. Raises as `fetch_version` does.

    Files in place have no sha256 that is known: their store is asked whether they are as they were registered.
    """
    with told_plainly(store_uri):
        store = open_store(store_uri)
        header, files = read_version(store, version)
        staged, in_place = list[StagedFile](), list[StagedFile]()
        for file in files:
            (in_place if file.in_place else staged).append(file)
        _in_parallel(staged, lambda same: _verify_object(store, same), 0, header.bytes, on_progress)
        done = sum(file.size for file in staged)
        verify_in_place(in_place, store_uri, _counting(done, header.bytes, on_progress))
    return Fetched(version, header.files, header.bytes, header.files, header.bytes)


def _counting(done: int, total: int, on_progress: Progress | None) -> Callable[[int], None]:
    """Adds up sizes for whoever watches."""

    def count(size: int) -> None:
        nonlocal done
        done += size
        if on_progress:
            on_progress(done, total)

    return count


def _in_parallel(
    files: list[StagedFile], work: Callable[[list[StagedFile]], int], done: int, total: int, on_progress: Progress | None
) -> None:
    """`work` on the files of each object at a time, sorted by offset."""
    by_object = [list(same) for _, same in groupby(sorted(files, key=lambda f: (object_key(f), f.offset)), key=object_key)]
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = [pool.submit(work, same) for same in by_object]
        try:
            for future in as_completed(futures):
                done += future.result()
                if on_progress:
                    on_progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read_large(store: ObjectStore, key: str, file: StagedFile) -> Iterator[bytes]:
    """Its content piece by piece; raises at the end, or as soon as there is too much, where it is not what the manifest says."""
    import obstore

    total = hashlib.sha256()
    size = 0
    try:
        for chunk in obstore.get(store, key).stream(min_chunk_size=READ_BYTES):
            content = bytes(chunk)
            size += len(content)
            if size > file.size:
                break
            total.update(content)
            yield content
    except FileNotFoundError as exc:
        raise _missing(key) from exc
    if size != file.size or total.digest() != file.sha256:
        raise _wrong(key, file)


def _fetch_large(store: ObjectStore, key: str, files: list[StagedFile], folder: Path) -> None:
    """One object as one or, where the dataset has copies of it, several files."""
    first, *copies = files
    path = folder / first.path
    try:
        with path.open("xb") as out:
            for content in _read_large(store, key, first):
                out.write(content)
        for copy in copies:
            shutil.copyfile(path, folder / copy.path)
    except OSError as exc:
        raise _told_full(exc, path, first.size) from exc


def _write(path: Path, content: memoryview) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
        try:
            while content:
                content = content[os.write(descriptor, content) :]
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise _told_full(exc, path, len(content)) from exc


def _write_in_place(folder: Path, file: StagedFile, content: Iterator[bytes]) -> None:
    """A new file, and none where the content fails half way."""
    path = folder / file.path
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as out:
            try:
                out.writelines(content)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except OSError as exc:
        raise _told_full(exc, path, file.size) from exc


def _told_full(exc: OSError, path: Path, needed: int) -> OSError:
    return disk_full_error(path, exc.errno, needed) if exc.errno in DISK_FULL else exc


def _missing(key: str) -> TrainerError:
    return TrainerError(f"the store lacks {key}, which the manifest names", hint=STAGE_AGAIN, code=ExitCode.DATA)


def _wrong(key: str, file: StagedFile) -> TrainerError:
    return TrainerError(
        f"{file.path} in {key} is damaged: its sha256 is not {file.sha256.hex()[:12]}...",
        hint=STAGE_AGAIN,
        code=ExitCode.DATA,
    )
