"""Ranges of objects, read in parallel: by as many streams as the link needs, and again where one breaks."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait as wait_for
from typing import TYPE_CHECKING

from trainer.errors import ExitCode, TrainerError
from trainer.fetch_index import PART_BYTES, Part
from trainer.packs import STAGE_AGAIN
from trainer.silence import SilenceWatch
from trainer.storage import PATIENCE

if TYPE_CHECKING:
    from obstore.store import ObjectStore

FEWEST_STREAMS = 2
FIRST_STREAMS = 8
MOST_STREAMS = 24  # each holds up to PART_BYTES
SOON_SECONDS = 1.0
LATE_SECONDS = 8.0  # the store's client gives a request up after 30
TRIES = 3
PAUSE_SECONDS = 0.5


def next_streams(streams: int, reading: float, writing: float) -> int:
    """How many streams to allow, after a part took so many seconds to read and to write.

    While reading takes longer and yet is quick, it is the way to the store and back that takes the time: one more. Where
    parts come late, the link is full, and more streams would only bring all of them closer to their time limit: one less.
    """
    if reading > LATE_SECONDS:
        return max(FEWEST_STREAMS, streams - 1)
    if writing < reading < SOON_SECONDS:
        return min(MOST_STREAMS, streams + 1)
    return streams


class Streams:
    """Leave to read, for as many at a time as `next_streams` says."""

    def __init__(self) -> None:
        self.allowed = FIRST_STREAMS
        self.stopped = False
        self._taken = 0
        self._changed = threading.Condition()

    def take(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._taken < self.allowed)
            self._taken += 1

    def try_take(self) -> bool:
        with self._changed:
            if self._taken >= self.allowed:
                return False
            self._taken += 1
            return True

    def give(self, count: int = 1) -> None:
        with self._changed:
            self._taken -= count
            self._changed.notify_all()

    def adapt(self, reading: float, writing: float) -> None:
        with self._changed:
            self.allowed = next_streams(self.allowed, reading, writing)
            self._changed.notify_all()


class RangeReader:
    """Reads of one store. A context: at its end, or at an error, nothing is read any more."""

    def __init__(self, store: ObjectStore, silence: SilenceWatch | None = None) -> None:
        self.store = store
        self.silence = silence or SilenceWatch()
        self.streams = Streams()
        self._readers = ThreadPoolExecutor(MOST_STREAMS, "read")

    def in_parallel(self, parts: Iterable[Part], work: Callable[[Part], None]) -> None:
        """`work` on each part, in threads. The first error stops the others at their next read, and is raised."""
        flying: set[Future[None]] = set()
        workers = ThreadPoolExecutor(MOST_STREAMS, "unpack")
        try:
            for part in parts:
                self.streams.take()
                flying.add(workers.submit(self._with_stream, work, part))
                flying -= _settled(flying)
            while flying:
                flying -= _settled(flying, wait=True)
        finally:
            self.streams.stopped = True
            for pool in (workers, self._readers):
                pool.shutdown(cancel_futures=True)

    def _with_stream(self, work: Callable[[Part], None], part: Part) -> None:
        try:
            work(part)
        finally:
            self.streams.give()

    def read(self, key: str, start: int, end: int) -> memoryview:
        """Bytes of an object. Raises TrainerError (DATA) where it is missing or ends before that, else what the store raises."""
        import obstore
        from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

        if start == end:
            return memoryview(b"")
        give_up = time.monotonic() + PATIENCE.total_seconds()
        for left in reversed(range(TRIES)):
            if self.streams.stopped:
                raise TrainerError("the fetch was stopped", code=ExitCode.UNAVAILABLE)
            try:
                with self.silence.asking():
                    content = memoryview(obstore.get_range(self.store, key, start=start, end=end))
            except FileNotFoundError as exc:
                raise _missing(key) from exc
            except (PermissionDeniedError, UnauthenticatedError):
                raise
            except BaseError as exc:
                if time.monotonic() > give_up:
                    raise  # another question would only wait as long again
                # The library goes on with a body that broke only where the store names a version of it (ETag).
                self._refuse_short(key, end, exc)
                if not left:
                    raise
                time.sleep(PAUSE_SECONDS)
            else:
                if len(content) == end - start:
                    return content
                raise _short(key, end)
        raise AssertionError("the last try returns or raises")

    def _refuse_short(self, key: str, end: int, exc: Exception) -> None:
        """A range past the end is no business of the network."""
        import obstore
        from obstore.exceptions import BaseError

        try:
            size = obstore.head(self.store, key)["size"]
        except (BaseError, FileNotFoundError):
            return  # what went wrong first tells more
        if size < end:
            raise _short(key, end) from exc

    def read_ahead(self, key: str, start: int, end: int) -> Iterator[memoryview]:
        """A long range piece by piece, in order. Further pieces are read meanwhile, as far as streams are free."""
        ahead: deque[Future[memoryview]] = deque()
        at = start
        try:
            while at < end or ahead:
                while at < end and (not ahead or self.streams.try_take()):
                    ahead.append(self._readers.submit(self.read, key, at, min(at + PART_BYTES, end)))
                    at += PART_BYTES
                started = time.monotonic()
                content = ahead[0].result()
                waited = time.monotonic() - started
                ahead.popleft()
                if ahead:  # the first piece goes by the stream of its part
                    self.streams.give()
                read = time.monotonic()
                yield content
                self.streams.adapt(waited, time.monotonic() - read)
        finally:
            self.streams.give(max(0, len(ahead) - 1))


def _settled(flying: set[Future[None]], *, wait: bool = False) -> set[Future[None]]:
    done = wait_for(flying, timeout=None if wait else 0, return_when=FIRST_COMPLETED).done
    for future in done:
        future.result()
    return done


def _missing(key: str) -> TrainerError:
    return TrainerError(f"the store lacks {key}, which the manifest names", hint=STAGE_AGAIN, code=ExitCode.DATA)


def _short(key: str, end: int) -> TrainerError:
    return TrainerError(f"{key} is damaged: it ends before byte {end}", hint=STAGE_AGAIN, code=ExitCode.DATA)
