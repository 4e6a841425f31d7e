"""Sends packs and large files, which are immutable and named by their content, so that to send one twice changes nothing."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.reading import changed_error
from blocks.scanning import Stat, stat_of, vanished_error
from trainer.storage import list_metadata

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES = 8 * 2**20  # a file too large to hold is sent in parts
PARTS_AT_ONCE = 4
MOST_PARTS = 10_000  # of S3
# Of larger files each part is told: on 10 MB/s they take about as long as a store may be silent. It has its price, as the library reads
# a file of its own twice as fast: 300 MB to a folder in memory in 1.4 s, told in 2.4 s.
TOLD_BYTES = 256 * 2**20


def put_object(store: ObjectStore, key: str, content: bytes | bytearray) -> None:
    """Immutable content under its own name: to write it twice changes nothing, so a retry is safe."""
    import obstore

    obstore.put(store, key, content, use_multipart=False)


class _PartsRead(io.FileIO):
    """A file that tells when a part is read, which is when the store has taken an earlier one."""

    def __init__(self, path: Path, on_part: Callable[[], None]) -> None:
        super().__init__(path)
        self._on_part = on_part

    def read(self, size: int | None = -1, /) -> bytes:
        self._on_part()
        return super().read(-1 if size is None else size)


def _open(path: Path, size: int, on_part: Callable[[], None]) -> AbstractContextManager[Path | _PartsRead]:
    return nullcontext(path) if size < TOLD_BYTES else _PartsRead(path, on_part)


def put_file(store: ObjectStore, key: str, path: Path, found: Stat, on_part: Callable[[], None] = lambda: None) -> None:
    """Sends a file too large to hold, which was `found` so when it was hashed. What changed since is not kept under that hash.

    `on_part` is called at each part of a very large one that is on its way.
    """
    import obstore
    from obstore.exceptions import BaseError

    chunk_size = max(PART_BYTES, -(-found.size // MOST_PARTS))
    try:
        with _open(path, found.size, on_part) as file:
            obstore.put(store, key, file, chunk_size=chunk_size, max_concurrency=PARTS_AT_ONCE)
    except (BaseError, FileNotFoundError) as exc:
        # obstore repeats the end of an upload in parts where the answer is lost, and the store knows those parts no more.
        if not path.exists():
            raise vanished_error(str(path)) from exc
        if not any(code in str(exc) for code in ("InvalidBlockList", "NoSuchUpload")):
            raise
        with _open(path, found.size, on_part) as file:
            obstore.put(store, key, file, chunk_size=chunk_size, max_concurrency=PARTS_AT_ONCE)
    if not path.exists() or stat_of(path.stat()) != found:
        obstore.delete(store, key)
        raise changed_error(str(path))


def list_objects(store: ObjectStore) -> set[str]:
    """Names of all packs and large files of the store."""
    return object_names(list_sizes(store))


def list_sizes(store: ObjectStore) -> dict[str, int]:
    """Keys of all packs and large files of the store, with their bytes."""
    return {meta["path"]: meta["size"] for prefix in ("packs", "files") for meta in list_metadata(store, prefix)}


def object_names(keys: Iterable[str]) -> set[str]:
    return {key.rsplit("/", 1)[-1].removesuffix(".tar") for key in keys}
