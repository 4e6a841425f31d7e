"""How far a stage is, and how much there is in all."""

from __future__ import annotations

import threading
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from blocks.scanning import Scan
from trainer.errors import TrainerError

COUNT_AFTER_SECONDS = 8.0


@dataclass
class Counts:
    """For whoever watches. ``done``: what the store has, of which ``reused`` is what it had before; ``total``: 0 while nobody knows.

    ``changed`` and ``read`` are files and bytes that were looked at for their content, ``sent`` the bytes that travelled and arrived,
    ``compared`` those that were read in the store, of ``to_compare``, to find what is wrong there.
    """

    changed_files: int = 0
    read_bytes: int = 0
    sent_bytes: int = 0
    done_files: int = 0
    done_bytes: int = 0
    reused_bytes: int = 0
    compared_bytes: int = 0
    to_compare_bytes: int = 0
    total_files: int = 0
    total_bytes: int = 0

    def reuse(self, files: int, size: int) -> None:
        self.done_files += files
        self.done_bytes += size
        self.reused_bytes += size


class Counting:
    """While the context is open, counts the files of a folder for ``total``, in a thread of its own.

    It looks at each file once more, 6 us of a processor each, so it begins late: a short stage is over before anybody asks how long it
    takes, and in a log the first line comes after ten seconds.
    """

    def __init__(self, scan: Scan, counts: Counts) -> None:
        self._scan, self._counts = scan, counts
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True, name="counting")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _count(self) -> None:
        if self._over.wait(COUNT_AFTER_SECONDS):
            return
        files = size = 0
        with suppress(TrainerError, OSError):  # the stage meets it, too, and tells it
            for _, found in self._scan.files():
                files += 1
                size += found.size
                if self._over.is_set():
                    return
            self._counts.total_files, self._counts.total_bytes = files, size
