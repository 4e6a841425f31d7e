"""Sends packs and large files, which are immutable and named by their content, so that to send one twice changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from blocks.reading import changed_error
from blocks.scanning import vanished_error
from trainer.errors import TrainerError
from trainer.storage import list_metadata

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PART_BYTES = 8 * 2**20  # a file too large to hold is sent in parts
PARTS_AT_ONCE = 4
MOST_PARTS = 10_000  # of S3
HEADS = 4  # requests, where a listing takes one for every thousand objects


def put_object(store: ObjectStore, key: str, content: bytes | bytearray) -> None:
    """Immutable content under its own name: to write it twice changes nothing, so a retry is safe."""
    import obstore

    obstore.put(store, key, content, use_multipart=False)


def put_file(store: ObjectStore, key: str, path: Path, digest: bytes, size: int, on_piece: Callable[[], None] = lambda: None) -> None:
    """Sends a file too large to hold. It is hashed once more on its way, and what is not what it was is no object at the end.

    So an object that another dataset has already is never replaced by anything else. `on_piece` is called as it is read.
    """
    import obstore
    from obstore.exceptions import BaseError

    from trainer.contract import ManifestFile  # these load pydantic, which most stages do not need
    from trainer.transfer import read_pieces

    file = ManifestFile(sha256=digest.hex(), bytes=size)
    chunk_size = max(PART_BYTES, -(-size // MOST_PARTS))
    for last in (False, True):
        try:
            obstore.put(store, key, read_pieces(path, file, on_piece), chunk_size=chunk_size, max_concurrency=PARTS_AT_ONCE)
        except TrainerError as exc:
            raise changed_error(str(path)) from exc
        except (BaseError, FileNotFoundError) as exc:
            if not path.exists():
                raise vanished_error(str(path)) from exc
            # obstore repeats the end of an upload in parts where the answer is lost, and the store knows those parts no more.
            if last or not any(code in str(exc) for code in ("InvalidBlockList", "NoSuchUpload")):
                raise
        else:
            return


def list_objects(store: ObjectStore) -> set[str]:
    """Names of all packs and large files of the store."""
    return object_names(list_sizes(store))


def list_sizes(store: ObjectStore) -> dict[str, int]:
    """Keys of all packs and large files of the store, with their bytes."""
    return {meta["path"]: meta["size"] for prefix in ("packs", "files") for meta in list_metadata(store, prefix)}


def find_missing(store: ObjectStore, keys: set[str]) -> set[str]:
    """Those of the packs and large files that the store lacks. A few are asked for one by one, as a listing is of all that it has."""
    import obstore

    if len(keys) > HEADS:
        return keys - list_sizes(store).keys()
    missing: set[str] = set()
    for key in keys:
        try:
            obstore.head(store, key)
        except FileNotFoundError:
            missing.add(key)
    return missing


def object_names(keys: Iterable[str]) -> set[str]:
    return {key.rsplit("/", 1)[-1].removesuffix(".tar") for key in keys}
