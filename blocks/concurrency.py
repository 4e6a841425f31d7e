"""How many transfers at once: more as long as all of them together get faster, within a limit.

What helps depends on where the time goes. A cold disk and a link with latency want many at once; files in memory are
read fastest by one thread, as each has to wait for the interpreter; and a slow line only makes each of them slower.
So it is measured while it goes.
"""

from __future__ import annotations

import resource
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

WINDOW = 4  # transfers before a number is judged, and at least twice as many as run at once
GAIN = 1.2  # a doubling must bring so much to be kept
SETTLED_WINDOWS = 10  # before more is tried again, as the world changes
SLOW_SECONDS = 0.1  # for a megabyte of files: of a file system over a network, whose blocks nobody counts

P = ParamSpec("P")
T = TypeVar("T")


class Growth:
    """The number itself, pure: told of every transfer, it says how many there should be at once in ``limit``."""

    def __init__(self, least: int, most: int) -> None:
        self.limit, self.most = min(least, most), most
        self._kept = self.limit
        self._kept_rate = 0.0
        self._settled = 0
        self._start_window()

    def _start_window(self) -> None:
        self._count, self._bytes, self._seconds, self._waited = 0, 0, 0.0, 0

    def add(self, size: int, seconds: float, at_once: int, *, waited: bool = True) -> None:
        """A transfer of `size` bytes took so long while so many ran at once. One that waited for nothing would win nothing by more."""
        if at_once < self.limit:  # something else held them up, so this says nothing about the limit
            return
        self._count += 1
        self._waited += waited
        self._bytes += size
        self._seconds += seconds
        if self._count >= max(WINDOW, 2 * self.limit):
            rate = self.limit * self._bytes / max(self._seconds, 1e-9)
            waited = 2 * self._waited >= self._count
            self._start_window()
            if waited:
                self._judge(rate)

    def _judge(self, rate: float) -> None:
        if self._settled:
            self._settled -= 1
            self._kept_rate = rate
        elif rate < GAIN * self._kept_rate:
            self.limit, self._settled = self._kept, SETTLED_WINDOWS
            return
        else:
            self._kept, self._kept_rate = self.limit, rate
        if not self._settled:
            self.limit = min(self.most, 2 * self.limit)


class AdaptivePool:
    """Threads of which as many work at once as `Growth` says. Work begins in the order in which it was handed in.

    With `reads_files`, work that found its files in memory does not make them more.
    """

    def __init__(self, least: int, most: int, *, reads_files: bool = False) -> None:
        self._pool = ThreadPoolExecutor(most)
        self._reads_files = reads_files
        self._blocks_read = _count_blocks_read()
        self._growth = Growth(least, most)
        self._lock = threading.Lock()
        self._working = 0
        # What may not begin yet waits here, in no thread: each that woke up to look would hold up the others.
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def limit(self) -> int:
        return self._growth.limit

    def submit(self, size: int, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """`size` is what `work` moves, in bytes."""
        future: Future[T] = Future()

        def run() -> None:
            try:
                result = self._timed(size, lambda: work(*args, **kwargs))
            except BaseException as exc:
                future.set_exception(exc)
            else:
                future.set_result(result)

        with self._lock:
            self._waiting.append(run)
            self._begin()
        return future

    def _begin(self) -> None:
        while self._waiting and self._working < self._growth.limit:
            self._working += 1
            self._pool.submit(self._waiting.popleft())

    def _timed(self, size: int, work: Callable[[], T]) -> T:
        at_once = self._working
        began = time.perf_counter()
        try:
            return work()
        finally:
            seconds = time.perf_counter() - began
            with self._lock:
                self._growth.add(size, seconds, max(at_once, self._working), waited=self._has_waited(seconds))
                self._working -= 1
                self._begin()

    def _has_waited(self, seconds: float) -> bool:
        if not self._reads_files:
            return True
        before, self._blocks_read = self._blocks_read, _count_blocks_read()
        return self._blocks_read > before or seconds > SLOW_SECONDS

    def shutdown(self) -> None:
        """Waits for what has begun, and drops the rest."""
        with self._lock:
            self._waiting.clear()
        self._pool.shutdown()


def _count_blocks_read() -> int:
    """By this process so far from disks, what was in memory not counted (getrusage(2), ru_inblock)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_inblock
