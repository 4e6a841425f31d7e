"""The output of an attempt's pods, one after the other, in bounded batches without loss or repeat. The cursor is ours alone.

The API server tells lines from a second on, and each with its time: what lies at or before the last one read is skipped. Where
the pods are gone, the log that the trainer keeps in the bucket goes on behind the last line read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import BaseModel

BATCH_BYTES = 64 * 1024
MOST_BYTES = 16 * 1024 * 1024  # where so much was said within one second


class LogCursor(BaseModel):
    """Behind which line of which pod."""

    pod: str = ""  # its uid; earlier pods are read to their end
    time: str = ""  # of the last line
    count: int = 0  # lines read that have this very time
    last: str = ""  # digest of the last line, to find the place in the bucket's log
    offset: int | None = None  # in the bucket's log, once that is read

    @classmethod
    def parse(cls, text: str) -> LogCursor:
        return cls.model_validate(json.loads(text)) if text else cls()

    def __str__(self) -> str:
        return json.dumps(self.model_dump(exclude_defaults=True), separators=(",", ":"))


class Lines(NamedTuple):
    lines: tuple[str, ...]
    cursor: LogCursor
    more: bool  # of this pod there is more to read at once


def pods_to_read(pods: list[dict[str, Any]], cursor: LogCursor) -> list[dict[str, Any]]:
    """From the one that is being read on. Where that is gone, those after it."""
    place = next((place for place, pod in enumerate(pods) if pod["metadata"]["uid"] == cursor.pod), None)
    if place is not None:
        return pods[place:]
    if not cursor.time:
        return pods
    return [pod for pod in pods if pod["metadata"]["creationTimestamp"] >= cursor.time[:19]]


def read_pod(fetch: Callable[[dict[str, str]], bytes], uid: str, cursor: LogCursor) -> Lines:
    """The next lines of one pod. `fetch` asks its log with the query given."""
    here = cursor if cursor.pod == uid else LogCursor(pod=uid)
    limit = BATCH_BYTES
    while True:
        query = {"timestamps": "true", "limitBytes": str(limit), **({"sinceTime": here.time} if here.time else {})}
        data = fetch(query)
        full = len(data) >= limit
        found = select_new(split_lines(data, whole=not full), here)
        if found or not full or limit >= MOST_BYTES:
            break
        limit *= 8  # all of it was known: many lines of the last line's second
    return Lines(tuple(text for _, text in found), advance(here, found), full)


def split_lines(data: bytes, *, whole: bool) -> list[tuple[str, str]]:
    """Time and text of each line. Where the server cut the answer off, the last line is only begun."""
    text = data if whole else data[: data.rfind(b"\n") + 1]
    pairs = (line.partition(" ") for line in text.decode(errors="replace").split("\n") if line)
    return [(time, words.rstrip("\r")) for time, _, words in pairs]


def select_new(lines: list[tuple[str, str]], cursor: LogCursor) -> list[tuple[str, str]]:
    if not cursor.time:
        return lines
    last = _sortable(cursor.time)
    same = 0
    fresh: list[tuple[str, str]] = []
    for time, text in lines:
        key = _sortable(time)
        if key < last:
            continue
        if key == last:
            same += 1
            if same <= cursor.count:
                continue
        fresh.append((time, text))
    return fresh


def advance(cursor: LogCursor, lines: list[tuple[str, str]]) -> LogCursor:
    if not lines:
        return cursor
    time, text = lines[-1]
    count = sum(1 for other, _ in lines if other == time) + (cursor.count if time == cursor.time else 0)
    return LogCursor(pod=cursor.pod, time=time, count=count, last=digest(text))


def _sortable(time: str) -> str:
    """RFC 3339 with as many digits as the runtime gave: ``...:05Z``, ``...:05.12Z``."""
    whole, _, fraction = time.rstrip("Z").partition(".")
    return f"{whole}.{fraction:0<9}"


def digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()[:16]


def place_in_log(text: bytes, cursor: LogCursor) -> int:
    """Where the bucket's log goes on behind the last line that a pod told: 0 where none was read, its end where it is not found."""
    if not cursor.last:
        return 0
    offset, place = 0, len(text)
    for line in text.splitlines(keepends=True):
        offset += len(line)
        if digest(line.decode(errors="replace").rstrip("\r\n")) == cursor.last:
            place = offset
    return place
