"""Servers that several test runs of a user share: the first one starts them, the last one stops them, unless `up` started them by hand."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

Server = TypeVar("Server")


@contextmanager
def starting(folder: Path) -> Iterator[None]:
    """One process at a time starts or stops."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starting.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def shared(folder: Path, start_or_find: Callable[[Path], Server], stop: Callable[[Path], None]) -> Iterator[Server]:
    """The system drops the lock of a user that is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "users.lock").open("w") as users:
        with starting(folder):
            fcntl.flock(users, fcntl.LOCK_SH)
            server = start_or_find(folder)
        try:
            yield server
        finally:
            with starting(folder), suppress(BlockingIOError):
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not (folder / "kept").exists():
                    stop(folder)
