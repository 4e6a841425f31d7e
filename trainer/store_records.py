"""The small objects of a store: read, written and compared-and-swapped, by msgspec, whose import costs a tenth of pydantic's.

A stage of unchanged data is done in the time that pydantic's import takes. Fields that are not known are passed over: a newer
version wrote them, and each object is written as a whole.
"""

from __future__ import annotations

import os
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Self

import msgspec

from trainer.locks import try_lock
from trainer.storage import to_path

if TYPE_CHECKING:
    from obstore import ObjectMeta, UpdateVersion
    from obstore.store import ObjectStore

AwareTime = Annotated[datetime, msgspec.Meta(tz=True)]


class StoreRecord(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int = 1

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises ValueError, naming the field, for what is none."""
        try:
            return msgspec.json.decode(data, type=cls)
        except RecursionError as exc:
            raise ValueError("it is nested too deeply") from exc

    def to_json(self) -> bytes:
        """For people, too."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)


def tag_of(meta: ObjectMeta) -> UpdateVersion:
    tag: UpdateVersion = {"e_tag": meta["e_tag"]}
    if meta["version"] is not None:
        tag["version"] = meta["version"]
    return tag


def swap(store: ObjectStore, uri: str, key: str, record: StoreRecord, tag: UpdateVersion | None) -> bool:
    """Replaces the object if it is still as `tag` says (None: if there is none). False where it is not."""
    import obstore
    from obstore.exceptions import AlreadyExistsError, PreconditionError
    from obstore.store import LocalStore

    data = record.to_json()
    if isinstance(store, LocalStore):
        return _swap_locally(store, uri, key, data, tag)
    try:
        obstore.put(store, key, data, mode="create" if tag is None else tag)
    except (AlreadyExistsError, PreconditionError):
        return False
    return True


def _swap_locally(store: ObjectStore, uri: str, key: str, data: bytes, tag: UpdateVersion | None) -> bool:
    """A folder knows no conditional write; a lock beside the ref stands in, for all who share the folder's file system."""
    import obstore

    lock = try_lock(to_path(uri) / f"{key}.lock")
    if lock is None:
        return False
    try:
        try:
            found = obstore.head(store, key)["e_tag"]
        except FileNotFoundError:
            found = None
        if found != (tag or {}).get("e_tag"):
            return False
        obstore.put(store, key, data)
        return True
    finally:
        os.close(lock)
