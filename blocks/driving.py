"""Who works on a run now: one small object per flow run, ``drivers/<flow run id>.json`` in the run's folder.

A driver that ends in an orderly manner removes its object; one that was killed leaves it behind, and that is
how `flows.reconcile` knows that a run wants somebody to go on with it. Two drivers of one run do no harm
(every step finds or creates), so a wrong guess about life costs a few look-ups and never a second job.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import datetime, timedelta

import psutil
from pydantic import AwareDatetime, Field

from blocks.attempts import Action, next_step_of
from blocks.errors import is_transient
from blocks.outputs import Output, look_everywhere, remember_output, tell_silent
from blocks.record import RunRecord
from trainer.contract import StoredRecord, TrainerError, utc_now
from trainer.storage import is_bucket

log = logging.getLogger("trainyard.driving")

DRIVERS = "drivers"
DRIVEN = ".driven"  # beside the runs of a bucket: a name for each run that has drivers
BEAT_SECONDS = 20.0
LAST_BEAT_SECONDS = 5.0
# For a driver on another machine, whose process cannot be looked at.
SILENCE_ALLOWED = timedelta(seconds=120)


class Driver(StoredRecord):
    flow_run_id: str
    deployed: bool = Field(default=False, description="Started by a worker, which can be told to run it again.")
    host: str
    pid: int
    pid_created_at: float = Field(description="Start time of the process in seconds since the epoch, against reused pids.")
    seen_at: AwareDatetime = Field(default_factory=utc_now)


def is_alive(driver: Driver, now: datetime) -> bool:
    """On this host, whether the process is there; of another host, whether it was heard of lately."""
    if driver.host != socket.gethostname():
        return now - driver.seen_at < SILENCE_ALLOWED
    try:
        process = psutil.Process(driver.pid)
        return abs(process.create_time() - driver.pid_created_at) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def drivers(record: RunRecord) -> list[Driver]:
    found = (record.folder.get(f"{DRIVERS}/{name}") for name in record.folder.names(DRIVERS))
    return [Driver.model_validate_json(data) for data in found if data]


def announce(record: RunRecord, flow_run_id: str) -> None:
    """A flow run is to work on the run and has no process yet. It writes its own object in place of this one."""
    _write(record, Driver(flow_run_id=flow_run_id, deployed=True, host=socket.gethostname(), pid=0, pid_created_at=0))


def forget(record: RunRecord, flow_run_id: str) -> None:
    record.folder.delete(f"{DRIVERS}/{flow_run_id}.json")
    if is_bucket(record.uri) and not record.folder.names(DRIVERS):
        _output_of(record).folder.delete(f"{DRIVEN}/{record.run_id}")


def _write(record: RunRecord, driver: Driver) -> None:
    if is_bucket(record.uri):
        # First, and at every beat: a driver that ended may take it away at this moment.
        _output_of(record).folder.put(f"{DRIVEN}/{record.run_id}", b"")
    record.folder.put(f"{DRIVERS}/{driver.flow_run_id}.json", driver.model_dump_json(indent=1).encode())


def _output_of(record: RunRecord) -> Output:
    return Output(record.output_uri, record.access)


def driven_runs(on_silent: Callable[[Output, Exception], None] = tell_silent) -> list[RunRecord]:
    """The runs of the known outputs that somebody works on, or worked on and left in disorder."""
    return look_everywhere(_driven_in, on_silent)


def _driven_in(output: Output) -> list[RunRecord]:
    # A bucket is paid by the request, and may hold thousands of runs: there, one list names those that are driven.
    candidates = map(output.record, output.folder.names(DRIVEN)) if output.is_bucket else output.records()
    return [record for record in candidates if record.folder.names(DRIVERS)]


class Heartbeat:
    """Says that this process works on the run."""

    def __init__(self, record: RunRecord, flow_run_id: str, *, deployed: bool) -> None:
        self.record = record
        self.flow_run_id = flow_run_id
        self.deployed = deployed
        self.keep = False  # something is left to do for the run, though this process is through with it
        self._process = psutil.Process()
        self._due_at = time.monotonic() + BEAT_SECONDS

    def beat(self) -> None:
        driver = Driver(
            flow_run_id=self.flow_run_id,
            deployed=self.deployed,
            host=socket.gethostname(),
            pid=self._process.pid,
            pid_created_at=self._process.create_time(),
        )
        _write(self.record, driver)

    def is_due(self) -> bool:
        """Whether it is time for what a watcher does beside watching, as often as the heart beats."""
        now = time.monotonic()
        if now < self._due_at:
            return False
        self._due_at = now + BEAT_SECONDS
        return True

    @contextmanager
    def beating(self) -> Generator[None]:
        """In a thread of its own, as what a flow does may take long and tell nothing: reading a dataset, staging it, building an image."""
        ended = threading.Event()

        def go_on() -> None:
            while not ended.wait(BEAT_SECONDS):
                try:
                    self.beat()
                except Exception as exc:  # the flow itself meets it too, and knows what to do
                    log.info("run %s: no heartbeat: %s: %s", self.record.run_id, type(exc).__name__, exc)

        thread = threading.Thread(target=go_on, name=f"heartbeat of {self.record.run_id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            # A beat that a slow store holds up longer may be written when the driver is gone; `flows.reconcile` clears it away.
            thread.join(LAST_BEAT_SECONDS)


@contextmanager
def driving(record: RunRecord, flow_run_id: str, *, deployed: bool, max_attempts: int) -> Generator[Heartbeat]:
    """While inside, this process is a driver of the run.

    Left behind is the object of one that was killed, interrupted or told to terminate, or that lost touch with
    the provider while the run is open: somebody else may go on.
    """
    remember_output(record.output_uri, record.access)
    heart = Heartbeat(record, flow_run_id, deployed=deployed)
    heart.beat()
    try:
        with heart.beating():
            yield heart
    except Exception as exc:
        if isinstance(exc, TrainerError) and is_transient(exc):
            raise  # of the record's own store, which cannot be asked now
        over = not record.exists() or next_step_of(record, max_attempts=max_attempts).action is Action.DONE
        if over and not heart.keep:
            forget(record, flow_run_id)
        raise
    else:
        if not heart.keep:
            forget(record, flow_run_id)
