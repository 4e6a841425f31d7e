"""What goes out of a container: the attempt's folder while it changes, its log as output, the result to where it is collected."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path

from trainer.contract import AttemptLayout, ExitCode, ResultManifest, TrainerError
from trainer.fencing import Fenced
from trainer.files import write_atomic
from trainer.mirror import Mirror
from trainer.storage import ObjectFolder, folders_told_plainly, told_plainly
from trainer.supervisor import StopNote
from trainer.transfer import open_for_files, push_file

LOG_SECONDS = 0.5
SYNC_SECONDS = 5.0
RETRY_SECONDS = 5.0
TICK_SECONDS = 0.2
JOIN_SECONDS = 2.0

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
        self._thread.join(JOIN_SECONDS)  # it may wait for a store

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
    """Sends an attempt's folder to its record, in a thread of its own, as a store may keep one waiting for minutes.

    What goes wrong while the training runs is told once and tried again; where the attempt is another container's, it is stopped.
    """

    def __init__(self, mirror: Mirror, stop: StopNote, patience_seconds: float) -> None:
        self._mirror, self._stop = mirror, stop
        self._patience_seconds = patience_seconds
        self._told = ""
        self._sent_at = 0.0
        self._training_ended = threading.Event()
        self._sent: Future[None] = Future()

    def start(self) -> None:
        threading.Thread(target=self._run, daemon=True, name="courier").start()

    def finish(self, is_over: Callable[[], bool]) -> None:
        """All that is left, tried until patience ends or `is_over`. Raises TrainerError as `Mirror.sync` does, or UNAVAILABLE."""
        self._training_ended.set()
        while not wait([self._sent], TICK_SECONDS).done:
            if is_over():
                raise TrainerError("the time to stop in was over", hint="give more --grace-seconds", code=ExitCode.UNAVAILABLE)
        self._sent.result()

    def _run(self) -> None:
        try:
            while not self._training_ended.wait(TICK_SECONDS):
                if self._mirror.has_news() or time.monotonic() - self._sent_at > SYNC_SECONDS:
                    self._send()
                    self._sent_at = time.monotonic()
            self._mirror.forget()
            self._send_all()
        except BaseException as exc:
            self._sent.set_exception(exc)
        else:
            self._sent.set_result(None)

    def _send(self) -> None:
        try:
            self._mirror.sync()
            self._told = ""
        except Fenced as exc:
            self._stop.fenced = exc
            raise
        except TrainerError as exc:
            self._tell(exc)

    def _send_all(self) -> None:
        deadline = time.monotonic() + self._patience_seconds
        while True:
            try:
                self._mirror.sync()
                return
            except TrainerError as exc:
                if exc.code is not ExitCode.UNAVAILABLE or time.monotonic() > deadline:
                    raise
                self._tell(exc)
                time.sleep(RETRY_SECONDS)

    def _tell(self, error: TrainerError) -> None:
        if error.message != self._told:
            log.warning("not sent yet: %s", error)
        self._told = error.message


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
