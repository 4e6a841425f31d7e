"""What may ever be deleted from a store: objects that have a name of ours, and what was being written in a folder when a process died.

obstore writes in a folder beside the object, as ``<name>#<number>``, and renames at the end. It neither lists nor deletes such files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import chain
from stat import S_ISREG
from typing import TYPE_CHECKING, NamedTuple

from trainer.storage import folders_told_plainly, is_bucket, list_metadata, to_path

if TYPE_CHECKING:
    from obstore.store import ObjectStore

BATCH = 1000  # objects that S3 deletes at a request
UNFINISHED = "unfinished"
PATTERNS = {
    "manifests": re.compile(r"manifests/([0-9a-f]{64})\.jsonl\.gz"),
    "packs": re.compile(r"packs/[0-9a-f]{2}/[0-9a-f]{64}\.tar"),
    "files": re.compile(r"files/[0-9a-f]{2}/[0-9a-f]{64}"),
    "leases": re.compile(r"leases/[\w-]+\.json"),
    "pins": re.compile(r"pins/([\w-]+)\.json"),
}
CONTENT = ("manifests", "packs", "files")
KINDS = (*CONTENT, UNFINISHED, "leases", "pins")  # in the order of their deletion
# Refs and the mark of a collection are written, too, and never garbage.
FOLDERS = (*PATTERNS, "refs")
WRITTEN = (*PATTERNS.values(), re.compile(r"refs/[^/]+\.json"), re.compile(r"gc\.json"))
PART = re.compile(r"(.+)#\d+")


class StoredObject(NamedTuple):
    key: str
    kind: str
    size: int
    modified: datetime
    tag: str


def list_kind(store: ObjectStore, kind: str) -> list[StoredObject]:
    """The objects of a kind; what somebody else has put there is none of ours."""
    return [
        StoredObject(meta["path"], kind, meta["size"], meta["last_modified"], meta["e_tag"] or "")
        for meta in list_metadata(store, kind)
        if PATTERNS[kind].fullmatch(meta["path"])
    ]


def list_unfinished(uri: str) -> Iterator[StoredObject]:
    """In a folder, what was not renamed yet to an object of ours. A bucket shows no such thing to its readers."""
    if is_bucket(uri):
        return
    root = to_path(uri)
    # The rest of the folder may be somebody else's.
    for path in chain(root.glob("*#*"), *((root / folder).rglob("*#*") for folder in FOLDERS)):
        key = path.relative_to(root).as_posix()
        part = PART.fullmatch(key)
        if part is None or not any(pattern.fullmatch(part[1]) for pattern in WRITTEN):
            continue
        try:
            found = path.lstat()
        except FileNotFoundError:  # renamed meanwhile
            continue
        if S_ISREG(found.st_mode):
            yield StoredObject(key, UNFINISHED, found.st_size, datetime.fromtimestamp(found.st_mtime, UTC), "")


def delete_unfinished(uri: str, keys: Iterable[str]) -> None:
    with folders_told_plainly():
        for key in keys:
            (to_path(uri) / key).unlink(missing_ok=True)


def delete_objects(store: ObjectStore, keys: list[str]) -> None:
    """Some stores stop at the first key that is not there; then one after the other."""
    import obstore

    try:
        obstore.delete(store, keys)
    except FileNotFoundError:
        if len(keys) > 1:
            for key in keys:
                delete_objects(store, [key])
