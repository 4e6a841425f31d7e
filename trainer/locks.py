"""Advisory file locks that live exactly as long as the processes that hold them.

``flock`` belongs to the open file, so a child that inherits the descriptor keeps the lock when its
parent dies, and the kernel drops it when the last of them is gone: a lock is better evidence of
life than a process id, which is reused. Linux and macOS.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

LOOK_SECONDS = 0.05


def try_lock(path: Path) -> int | None:
    """The open descriptor of an exclusive lock on `path`, inheritable; None where somebody holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    os.set_inheritable(descriptor, True)
    return descriptor


def wait_for_lock(path: Path, seconds: float = math.inf) -> int | None:
    """As `try_lock`, once whoever holds it lets go; None where nobody has after so many seconds."""
    deadline = time.monotonic() + seconds
    while (descriptor := try_lock(path)) is None:
        if time.monotonic() > deadline:
            return None
        time.sleep(LOOK_SECONDS)
    return descriptor


def is_held(path: Path) -> bool:
    """Whether a process holds the lock. Takes a shared lock for a moment, so takers try more than once."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def holding(path: Path, on_wait: Callable[[str], None] | None, seconds: float = math.inf) -> Iterator[None]:
    """One process at a time inside. The lock's file says which, and goes at the end; `on_wait` is told who has it.

    Raises TimeoutError, which names whoever has it, where he has not let go of it after so many seconds.
    """
    deadline = time.monotonic() + seconds
    lock = try_lock(path)
    if lock is None and on_wait:
        on_wait(_read_holder(path))
    while lock is None or not _is_same(lock, path):  # the one before removes it
        if lock is not None:
            os.close(lock)
        lock = wait_for_lock(path, deadline - time.monotonic())
        if lock is None and time.monotonic() > deadline:
            raise TimeoutError(_read_holder(path))
    try:
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held, so that it is this very file; who waits for it sees that it is gone
        os.close(lock)


def _read_holder(path: Path) -> str:
    try:
        return path.read_text()[:200] or "another process"
    except FileNotFoundError:
        return "another process"


def _is_same(lock: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False
