"""Writes ``progress.json`` (the latest state) and ``progress.jsonl`` (one line per finished epoch)."""

from __future__ import annotations

import math
import os
import socket
import time
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.contract import AttemptLayout, Phase, Progress, utc_now
from trainer.files import write_atomic, write_json

MIN_INTERVAL_SECONDS = 1.0


def finite(value: Any) -> Any:
    """The value without NaN and infinity, which JSON has no word for: dropped from a dict, None elsewhere."""
    if isinstance(value, dict):
        cleaned = {key: finite(item) for key, item in value.items()}
        return {key: item for key, item in cleaned.items() if item is not None}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_lines(path: Path) -> list[Progress]:
    """The finished epochs in the file, in its order. A line cut by a crash is left out."""
    lines: list[Progress] = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            lines.append(Progress.model_validate_json(text))
        except ValidationError:
            continue
    return lines


class ProgressWriter:
    """The one writer of an attempt's progress files. Raises OSError where the disk refuses."""

    def __init__(self, layout: AttemptLayout, *, attempt: int, epochs: int) -> None:
        self._latest_path = layout / AttemptLayout.PROGRESS
        self._lines_path = layout / AttemptLayout.PROGRESS_LINES
        self._written_at = -math.inf
        self._last_line = max((line.epoch for line in read_lines(self._lines_path)), default=0)
        first = {"attempt": attempt, "phase": Phase.PREPARING, "epoch": self._last_line, "epochs": epochs, "host": socket.gethostname()}
        self.latest = Progress.model_validate(first)

    def update(self, *, at_most_every_second: bool = False, **changes: Any) -> Progress:
        """Changes fields of the latest state and writes it, unless it was written within the last second and may wait."""
        changes = {key: finite(value) for key, value in changes.items()}
        self.latest = self.latest.model_copy(update={**changes, "updated_at": utc_now()})
        now = time.monotonic()
        if not at_most_every_second or now - self._written_at >= MIN_INTERVAL_SECONDS:
            write_json(self._latest_path, self.latest)
            self._written_at = now
        return self.latest

    def beat(self) -> None:
        """Says, at most once per second, that the work goes on: a validation of an hour is no stall."""
        self.update(at_most_every_second=True)

    def is_due(self) -> bool:
        """Whether an update that may wait would be written now: lets the caller skip costly measurements."""
        return time.monotonic() - self._written_at >= MIN_INTERVAL_SECONDS

    def finish_epoch(self) -> None:
        """Adds the latest state as the line of its epoch, once per epoch."""
        if self.latest.epoch <= self._last_line:
            return
        self._append(self.latest)

    def rewind(self, finished: Progress | None, epoch: int) -> None:
        """Before a resume from `epoch`: drops later lines, and adds `finished`, its line, where a crash lost it."""
        kept = [line for line in read_lines(self._lines_path) if line.epoch <= epoch]
        if self._lines_path.exists():
            write_atomic(self._lines_path, "".join(line.model_dump_json() + "\n" for line in kept).encode())
        self._last_line = max((line.epoch for line in kept), default=0)
        if finished is not None and finished.attempt == self.latest.attempt and finished.epoch > self._last_line:
            self._append(finished)
        self._last_line = max(self._last_line, epoch)

    def _append(self, line: Progress) -> None:
        self._lines_path.parent.mkdir(parents=True, exist_ok=True)
        with self._lines_path.open("ab") as file:
            file.write(line.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._last_line = line.epoch
