"""How many transfers at once: more as long as all of them together get faster, within a limit.

What helps depends on where the time goes. A cold disk and a link with latency want many at once; files in memory are
read fastest by few threads, as each has to wait for the interpreter; and a slow line only makes each of them slower.
So it is measured while it goes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

WINDOW = 4  # transfers before a number is judged, and at least twice as many as run at once
GAIN = 1.2  # a doubling must bring so much to be kept
SETTLED_WINDOWS = 10  # before more is tried again, as the world changes


class Growth:
    """The number itself, pure: told of every transfer, it says how many there should be at once in ``limit``."""

    def __init__(self, least: int, most: int) -> None:
        self.limit, self.most = min(least, most), most
        self._kept = self.limit
        self._kept_rate = 0.0
        self._settled = 0
        self._start_window()

    def _start_window(self) -> None:
        self._count, self._bytes, self._seconds = 0, 0, 0.0

    def add(self, size: int, seconds: float, at_once: int) -> None:
        """A transfer of `size` bytes took so long while so many ran at once."""
        if at_once < self.limit:  # something else held them up, so this says nothing about the limit
            return
        self._count += 1
        self._bytes += size
        self._seconds += seconds
        if self._count >= max(WINDOW, 2 * self.limit):
            rate = self.limit * self._bytes / max(self._seconds, 1e-9)
            self._start_window()
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
    """Threads of which as many work at once as `Growth` says. Work begins in the order in which it was handed in."""

    def __init__(self, least: int, most: int) -> None:
        self._pool = ThreadPoolExecutor(most)
        self._growth = Growth(least, most)
        self._changed = threading.Condition()
        self._working = 0

    @property
    def limit(self) -> int:
        return self._growth.limit

    def submit(self, size: int, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """`size` is what `work` moves, in bytes."""
        return self._pool.submit(self._work, size, lambda: work(*args, **kwargs))

    def _work(self, size: int, work: Callable[[], T]) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._working < self._growth.limit)
            self._working += 1
            at_once = self._working
        began = time.perf_counter()
        try:
            return work()
        finally:
            seconds = time.perf_counter() - began
            with self._changed:
                self._growth.add(size, seconds, max(at_once, self._working))
                self._working -= 1
                self._changed.notify_all()

    def shutdown(self) -> None:
        """Waits for what has begun, and drops the rest."""
        self._pool.shutdown(cancel_futures=True)
