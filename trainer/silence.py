"""Tells that a store is silent while something is asked of it: after half a minute, then at growing distance, and when it goes on.

`Silence` decides, and is pure. `SilenceWatch` knows what is asked and looks at it from a thread of its own, since whoever waits for
a store cannot speak meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")

FIRST_SECONDS = 30.0
GROWTH = 2  # each line comes after so many times the silence of the one before
LOOK_SECONDS = 1.0


class Silence:
    """When to speak, and what to say."""

    def __init__(self, gives_up_seconds: float, first_seconds: float = FIRST_SECONDS) -> None:
        self._gives_up, self._first = gives_up_seconds, first_seconds
        self._next = first_seconds
        self._told: tuple[int, float] | None = None

    def look(self, answers: int, since: float | None, now: float) -> str:
        """A line, or nothing. `answers` were given so far, none `since` then; None where nothing is asked."""
        if self._told is not None and answers != self._told[0]:
            silent = now - self._told[1]
            self._told, self._next = None, self._first
            return f"the store answers again, after {silent:.0f} s"
        if since is None or now - since < self._next:
            return ""
        silent = now - since
        self._told, self._next = (answers, since), GROWTH * max(silent, self._next)
        limit = f"{self._gives_up / 60:.0f} min" if self._gives_up >= 120 else f"{self._gives_up:.0f} s"
        return f"the store has not answered for {silent:.0f} s: it stalls, or the link is slow; still waiting (gives up after {limit})"


class SilenceWatch:
    """What is asked of a store, by any number of threads. As a context it speaks to `say`, from another thread.

    What `say` raises comes out at the context's end, unless that ends by an error anyway.
    """

    def __init__(self, say: Callable[[str], None] | None = None, gives_up_seconds: float = 0.0) -> None:
        self._say = say
        self._silence = Silence(gives_up_seconds, FIRST_SECONDS)
        self._pause = min(LOOK_SECONDS, FIRST_SECONDS / 4)
        self._lock = threading.Lock()
        self._asked = self._answers = 0
        self._since = 0.0
        self._failed = False
        self._ended = threading.Event()
        self._raised: BaseException | None = None
        self._thread = threading.Thread(target=self._look_on, name="silence", daemon=True)

    # --- What is asked ---

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While inside, an answer is waited for. An error is none: what is tried again then is silent for longer."""
        with self._lock:
            if not self._asked and not self._failed:
                self._since = time.monotonic()
            self._asked += 1
        try:
            yield
        except BaseException:
            with self._lock:
                self._asked -= 1
                self._failed = True
            raise
        with self._lock:
            self._asked -= 1
        self.answered()

    def during(self, ask: Callable[[], T]) -> T:
        with self.asking():
            return ask()

    def each(self, pieces: Iterable[T]) -> Iterator[T]:
        """The pieces of an answer; each is a sign of life, and what is done with it is not waited for."""
        left = iter(pieces)
        while True:
            with self.asking():
                try:
                    piece = next(left)
                except StopIteration:
                    return
            yield piece

    def answered(self) -> None:
        """The store has answered, or has taken some of what it is sent."""
        with self._lock:
            self._answers += 1
            self._failed = False
            self._since = time.monotonic()

    # --- Telling ---

    def tell(self, line: str) -> None:
        """What else is waited for, from whoever waits."""
        if self._say is not None:
            self._say(line)

    def __enter__(self) -> SilenceWatch:
        if self._say is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        if self._say is None:
            return
        self._thread.join()
        if exc is not None:
            return
        self._look()  # the last answer may have come since
        if self._raised is not None:
            raise self._raised

    def _look_on(self) -> None:
        while not self._ended.wait(self._pause) and self._raised is None:
            self._look()

    def _look(self) -> None:
        with self._lock:
            seen = self._answers, self._since if self._asked else None
        line = self._silence.look(*seen, time.monotonic())
        if line and self._say is not None and self._raised is None:
            try:
                self._say(line)
            except BaseException as exc:  # such as a stop that was asked for: it is raised where it can be seen
                self._raised = exc
