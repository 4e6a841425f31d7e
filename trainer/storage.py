"""Small objects by URI: get, put (also create-only), list. One library, obstore, for every store.

A URI is ``file:///folder``, a plain absolute path, or ``s3:// gs:// az://``: the same calls on another
obstore store. Writes are atomic: a reader sees the old object, the new one, or none.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, cast
from urllib.parse import unquote, urlsplit

from trainer.errors import ExitCode, TrainerError
from trainer.files import DISK_FULL, disk_full_error
from trainer.locations import (
    REMOTE_SCHEMES as REMOTE_SCHEMES,
    check_bucket,
    is_bucket as is_bucket,
    to_path as to_path,
    to_store_uri as to_store_uri,
    to_uri as to_uri,
)
from trainer.store_access import StoreAccess, current_access, store_options
from trainer.store_errors import explain

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ClientConfig, LocalStore, ObjectStore, RetryConfig

ENDPOINTS = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT", "AZURE_ENDPOINT", "AZURE_STORAGE_ENDPOINT")
# To ask is to be told soon what is wrong, as with no network or no credentials. To send and to fetch come after an answer,
# and sit out minutes without a network. obstore's own 30 s for a whole request would be too little for a pack on a slow link.
# To mirror is to send what the sender will send again anyway: it soon wants to know.
Purpose = Literal["ask", "send", "fetch", "mirror"]
SEND_SECONDS = 600.0
TIMEOUTS: dict[Purpose, ClientConfig] = {
    # From the request's beginning, and then between two reads.
    "ask": {"timeout": timedelta(days=7), "read_timeout": timedelta(seconds=10)},
    # A pack at 28 kB/s, as on a line of 1 Mbit/s that four share. Until the answer comes nothing is read, so the library cannot tell
    # a pause from a slow link, and less would cut slow links; who waits is told by `trainer.silence`.
    "send": {"timeout": timedelta(seconds=SEND_SECONDS)},
    "fetch": {"timeout": timedelta(days=7), "read_timeout": timedelta(minutes=1)},
    "mirror": {"timeout": timedelta(minutes=2)},
}
PATIENCE = timedelta(minutes=3)  # a signed request is good for five
_PATIENT: RetryConfig = {
    "max_retries": 100,
    "retry_timeout": PATIENCE,
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=10), "base": 3},
}
RETRIES: dict[Purpose, RetryConfig] = {
    "ask": {**_PATIENT, "max_retries": 5, "retry_timeout": timedelta(seconds=20)},
    "send": _PATIENT,
    "fetch": _PATIENT,
    "mirror": {**_PATIENT, "retry_timeout": timedelta(seconds=30)},
}


def open_store(uri: str, purpose: Purpose = "ask", access: StoreAccess | None = None) -> ObjectStore:
    """The store below a URI: ``file:// s3:// gs:// az://``, or a local path.

    Credentials and endpoint are those of `access`, or of `store_access.access_to`; else they come from the environment, by the
    names that each cloud's own tools read (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``AZURE_STORAGE_ACCOUNT_NAME`` ...), or are
    the machine's identity.
    Raises TrainerError (CONFIG) for another scheme, no bucket, credentials in it, or an endpoint that is no URL.
    """
    from obstore.store import from_url

    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        ObjectFolder(uri).make_root()
        return _store(to_uri(uri))
    check_bucket(uri)
    # Plain HTTP only where somebody has named such an endpoint, as for a store in the same network.
    options = store_options(uri, access)
    plain = any(endpoint.startswith("http://") for endpoint in (options.get("endpoint", ""), *_endpoints()))
    if parts.scheme == "s3" and not plain and "AWS_UNSIGNED_PAYLOAD" not in os.environ:
        # TLS proves what arrives, and each file's own sha256 what is fetched: a third one, in the signature, costs half of the sending.
        options["unsigned_payload"] = True
    return from_url(uri, client_options={"allow_http": plain, **TIMEOUTS[purpose]}, retry_config=RETRIES[purpose], **options)


def _endpoints() -> Iterator[str]:
    for name in ENDPOINTS:
        if endpoint := os.environ.get(name):
            parts = urlsplit(endpoint)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                hint = "it begins with https://, or with http:// in a private network"
                raise TrainerError(f"{name} is no URL", hint=hint, code=ExitCode.CONFIG)
            yield endpoint


def list_paths(store: ObjectStore, prefix: str) -> Iterator[str]:
    """Names of all objects below a prefix; a request per 1,000 of them."""
    return (meta["path"] for meta in list_metadata(store, prefix))


def list_metadata(store: ObjectStore, prefix: str | None = None) -> Iterator[ObjectMeta]:
    """What the store says of all objects below a prefix, or of all that it has; in no order that could be relied on."""
    import obstore

    pages = cast("Iterable[Sequence[ObjectMeta]]", obstore.list(store, prefix, chunk_size=1000))
    return (meta for page in pages for meta in page)


def _disk_full_number(exc: Exception) -> int | None:
    """obstore's errors have no errno; their text has the one of the system, as Rust writes it."""
    return next((number for number in DISK_FULL if f"(os error {number})" in str(exc)), None)


@contextlib.contextmanager
def told_plainly(uri: str) -> Iterator[None]:
    """obstore's errors as a TrainerError: PERMISSION for a refused identity, NOT_FOUND, CONFIG, DISK_FULL, else UNAVAILABLE.

    Hints of our own get the store's name: who finds an object damaged knows its key only.
    """
    from obstore import exceptions

    try:
        yield
    except TrainerError as exc:
        exc.hint = exc.hint.replace("--store STORE", f"--store {shlex.quote(uri)}")
        raise
    except FileNotFoundError as exc:
        if any(code in str(exc) for code in ("NoSuchBucket", "ContainerNotFound", "ResourceNotFound")):
            raise explain(uri, str(exc)) from None
        raise TrainerError(f"{uri}: not found", hint="check bucket and name", code=ExitCode.NOT_FOUND) from None
    except exceptions.BaseError as exc:
        if _disk_full_number(exc) is not None:
            hint = "free some space, or choose another folder"
            raise TrainerError(f"{uri}: the disk is full", hint=hint, code=ExitCode.DISK_FULL) from exc
        # Not from it: its text has the addresses of requests, and such an address may hold a signature.
        denied = isinstance(exc, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError))
        raise explain(uri, str(exc), denied=denied) from None


@contextlib.contextmanager
def folders_told_plainly() -> Iterator[None]:
    """The system's errors on this machine's own folders as a TrainerError: DISK_FULL, PERMISSION, else OCCUPIED."""
    try:
        yield
    except OSError as exc:
        if exc.errno is None:
            raise  # of the store, and for `told_plainly` to explain
        code = ExitCode.DISK_FULL if exc.errno in DISK_FULL else ExitCode.OCCUPIED
        code = ExitCode.PERMISSION if isinstance(exc, PermissionError) else code
        hint = "mend its permissions, or choose another folder"
        if code is ExitCode.DISK_FULL:
            hint = "free some space, or choose another folder"
        elif isinstance(exc, FileNotFoundError):
            hint = "it vanished meanwhile: run it again when nothing deletes it"
            if _is_in_a_folder(exc.filename):  # such as /proc
                hint = "nothing can be made or found there by that name: choose another folder"
        elif isinstance(exc, (NotADirectoryError, FileExistsError)):
            hint = "there is a file where a folder should be: choose another folder"
        raise TrainerError(f"{exc.filename or 'a folder'}: {exc.strerror or exc}", hint=hint, code=code) from exc


def _is_in_a_folder(path: object) -> bool:
    return isinstance(path, str) and os.path.isabs(path) and os.path.isdir(os.path.dirname(path))  # noqa: PTH117, PTH112, PTH120


@lru_cache(maxsize=64)
def _store(root: str) -> LocalStore:
    from obstore.store import LocalStore

    return LocalStore(prefix=to_path(root), automatic_cleanup=True)


@lru_cache(maxsize=64)
def _bucket(root: str, access: StoreAccess | None) -> ObjectStore:
    """Kept, as opening costs 10 ms and a connection, and each run of a listing has its own folder. Opened anew for other credentials."""
    return open_store(root, access=access)


class ObjectFolder:
    """The objects below one URI, by relative name. As with `Path`, the class of the value depends on what it names: see `BucketFolder`.

    `access` says how to reach a bucket where neither `access_to` nor the environment does.
    """

    def __new__(cls, uri: str, access: StoreAccess | None = None) -> ObjectFolder:
        return object.__new__(BucketFolder if is_bucket(uri) else ObjectFolder)

    def __init__(self, uri: str, access: StoreAccess | None = None) -> None:
        self.uri = to_uri(uri)
        self.access = access

    def child(self, name: str) -> ObjectFolder:
        return ObjectFolder(f"{self.uri}/{name}", self.access)

    def get(self, name: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        # A local file is read without the store: listings of runs and polls are hot.
        try:
            return (to_path(self.uri) / name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def get_from(self, name: str, offset: int, length: int) -> bytes:
        """Up to `length` bytes from `offset` on; empty where there are none, or no such object."""
        try:
            with (to_path(self.uri) / name).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except (FileNotFoundError, NotADirectoryError):
            return b""

    def sha256(self, name: str) -> str | None:
        """The hex digest of the object, read piece by piece; None where there is none."""
        try:
            with (to_path(self.uri) / name).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            return None

    def put(self, name: str, data: bytes) -> None:
        import obstore

        self.make_root()
        with self._full_disk_told(name, data):
            obstore.put(_store(self.uri), name, data)

    def create(self, name: str, data: bytes) -> bool:
        """Writes the object only if there is none. False where one was there."""
        import obstore
        from obstore.exceptions import AlreadyExistsError

        self.make_root()
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

    def sizes(self) -> dict[str, int]:
        """All objects below, by name, with their sizes; in a bucket, a request per 1,000 of them."""
        root = to_path(self.uri)
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}

    def delete_all(self, names: Sequence[str]) -> None:
        """As `delete` does each; in a bucket, a request per 1,000 of them."""
        for name in names:
            self.delete(name)

    def names(self, folder: str = "") -> list[str]:
        """Names of objects and folders directly below `folder`, sorted."""
        path = to_path(self.uri) / folder
        return sorted(p.name for p in path.iterdir()) if path.is_dir() else []

    @contextlib.contextmanager
    def _full_disk_told(self, name: str, data: bytes) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except BaseError as exc:
            number = _disk_full_number(exc)
            if number is None:
                raise
            raise disk_full_error(to_path(self.uri) / name, number, len(data)) from exc

    def make_root(self) -> None:
        try:
            to_path(self.uri).mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            if exc.errno in DISK_FULL:
                raise
            raise TrainerError(
                f"cannot write to {to_path(self.uri)}: {exc.strerror}",
                hint="choose another folder, or mend its permissions",
                code=ExitCode.OCCUPIED,
            ) from exc


CREATE_TRIES = 5
CREATE_PAUSE_SECONDS = 0.2


class BucketFolder(ObjectFolder):
    """An `ObjectFolder` in a bucket. Raises TrainerError where that refuses or cannot be reached."""

    def __init__(self, uri: str, access: StoreAccess | None = None) -> None:
        super().__init__(uri, access)
        parts = urlsplit(self.uri)
        self._root = f"{parts.scheme}://{parts.netloc}"
        self._prefix = unquote(parts.path).strip("/")

    @property
    def _store(self) -> ObjectStore:
        return _bucket(self._root, self.access or current_access(self._root))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}".strip("/")

    def get(self, name: str) -> bytes | None:
        import obstore

        with told_plainly(self.uri):
            try:
                return bytes(obstore.get(self._store, self._key(name)).bytes())
            except FileNotFoundError:
                return None

    def get_from(self, name: str, offset: int, length: int) -> bytes:
        import obstore

        with told_plainly(self.uri):
            try:
                # First its size: what begins behind the end is an error of the store's.
                size = obstore.head(self._store, self._key(name))["size"]
                if size <= offset:
                    return b""
                return bytes(obstore.get_range(self._store, self._key(name), start=offset, end=min(size, offset + length)))
            except FileNotFoundError:
                return b""

    def sha256(self, name: str) -> str | None:
        import obstore

        digest = hashlib.sha256()
        with told_plainly(self.uri):
            try:
                for chunk in obstore.get(self._store, self._key(name)).stream():
                    digest.update(chunk)
            except FileNotFoundError:
                return None
        return digest.hexdigest()

    def put(self, name: str, data: bytes) -> None:
        import obstore

        with told_plainly(self.uri):
            obstore.put(self._store, self._key(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """As in a folder, but what lies there with these very bytes counts as written: it may be ours, of a try whose answer was lost.

        S3 may also answer "exists" (409, while another writes) of a name where nothing landed in the end.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError

        with told_plainly(self.uri):
            for tries_left in reversed(range(CREATE_TRIES)):
                try:
                    obstore.put(self._store, self._key(name), data, mode="create")
                    return True
                except (PermissionDeniedError, UnauthenticatedError):
                    raise
                except BaseError as exc:
                    if (found := self.get(name)) is not None:
                        return found == data
                    if not tries_left or not isinstance(exc, AlreadyExistsError):
                        raise
                    time.sleep(CREATE_PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")

    def delete(self, name: str) -> None:
        import obstore

        with told_plainly(self.uri), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, self._key(name))

    def sizes(self) -> dict[str, int]:
        with told_plainly(self.uri):
            found = {meta["path"]: meta["size"] for meta in list_metadata(self._store, self._prefix or None)}
        return {path.removeprefix(f"{self._prefix}/"): size for path, size in found.items()}

    def delete_all(self, names: Sequence[str]) -> None:
        import obstore

        with told_plainly(self.uri), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, [self._key(name) for name in names])

    def names(self, folder: str = "") -> list[str]:
        import obstore

        with told_plainly(self.uri):
            found = obstore.list_with_delimiter(self._store, self._key(folder) or None)
        paths = [*found["common_prefixes"], *(meta["path"] for meta in found["objects"])]
        return sorted(path.rsplit("/", 1)[-1] for path in paths)
