"""Local files written so that a reader, or a power cut, never sees half of one."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

from pydantic import BaseModel


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
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: BaseModel | dict[str, Any]) -> None:
    text = value.model_dump_json(indent=1) if isinstance(value, BaseModel) else json.dumps(value, indent=1, allow_nan=False)
    write_atomic(path, text.encode() + b"\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, or None where there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
