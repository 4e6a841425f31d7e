"""Reads objects that a dataset uses where they lie, in a bucket that others write to.

Such an object is known by its identity: a hash over its source, its size and the tag that the store gives its content
(where a store gives none, the time of its last change). Every answer is compared with that, so an object that has changed
since it was registered is refused; its content itself has no digest that could be compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from trainer.errors import ExitCode, TrainerError
from trainer.packs import StagedFile
from trainer.silence import SilenceWatch
from trainer.storage import open_store, to_path, told_plainly

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

WORKERS = 64  # each waits for one small object most of the time
AHEAD = 4 * WORKERS
READ_BYTES = 2**20
LOCAL_SCHEMES = ("", "file")


def find_identity(source: str, meta: ObjectMeta) -> bytes:
    """From a listing the same as from any other answer: there some stores quote the tag, or tell parts of a second."""
    tag = (meta["e_tag"] or "").removeprefix("W/").strip('"') or meta["last_modified"].replace(microsecond=0).isoformat()
    return hashlib.sha256(f"trainyard-in-place-1\0{source}\0{tag}\0{meta['size']}".encode()).digest()


class Sources:
    """The stores that objects in place lie in, each opened once and used by all threads."""

    def __init__(self, store_uri: str) -> None:
        self._is_local = urlsplit(store_uri).scheme in LOCAL_SCHEMES
        self._opened: dict[str, ObjectStore] = {}
        self._lock = threading.Lock()

    def open(self, uri: str) -> ObjectStore:
        """Raises TrainerError: PERMISSION for a folder that a manifest from a bucket names, NOT_FOUND for a folder that is not there."""
        with self._lock:
            if uri not in self._opened:
                self._opened[uri] = self._open(uri)
            return self._opened[uri]

    def _open(self, uri: str) -> ObjectStore:
        if urlsplit(uri).scheme in LOCAL_SCHEMES:
            if not self._is_local:  # whoever may write to a bucket may not thereby read this machine's files
                message = f"a manifest in a bucket names the folder {uri}, which only one in a folder may"
                raise TrainerError(message, hint="register the dataset from a bucket", code=ExitCode.PERMISSION)
            if not to_path(uri).is_dir():
                raise TrainerError(
                    f"{to_path(uri)}, which the dataset uses in place, is not there", hint="mount it, or stage it", code=ExitCode.NOT_FOUND
                )
        return open_store(uri, "fetch")


def fetch_in_place(
    files: Iterable[StagedFile],
    store_uri: str,
    write: Callable[[StagedFile, Iterator[bytes]], None],
    on_bytes: Callable[[int], None],
    silence: SilenceWatch | None = None,
) -> None:
    """Gives each object to `write`, in threads, piece by piece. `on_bytes` gets the size of each that is done, in this thread.

    What reading raises comes out of the pieces, so whoever writes them removes what he has then.
    Raises TrainerError: DATA for an object that is gone or has changed, PERMISSION, UNAVAILABLE; and what `write` raises.
    """
    sources, watch = Sources(store_uri), silence or SilenceWatch()

    def fetch(file: StagedFile) -> int:
        write(file, _read(sources, file, watch))
        return file.size

    _in_parallel(files, fetch, on_bytes)


def verify_in_place(
    files: Iterable[StagedFile], store_uri: str, on_bytes: Callable[[int], None], silence: SilenceWatch | None = None
) -> None:
    """Asks for each object whether it is as it was registered: a request each, and no content. Raises as `fetch_in_place` does."""
    import obstore

    sources, watch = Sources(store_uri), silence or SilenceWatch()

    def verify(file: StagedFile) -> int:
        assert file.in_place is not None
        with _told(file):
            with watch.asking():
                meta = obstore.head(sources.open(file.in_place.source), file.in_place.key)
            _compare(file, meta)
        return file.size

    _in_parallel(files, verify, on_bytes)


def _in_parallel(files: Iterable[StagedFile], work: Callable[[StagedFile], int], on_bytes: Callable[[int], None]) -> None:
    """Holds only as many files as are under way, however many there are."""
    ahead: deque[Future[int]] = deque()
    pool = ThreadPoolExecutor(WORKERS)
    try:
        for file in files:
            ahead.append(pool.submit(work, file))
            if len(ahead) >= AHEAD:
                on_bytes(ahead.popleft().result())
        while ahead:
            on_bytes(ahead.popleft().result())
    finally:
        pool.shutdown(cancel_futures=True)


def _read(sources: Sources, file: StagedFile, silence: SilenceWatch) -> Iterator[bytes]:
    """Its content piece by piece, of the state that was registered and no other."""
    import obstore

    assert file.in_place is not None
    size = 0
    with _told(file):
        # Without a condition: stores differ in how they refuse one, and the answer tells of which state its content is.
        with silence.asking():
            answer = obstore.get(sources.open(file.in_place.source), file.in_place.key)
        _compare(file, answer.meta)
        for chunk in silence.each(answer.stream(min_chunk_size=READ_BYTES)):
            size += len(chunk)
            if size > file.size:
                break
            yield bytes(chunk)
    if size != file.size:
        raise _changed(file)


def _compare(file: StagedFile, meta: ObjectMeta) -> None:
    assert file.in_place is not None
    if meta["size"] != file.size or find_identity(file.in_place.source, meta) != file.sha256:
        raise _changed(file)


@contextlib.contextmanager
def _told(file: StagedFile) -> Iterator[None]:
    """The store's answers about one object in place, told with its name."""
    assert file.in_place is not None
    place = f"{file.in_place.source}/{file.in_place.key}"
    with told_plainly(place):
        try:
            yield
        except FileNotFoundError as exc:
            hint = "put it back, or register it again as before, with the same --labels and --name"
            raise TrainerError(f"{place}, which the dataset uses in place, is gone", hint=hint, code=ExitCode.DATA) from exc


def _changed(file: StagedFile) -> TrainerError:
    assert file.in_place is not None
    return TrainerError(
        f"{file.in_place.source}/{file.in_place.key} has changed since it was registered",
        hint="register it again as before, with the same --labels and --name: that makes a new version",
        code=ExitCode.DATA,
    )
