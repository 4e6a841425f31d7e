"""What goes out of a container: the attempt's folder while it changes, its log as output, the result to where it is collected."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trainer.contract import AttemptLayout, ExitCode, ResultManifest, TrainerError
from trainer.files import write_atomic
from trainer.mirror import Mirror
from trainer.storage import ObjectFolder, folders_told_plainly, told_plainly
from trainer.transfer import open_for_files, push_file

LOG_SECONDS = 0.5
RETRY_SECONDS = 5.0
PATIENCE_SECONDS = 15 * 60.0  # of a finished result for its store: longer than most outages, and cheaper than the training

log = logging.getLogger("trainer")


class Repeated:
    """Work that is done again and again in a thread of its own while the context is open."""

    def __init__(self, work: Callable[[], None], seconds: float) -> None:
        self._work = work
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Repeated:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._seconds):
            self._work()


class LogFollower:
    """Writes what a log gains to standard output, which platforms keep and show."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def follow(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while data := file.read(2**20):
                self._offset += len(data)
                sys.stdout.buffer.write(data)
        sys.stdout.flush()


class Courier:
    """Sends an attempt's folder to its record; what goes wrong meanwhile is told once and tried again."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror
        self._told = ""

    def send(self) -> None:
        try:
            self._mirror.sync()
            self._told = ""
        except TrainerError as exc:
            if exc.message != self._told:
                log.warning("not sent yet: %s", exc)
            self._told = exc.message

    def finish(self, is_patient: Callable[[], bool]) -> None:
        """All that is left, tried for a quarter of an hour while `is_patient`. Raises TrainerError as `Mirror.sync` does."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                self._mirror.sync()
                return
            except TrainerError as exc:
                if exc.code is not ExitCode.UNAVAILABLE or time.monotonic() > deadline or not is_patient():
                    raise
                log.warning("the result is not sent yet: %s", exc)
                time.sleep(RETRY_SECONDS)


def restore(objects: ObjectFolder, layout: AttemptLayout) -> None:
    """What an earlier start of the same attempt left in its record, where the machine was replaced. Its end is no end any more."""
    objects.delete(AttemptLayout.EXIT)
    for name in (AttemptLayout.PROGRESS_LINES, AttemptLayout.LOG):
        data = objects.get(name)
        if data is not None:
            write_atomic(layout / name, data)


def collect(layout: AttemptLayout, place: str) -> None:
    """The model's files, metrics and evaluation, side by side, where the platform collects them. Raises TrainerError as a push does."""
    manifest = ResultManifest.model_validate_json((layout / AttemptLayout.MANIFEST).read_bytes())
    with folders_told_plainly(), told_plainly(place):
        store = open_for_files(place)
        for name, file in manifest.files.items():
            if name.startswith("model/") or name in AttemptLayout.RESULT_FILES:
                push_file(store, name.removeprefix("model/"), layout / name, file)
