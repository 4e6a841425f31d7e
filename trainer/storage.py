"""Small objects by URI: get, put (also create-only), list. One library, obstore, for every store.

A URI is ``file:///folder`` or a plain absolute path today; ``s3:// gs:// az://`` are the same calls on
another obstore store. Writes are atomic: a reader sees the old object, the new one, or none.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from trainer.contract import ExitCode, TrainerError
from trainer.files import DISK_FULL, disk_full_error

if TYPE_CHECKING:
    from obstore.store import LocalStore


def to_uri(location: str | Path) -> str:
    """A plain path as a ``file://`` URI; a URI as it is."""
    text = str(location)
    return text.rstrip("/") if "://" in text else Path(text).expanduser().absolute().as_uri()


def to_path(uri: str) -> Path:
    """The local path of a ``file://`` URI or plain path. Raises TrainerError for other schemes."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        raise TrainerError(
            f"{uri!r} is not a folder of this machine",
            hint="give a local path or a file:// URI; object stores are not supported for this yet",
            code=ExitCode.CONFIG,
        )
    return Path(unquote(parts.path) if parts.scheme else uri)


@lru_cache(maxsize=64)
def _store(root: str) -> LocalStore:
    from obstore.store import LocalStore

    return LocalStore(prefix=to_path(root), automatic_cleanup=True)


class ObjectFolder:
    """The objects below one URI, by relative name."""

    def __init__(self, uri: str) -> None:
        self.uri = to_uri(uri)

    def child(self, name: str) -> ObjectFolder:
        return ObjectFolder(f"{self.uri}/{name}")

    def get(self, name: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        # A local file is read without the store: listings of runs and polls are hot.
        try:
            return (to_path(self.uri) / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sha256(self, name: str) -> str | None:
        """The hex digest of the object, read piece by piece; None where there is none."""
        try:
            with (to_path(self.uri) / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        import obstore

        self._make_root()
        with self._full_disk_told(name, data):
            obstore.put(_store(self.uri), name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes the object only if there is none. False where one was there."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        self._make_root()
        try:
            with self._full_disk_told(name, data):
                obstore.put(_store(self.uri), name, data, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def delete(self, name: str) -> None:
        """Removes the object, and folders that it leaves empty; none there is fine."""
        import obstore

        if (to_path(self.uri) / name).exists():
            obstore.delete(_store(self.uri), name)
            with contextlib.suppress(OSError):  # not empty
                to_path(self.uri).rmdir()

    def names(self, folder: str = "") -> list[str]:
        """Names of objects and folders directly below `folder`, sorted."""
        path = to_path(self.uri) / folder
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []

    @contextlib.contextmanager
    def _full_disk_told(self, name: str, data: bytes) -> Iterator[None]:
        """obstore's errors have no errno; its text ends with the one of the system, as Rust writes it."""
        from obstore.exceptions import BaseError

        try:
            yield
        except BaseError as exc:
            number = next((number for number in DISK_FULL if f"(os error {number})" in str(exc)), None)
            if number is None:
                raise
            raise disk_full_error(to_path(self.uri) / name, number, len(data)) from exc

    def _make_root(self) -> None:
        try:
            to_path(self.uri).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            if exc.errno in DISK_FULL:
                raise
            raise TrainerError(
                f"cannot write to {to_path(self.uri)}: {exc.strerror}",
                hint="choose another output folder with --output, or mend its permissions",
                code=ExitCode.OCCUPIED,
            ) from exc
