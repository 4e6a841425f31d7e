"""Reads files with their digests, and refuses one that changes meanwhile."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from blocks.scanning import Stat, stat_of, vanished_error
from trainer.errors import ExitCode, TrainerError

MEMORY_BYTES = 16 * 2**20  # larger ones are hashed first, and sent from the file
TAKE_FILES = 512  # looked up together: each statement waits for the interpreter, which the readers hold
TAKE_BYTES = 4 * 2**20


class Read(NamedTuple):
    """``began_ns`` is the time before the first byte was read: the file may have been written until then."""

    path: str
    stat: Stat
    digest: bytes
    content: bytes | None  # None: too large to hold
    began_ns: int


def read_files(root: Path, paths: list[str], most: int = MEMORY_BYTES) -> list[Read]:
    """Content and digest of each file. Raises TrainerError (DATA) for one that changes meanwhile, PERMISSION, NOT_FOUND."""
    return [read_file(f"{root}/{path}", path, most) for path in paths]


def read_file(full: str, path: str, most: int = MEMORY_BYTES) -> Read:
    """Content is held up to `most` bytes."""
    try:
        descriptor = os.open(full, os.O_RDONLY)
    except PermissionError as exc:
        raise TrainerError(
            f"cannot read {full}", hint="mend its permissions, or name it in .trainyardignore", code=ExitCode.PERMISSION
        ) from exc
    except FileNotFoundError as exc:
        raise vanished_error(full) from exc
    try:
        began_ns = time.time_ns()
        found = stat_of(os.fstat(descriptor))
        if found.size > most:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            if stat_of(os.fstat(descriptor)) != found:
                raise changed_error(full)
            return Read(path, found, digest, None, began_ns)
        content = read_all(descriptor, found.size)
        if len(content) != found.size or stat_of(os.fstat(descriptor)) != found:
            raise changed_error(full)
    finally:
        os.close(descriptor)
    return Read(path, found, hashlib.sha256(content).digest(), content, began_ns)


def read_all(descriptor: int, size: int) -> bytes:
    """Up to one byte more than `size`, so that growth shows."""
    content = os.read(descriptor, size + 1)
    if len(content) >= size:
        return content
    parts = [content]
    while content := os.read(descriptor, size + 1):
        parts.append(content)
    return b"".join(parts)


def take_read(ahead: deque[tuple[Future[list[Read]] | str, int]]) -> tuple[list[Read] | str, int]:
    """The first of the queue, once it has been read, with what has been read behind it; and their bytes."""
    first, size = ahead.popleft()
    if isinstance(first, str):
        return first, size
    found = list(first.result())
    while ahead and len(found) < TAKE_FILES and size < TAKE_BYTES:
        more, size_of_more = ahead[0]
        if isinstance(more, str) or not more.done():
            break
        found += more.result()
        size += size_of_more
        ahead.popleft()
    return found, size


def changed_error(full: str) -> TrainerError:
    return TrainerError(f"{full} changed while it was staged", hint="stage again when nothing writes to the folder", code=ExitCode.DATA)
