"""Who is at work on a store: the leases of stages under way, and the mark of the collection that deletes from it.

``leases/<id>.json`` is written before a stage relies on what the store has, again every minute, and deleted at its end;
one that was not renewed for ten minutes is that of a process that died. ``gc.json`` has a new generation from the moment
before a collection looks for what is needed. Both are judged by the store's own times, as clocks of machines differ.
The argument why nothing is lost stands in `blocks.garbage`.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec

from trainer.errors import ExitCode, TrainerError
from trainer.files import utc_now
from trainer.store_records import AwareTime, StoreRecord, swap, tag_of

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ObjectStore

MARK_KEY = "gc.json"
RENEW_SECONDS = 60.0
LOOK_SECONDS = 1.0  # between two looks whether a collection has ended, at first
LOOK_GROWTH, MOST_LOOK_SECONDS = 1.5, 15.0  # one that was killed is waited for by three requests a look
TELL_SECONDS = 5.0  # most collections have ended by then
DEAD_AFTER = timedelta(minutes=10)  # of a lease, and of the mark of a collection that deletes
TRIES = 5
DELETE_SECONDS = 300.0  # so long a collection deletes by what it has found; less than others wait for it, retries included


Done = TypeVar("Done")


class LeaseFile(StoreRecord, frozen=True, kw_only=True):
    """``leases/<id>.json``, for people: only its existence and its time count."""

    dataset: str
    host: str = msgspec.field(default_factory=socket.gethostname)
    started_at: AwareTime = msgspec.field(default_factory=utc_now)


class CollectionMark(StoreRecord, frozen=True, kw_only=True):
    """``gc.json``. A listing that is newer than the end of this generation is true until there is another generation."""

    generation: str
    deleting: bool
    host: str = ""  # for people
    started_at: AwareTime = msgspec.field(default_factory=utc_now)


class StoreChanged(Exception):
    """Objects may be gone that the cache believes in: garbage was collected since the store was last looked at, or it was emptied."""


@dataclass(frozen=True)
class LiveLease:
    """One that has not ended. ``dataset`` and ``host`` are empty where the object does not say."""

    key: str
    dataset: str
    host: str
    renewed_seconds_ago: int

    @property
    def ends_in_seconds(self) -> int:
        """Where it is not renewed any more."""
        return max(0, int(DEAD_AFTER.total_seconds()) - self.renewed_seconds_ago)

    def __str__(self) -> str:
        who = f"of {self.dataset!r} on {self.host}" if self.dataset else f"({self.key})"
        return (
            f"a stage {who} is under way; its lease was renewed {self.renewed_seconds_ago} s ago, and ends in {self.ends_in_seconds} s if "
            "its process is dead"
        )


def lease_key(name: str) -> str:
    return f"leases/{name}.json"


def read_lease(store: ObjectStore, key: str, age: timedelta) -> LiveLease | None:
    """None for one that has gone since it was listed. `age` is the time since it was renewed."""
    import obstore

    seconds = max(0, int(age.total_seconds()))  # clocks may differ
    try:
        found = LeaseFile.from_json(bytes(obstore.get(store, key).bytes()))
    except FileNotFoundError:
        return None
    except ValueError:
        return LiveLease(key, "", "", seconds)
    return LiveLease(key, found.dataset, found.host, seconds)


class Lease:
    """A stage's, deleted at the end of its `with`. It is written by a thread of its own, beside the first packs."""

    def __init__(self, store: ObjectStore, dataset: str) -> None:
        self._store, self._key = store, lease_key(secrets.token_hex(8))
        self._data = LeaseFile(dataset=dataset).to_json()
        self._written: Future[None] = Future()
        self._over = threading.Event()
        self._keeper: threading.Thread | None = None

    def take(self) -> None:
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, daemon=True, name="lease")
            self._keeper.start()

    def confirm(self) -> None:
        """Returns once the lease is in the store. Raises what its first writing has raised."""
        self.take()
        self._written.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        from obstore.exceptions import BaseError

        if self._keeper is None:
            return
        self._over.set()
        self._keeper.join()
        # One that stays behind ends by itself.
        with contextlib.suppress(BaseError, FileNotFoundError):
            _delete(self._store, self._key)

    def store_time(self) -> datetime:
        """What the store's clock says."""
        self.confirm()
        return _write_and_look(self._store, self._key, self._data)

    def _keep(self) -> None:
        from obstore.exceptions import BaseError

        try:
            self._write()
        except BaseException as exc:
            self._written.set_exception(exc)
            return
        self._written.set_result(None)
        while not self._over.wait(RENEW_SECONDS):
            # The next one may succeed; what is collected after a lease that ended shows in the generation.
            with contextlib.suppress(BaseError):
                self._write()

    def _write(self) -> None:
        import obstore

        obstore.put(self._store, self._key, self._data)


def _delete(store: ObjectStore, key: str) -> None:
    import obstore

    obstore.delete(store, key)


def _write_and_look(store: ObjectStore, key: str, data: bytes) -> datetime:
    import obstore

    obstore.put(store, key, data)
    return obstore.head(store, key)["last_modified"]


# --- The mark of a collection ----------------------------------------------------------------------------


def read_mark(store: ObjectStore, uri: str) -> tuple[CollectionMark | None, UpdateVersion | None, datetime | None]:
    """The mark, what tells this state of it from the next, and when it was written. Raises TrainerError (DATA) for a damaged one."""
    import obstore

    try:
        answer = obstore.get(store, MARK_KEY)
        data = bytes(answer.bytes())
    except FileNotFoundError:
        return None, None, None
    try:
        mark = CollectionMark.from_json(data)
    except ValueError as exc:
        hint = "delete that object when nobody collects garbage there"
        raise TrainerError(f"{uri}/{MARK_KEY} is damaged", hint=hint, code=ExitCode.DATA) from exc
    return mark, tag_of(answer.meta), answer.meta["last_modified"]


def check_generation(store: ObjectStore, uri: str, known: str) -> None:
    """Raises StoreChanged where a collection has begun since the generation was `known`."""
    mark, _, _ = read_mark(store, uri)
    if (mark.generation if mark else "") != known:
        raise StoreChanged


def until_unchanged(work: Callable[[], Done], uri: str) -> Done:
    """`work` once more where objects may be gone: then it asks the store what it has, and sends what it lacks."""
    for _ in range(TRIES):
        with contextlib.suppress(StoreChanged):
            return work()
    message = f"{uri}: objects vanish from it, or garbage is collected from it all the time"
    raise TrainerError(message, hint="stage again", code=ExitCode.UNAVAILABLE)


def settled_generation(
    store: ObjectStore, uri: str, clock: Callable[[], datetime] | None = None, on_wait: Callable[[str], None] | None = None
) -> str:
    """The generation, once no collection deletes any more: a listing made after this is true until the next one.

    `clock` asks the store what time it is; without one an object is written for that. `on_wait` is told who is waited for, and how long.
    """
    clock = clock or (lambda: _store_time(store))
    pause, waited, told = LOOK_SECONDS, 0.0, False
    while True:
        mark, _, written = read_mark(store, uri)
        if mark is None or written is None:
            return ""
        if not mark.deleting or (left := DEAD_AFTER - (clock() - written)) < timedelta(0):
            return mark.generation
        if on_wait is not None and not told and waited >= TELL_SECONDS:
            told = True
            whose = f"of {mark.host}, begun at {mark.started_at:%H:%M} UTC" if mark.host else f"begun at {mark.started_at:%H:%M} UTC"
            on_wait(f"waiting for the garbage collection {whose}: until it ends, or {left.total_seconds():.0f} s if its process is dead")
        pause = min(pause, left.total_seconds() + LOOK_SECONDS)
        time.sleep(pause)
        waited += pause
        pause = min(pause * LOOK_GROWTH, MOST_LOOK_SECONDS)


class Collection:
    """The right to delete, for one at a time and for five minutes. ``began`` is by the store's clock."""

    def __init__(self, store: ObjectStore, uri: str) -> None:
        """Raises TrainerError (OCCUPIED) where another collection is under way."""
        import obstore

        self._store, self._uri = store, uri
        self._mark = CollectionMark(generation=secrets.token_hex(8), deleting=True, host=socket.gethostname())
        stored, tag, written = read_mark(store, uri)
        # Before the mark is written: a process that is stopped in between has less time, not more.
        self._started, self._started_monotonic = time.time(), time.monotonic()
        busy = stored is not None and stored.deleting and written is not None and _store_time(store) - written <= DEAD_AFTER
        # A swap whose answer was lost is refused when it is sent again.
        if busy or not (swap(store, uri, MARK_KEY, self._mark, tag) or read_mark(store, uri)[0] == self._mark):
            raise TrainerError(
                f"{uri}: another garbage collection is under way, or was cut off less than ten minutes ago",
                hint="try again in ten minutes",
                code=ExitCode.OCCUPIED,
            )
        self.began = obstore.head(store, MARK_KEY)["last_modified"]

    def may_delete(self) -> bool:
        """Whether what was found is recent enough to be deleted, and nobody has taken over."""
        stored, _, _ = read_mark(self._store, self._uri)
        # The one clock stands still while a machine sleeps, the other may be set back.
        spent = max(time.time() - self._started, time.monotonic() - self._started_monotonic)
        return stored == self._mark and spent < DELETE_SECONDS

    def end(self) -> None:
        """Not for one whose deletion failed: its last request may still be on its way, so others wait until it is surely over."""
        stored, tag, _ = read_mark(self._store, self._uri)
        if stored == self._mark:
            swap(self._store, self._uri, MARK_KEY, msgspec.structs.replace(self._mark, deleting=False), tag)


def _store_time(store: ObjectStore) -> datetime:
    """Asked where a mark is found that may be that of a process that died."""
    key = lease_key(f"clock-{secrets.token_hex(8)}")
    try:
        return _write_and_look(store, key, b"")
    finally:
        _delete(store, key)
