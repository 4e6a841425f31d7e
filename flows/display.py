"""What people see in a terminal: live progress, tables, the summary. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from blocks.job import JobState, JobStatus
from blocks.record import RunRecord
from flows.reporting_text import dataset_lines, describe_status, format_seconds


def stderr_console() -> Console:
    return Console(file=sys.stderr, highlight=False)


class TrainingDisplay:
    """A live bar with rate and ETA in a terminal; a plain line per change elsewhere."""

    def __init__(self) -> None:
        self.console = stderr_console()
        self.record: RunRecord | None = None
        self.last = ""
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
            )
            self.bar = Progress(*columns, TextColumn("{task.fields[detail]}", markup=False), console=self.console, transient=True)

    def __enter__(self) -> Self:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def on_status(self, record: RunRecord, status: JobStatus) -> None:
        if self.record is None:
            self.record = record
            self.say(f"run {record.run_id}, record at {record.uri}")
            index = record.dataset()
            for line in [] if index is None else dataset_lines(index):
                self.say(line)
        unknown = status.state is JobState.UNKNOWN
        if self.bar is None or unknown or self.last:  # beside the bar: that nobody sees the job, and then that it is seen again
            self._plain(status)
        if self.bar is not None:
            self.last = self.last if unknown else ""
            self._live(self.bar, record, status)

    def _plain(self, status: JobStatus) -> None:
        epoch = status.progress.epoch if status.progress else 0
        key = f"{status.native_state} {epoch} {status.message}"
        if key != self.last:
            self.last = key
            self.say(describe_status(status))

    def _live(self, bar: Progress, record: RunRecord, status: JobStatus) -> None:
        if self.task is None:
            self.task = bar.add_task(record.run_id[:6], total=1.0, detail="")
        fraction = status.progress.fraction if status.progress else 0.0
        bar.update(self.task, completed=fraction, detail=describe_live(status))


def describe_live(status: JobStatus) -> str:
    """The moving part of the bar: phase, epoch and step, best figure so far, rate, ETA."""
    progress = status.progress
    if progress is None or not progress.steps or status.state is JobState.UNKNOWN:
        return describe_status(status)
    parts = [f"{progress.phase.value} {min(progress.epoch + 1, progress.epochs)}/{progress.epochs} step {progress.step}/{progress.steps}"]
    parts += [f"val mAP50 {progress.metrics['map50']:.3f}"] if "map50" in progress.metrics else []
    parts += [f"{progress.images_per_second:.0f} images/s"] if progress.images_per_second else []
    parts += [f"ETA {format_seconds(progress.eta_seconds)}"] if progress.eta_seconds else []
    return ", ".join(parts)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=240)  # a pipe has no width: never cut a column there
    table = Table(*columns, title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # plain: a class may be called [person]
    console.print(table)
