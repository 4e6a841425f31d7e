"""Single files to and from a store: held to their sha256, not sent twice, taken up again after a cut.

What an object holds is known by its sha256. In a bucket that stands in the object's metadata, written in one step with the
content; a store in a folder has no metadata, so there the file is read. Nothing else is kept, so whoever sends again, from
whichever machine, sends only what is missing: a push that was cut goes on file by file. Within a file it does not: obstore
cannot take up a multipart upload that another process began, so that file is sent from its start. A pull goes on within a file.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote

from trainer.contract import ManifestFile
from trainer.errors import ExitCode, TrainerError
from trainer.fetching import Progress
from trainer.locks import wait_for_lock
from trainer.packs import check_path
from trainer.silence import SilenceWatch
from trainer.storage import PATIENCE, REMOTE_SCHEMES, SEND_SECONDS, Purpose, folders_told_plainly, open_store, to_path, told_plainly

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore

T = TypeVar("T")

WORKERS = 4  # files at a time
PART_BYTES = 8 * 2**20  # smaller files are sent in one piece
PARTS = 4  # at a time, of one file: no more than WORKERS * (PARTS + 1) * PART_BYTES of memory
MOST_PARTS = 5_000  # of one object; stores allow 10,000 and more
READ_BYTES = 2**20
CONTROL = re.compile(r"[\x00-\x1f\x7f]")
DIGEST = "sha256"  # its name in an object's metadata


# --- To a store ----------------------------------------------------------------------------------------


def push_files(
    folder: Path,
    uri: str,
    names: Iterable[str],
    on_progress: Progress | None = None,
    *,
    expected: Mapping[str, ManifestFile] | None = None,
    on_silence: Callable[[str], None] | None = None,
) -> dict[str, ManifestFile]:
    """Makes the objects `names` below the URI what those files of the folder are; returns what that is.

    `expected` says what some of them have to be. `on_progress` gets bytes done and bytes in all; `on_silence` hears, from another
    thread, that the store does not answer. Raises TrainerError:
    NOT_FOUND, DATA (a file that is not as expected, or changes while it is sent: the object stays as it was),
    PERMISSION, UNAVAILABLE.
    """
    with folders_told_plainly(), told_plainly(uri), SilenceWatch(on_silence, SEND_SECONDS) as silence:
        store = open_for_files(uri)
        sizes = {checked_name(name): _size_of(folder / name) for name in names}
        wanted = expected or {}
        return in_parallel(lambda name: push_file(store, name, folder / name, wanted.get(name), silence=silence), sizes, on_progress)


def open_for_files(uri: str, purpose: Purpose = "send") -> ObjectStore:
    """The store, with a SHA-256 beside each upload to S3, which S3 compares and keeps. Every store gets its length compared."""
    from obstore.store import S3Store

    store = open_store(uri, purpose)
    if not isinstance(store, S3Store):
        return store
    return S3Store(
        prefix=store.prefix,
        config={"checksum_algorithm": "SHA256", **store.config},
        client_options=store.client_options,
        retry_config=store.retry_config,
        credential_provider=store.credential_provider,
    )


def push_file(
    store: ObjectStore,
    key: str,
    path: Path,
    expected: ManifestFile | None = None,
    *,
    before_write: Callable[[], None] = lambda: None,
    while_written: Callable[[], None] = lambda: None,
    silence: SilenceWatch | None = None,
) -> ManifestFile:
    """One file, as `push_files` does it; `before_write` is called where the object is not there yet, or is another one.

    `while_written` is called for each piece of a large file: what it raises abandons the upload. It may not use obstore.
    """
    import obstore
    from obstore.store import LocalStore

    size = _size_of(path)
    content = path.read_bytes() if size <= PART_BYTES else None
    digest = hashlib.sha256(content).hexdigest() if content is not None else _hash_file(path)
    file = ManifestFile(sha256=digest, bytes=size if content is None else len(content))
    if expected is not None and not is_same(file, expected):
        raise _changed(path)
    watch = silence or SilenceWatch()

    def on_piece() -> None:
        while_written()
        watch.answered()  # the store has taken an earlier one

    with watch.asking():
        there = stored_file(store, key)
    if is_same(there, file):
        return file
    before_write()
    with watch.asking():
        obstore.put(
            store,
            key,
            read_pieces(path, file, on_piece) if content is None else content,
            attributes=None if isinstance(store, LocalStore) else {DIGEST: file.sha256},
            chunk_size=max(PART_BYTES, file.bytes // MOST_PARTS + 1),
            max_concurrency=PARTS,
        )
        arrived = obstore.head(store, key)["size"]
    if arrived != file.bytes:
        raise TrainerError(f"{key} has {arrived} bytes in the store, and not {file.bytes}", hint="send it again", code=ExitCode.UNAVAILABLE)
    return file


def stored_file(store: ObjectStore, key: str) -> ManifestFile | None:
    """What the object holds, or None where there is none or nobody has said. A request; in a folder, the file is read."""
    import obstore
    from obstore.store import LocalStore

    try:
        found = obstore.get(store, key, options={"head": not isinstance(store, LocalStore)})
    except FileNotFoundError:
        return None
    if isinstance(store, LocalStore):
        total = hashlib.sha256()
        for chunk in found.stream(min_chunk_size=READ_BYTES):
            total.update(chunk)
        return ManifestFile(sha256=total.hexdigest(), bytes=found.meta["size"])
    # Some stores change the case of names.
    digest = {name.lower(): value for name, value in found.attributes.items()}.get(DIGEST)
    return ManifestFile(sha256=digest, bytes=found.meta["size"]) if digest else None


def is_same(found: ManifestFile | None, wanted: ManifestFile) -> bool:
    return found is not None and (found.sha256, found.bytes) == (wanted.sha256, wanted.bytes)


def read_pieces(path: Path, file: ManifestFile, while_written: Callable[[], None]) -> Iterator[bytes]:
    """The file's content; raises before its end, which abandons the upload, where it is not what was hashed."""
    total = hashlib.sha256()
    held = b""
    with path.open("rb") as opened:
        while piece := opened.read(READ_BYTES):
            while_written()
            if held:
                yield held
            total.update(piece)
            held = piece
    if total.hexdigest() != file.sha256:
        raise _changed(path)
    yield held


def _hash_file(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as exc:
        raise TrainerError(f"{path} does not exist", hint="check folder and name", code=ExitCode.NOT_FOUND) from exc


def _changed(path: Path) -> TrainerError:
    return TrainerError(f"{path} is not what it was when its hash was taken", hint="send it when it is complete", code=ExitCode.DATA)


# --- From a store --------------------------------------------------------------------------------------


def pull_files(
    uri: str,
    folder: Path,
    files: Mapping[str, ManifestFile],
    on_progress: Progress | None = None,
    *,
    on_silence: Callable[[str], None] | None = None,
) -> None:
    """Makes those files of the folder what they are said to be, from the objects below the URI. What is there already stays.

    `on_silence` hears, from another thread, that the store does not answer.
    Raises TrainerError: NOT_FOUND, DATA (an unsafe name; an object that is something else), DISK_FULL, PERMISSION, UNAVAILABLE.
    """
    with folders_told_plainly(), told_plainly(uri), SilenceWatch(on_silence, PATIENCE.total_seconds()) as silence:
        store = open_store(uri, "fetch")
        sizes = {checked_name(name): file.bytes for name, file in files.items()}
        in_parallel(lambda name: _pull_file(store, name, folder / name, files[name], silence), sizes, on_progress)


def _pull_file(store: ObjectStore, key: str, path: Path, file: ManifestFile, silence: SilenceWatch) -> None:
    if path.is_file() and path.stat().st_size == file.bytes and _hash_file(path) == file.sha256:
        return
    partial = path.with_name(f".{path.name}.partial")
    resumed = partial.exists()
    digest = _download(store, key, partial, silence, file.bytes)
    if digest != file.sha256 and resumed:  # what an earlier pull left may be the beginning of another object
        partial.unlink()
        digest = _download(store, key, partial, silence, file.bytes)
    if digest != file.sha256:
        partial.unlink()
        raise _wrong(key, f"its sha256 is not {file.sha256[:12]}...")
    partial.replace(path)


def _download(store: ObjectStore, key: str, partial: Path, silence: SilenceWatch, size: int) -> str:
    """Completes the file `partial` from the object, which has to have `size` bytes; returns the sha256 of all of it."""
    import obstore

    try:
        with silence.asking():
            meta = obstore.head(store, key)
        if meta["size"] != size:
            raise _wrong(key, f"it has {meta['size']} bytes, and not {size}")
        partial.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("a+b") as out:
            if out.tell() > meta["size"]:
                out.truncate(0)
            out.seek(0)
            total = hashlib.file_digest(out, "sha256")
            if (at := out.tell()) < meta["size"]:
                # Of this very object: one that has been replaced since is refused by the store.
                options: GetOptions = {"range": (at, meta["size"]), "if_match": meta["e_tag"]}
                with silence.asking():
                    answer = obstore.get(store, key, options=options)
                for chunk in silence.each(answer.stream(min_chunk_size=READ_BYTES)):
                    out.write(chunk)
                    total.update(chunk)
            if out.tell() != meta["size"]:
                raise TrainerError(f"{key} came only in part", hint="try again: it goes on from there", code=ExitCode.UNAVAILABLE)
            out.flush()
            os.fsync(out.fileno())
    except FileNotFoundError as exc:
        raise TrainerError(f"the store has no {key}", hint="check the URI", code=ExitCode.NOT_FOUND) from exc
    return total.hexdigest()


def fetch_weights(uri: str, folder: Path, on_silence: Callable[[str], None] | None = None) -> Path:
    """The file at a URI (``s3:// az:// gs:// file://``) as a local file, kept below `folder` and fetched once for each state of the object.

    Raises TrainerError: NOT_FOUND, CONFIG (no file's URI), DISK_FULL, PERMISSION, UNAVAILABLE.
    """
    import obstore

    parent, _, name = uri.rpartition("/")
    name = unquote(name)
    if not uri.startswith(tuple(f"{scheme}://" for scheme in REMOTE_SCHEMES)):
        path = to_path(uri)
        if not path.is_file():
            raise _no_weights(uri)
        return path
    if not name or parent.endswith(":/"):
        raise TrainerError(f"{uri!r} names no file", hint="give the whole URI of a file, as s3://bucket/model.pt", code=ExitCode.CONFIG)
    with folders_told_plainly(), told_plainly(uri), SilenceWatch(on_silence, PATIENCE.total_seconds()) as silence:
        store = open_store(parent, "fetch")
        try:
            meta = obstore.head(store, name)
        except FileNotFoundError as exc:
            raise _no_weights(uri) from exc
        state = hashlib.sha256(f"{uri}\0{meta['e_tag']}\0{meta['size']}".encode()).hexdigest()[:16]
        path = folder / state / checked_name(name)
        lock = wait_for_lock(folder / state / ".lock")  # trainers of one machine share what one of them fetches
        assert lock is not None, "it waits without end"
        try:
            if not path.is_file():
                partial = path.with_name(f".{name}.partial")
                _download(store, name, partial, silence, meta["size"])
                partial.replace(path)
        finally:
            os.close(lock)
    return path


def _no_weights(uri: str) -> TrainerError:
    return TrainerError(f"the weights file {uri} does not exist", hint="check bucket and name", code=ExitCode.NOT_FOUND)


def checked_name(name: str) -> str:
    try:
        if not_keys := CONTROL.findall(name):
            raise ValueError(f"{not_keys[0]!r} in the name {name[:200]!r}, which stores refuse,")
        return check_path(name)
    except ValueError as exc:
        raise TrainerError(f"{exc} in a list of files", hint="do not use what wrote it", code=ExitCode.DATA) from exc


def _wrong(key: str, why: str) -> TrainerError:
    return TrainerError(f"{key} in the store is not the file that is wanted: {why}", hint="send it again", code=ExitCode.DATA)


def in_parallel(work: Callable[[str], T], sizes: Mapping[str, int], on_progress: Progress | None = None) -> dict[str, T]:
    """What `work` gives for each name. The first error ends it, once what is under way has ended."""
    done, total = 0, sum(sizes.values())
    results: dict[str, T] = {}
    with ThreadPoolExecutor(WORKERS) as pool:
        futures = {pool.submit(work, name): name for name in sizes}
        try:
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                done += sizes[futures[future]]
                if on_progress:
                    on_progress(done, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: results[name] for name in sizes}
