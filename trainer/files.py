"""Local files written so that a reader, or a power cut, never sees half of one."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

ENV_HOME = "TRAINYARD_HOME"  # where this machine keeps runs, caches and locks; default ~/trainyard
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # of a volume that refuses flock
MIB = 2**20


def utc_now() -> datetime:
    return datetime.now(UTC)


def disk_full_error(path: Path, number: int, needed: int) -> OSError:
    """An OSError that says which file, how much it needs, and how much there is. The number is ENOSPC or EDQUOT."""
    try:
        free = f", {shutil.disk_usage(path.parent).free / MIB:.1f} MiB are free"
    except OSError:
        free = ""
    return OSError(number, f"{os.strerror(number)}: {needed / MIB:.1f} MiB needed{free}", str(path))


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` by `data` in one step, durable once this returns. Raises OSError (ENOSPC on a full disk)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: threads of one process may write the same file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as exc:
        if exc.errno in DISK_FULL:
            raise disk_full_error(path, exc.errno, len(data)) from exc
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: BaseModel | dict[str, Any]) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) if isinstance(value, dict) else value.model_dump_json(indent=1)
    write_atomic(path, text.encode() + b"\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
