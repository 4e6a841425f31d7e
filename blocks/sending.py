"""Sends packs and large files, which are immutable and named by their content, so that to send one twice changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blocks.reading import changed_error
from blocks.scanning import Stat, stat_of, vanished_error
from trainer.storage import list_paths

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES = 8 * 2**20  # a file too large to hold is sent in parts
PARTS_AT_ONCE = 4
MOST_PARTS = 10_000  # of S3


def put_object(store: ObjectStore, key: str, content: bytes | bytearray) -> None:
    """Immutable content under its own name: to write it twice changes nothing, so a retry is safe."""
    import obstore

    obstore.put(store, key, content, use_multipart=False)


def put_file(store: ObjectStore, key: str, path: Path, found: Stat) -> None:
    """Sends a file too large to hold, which was `found` so when it was hashed. What changed since is not kept under that hash."""
    import obstore
    from obstore.exceptions import BaseError

    chunk_size = max(PART_BYTES, -(-found.size // MOST_PARTS))
    try:
        obstore.put(store, key, path, chunk_size=chunk_size, max_concurrency=PARTS_AT_ONCE)
    except (BaseError, FileNotFoundError) as exc:
        # obstore repeats the end of an upload in parts where the answer is lost, and the store knows those parts no more.
        if not path.exists():
            raise vanished_error(str(path)) from exc
        if not any(code in str(exc) for code in ("InvalidBlockList", "NoSuchUpload")):
            raise
        obstore.put(store, key, path, chunk_size=chunk_size, max_concurrency=PARTS_AT_ONCE)
    if not path.exists() or stat_of(path.stat()) != found:
        obstore.delete(store, key)
        raise changed_error(str(path))


def list_objects(store: ObjectStore) -> set[str]:
    """Names of all packs and large files of the store."""
    return {path.rsplit("/", 1)[-1].removesuffix(".tar") for prefix in ("packs", "files") for path in list_paths(store, prefix)}
