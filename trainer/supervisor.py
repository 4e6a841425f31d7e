"""One attempt's supervisor: a small process that outlives its launcher and tells the truth about the fit.

The attempt's lock is taken before anything else and inherited by the fit, so "somebody works on this
attempt" is true exactly while one of the two lives. Imports pydantic and psutil, never torch: it starts
in a fraction of a second and its memory is negligible beside the fit's.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import FrameType

import psutil

from trainer.contract import (
    ENV_LOCK_FD,
    ENV_SUPERVISOR_PID,
    EXIT_REASONS,
    AttemptLayout,
    ExitCode,
    ExitRecord,
    FailureReason,
    JobFile,
    Phase,
    Progress,
    TrainerError,
    TrainJob,
    parse_job,
    utc_now,
)
from trainer.files import read_json, write_json
from trainer.locks import try_lock
from trainer.memory import own_groups

TICK_SECONDS = 0.2
QUEUE_TICK_SECONDS = 0.5
LOCK_PATIENCE_SECONDS = 2.0  # longer than any prober holds the lock
WORKER_LOST = "DataLoader worker"  # torch's words for one that is gone

log = logging.getLogger("trainer")


@dataclass(frozen=True, kw_only=True)
class Limits:
    slots_dir: Path | None = None
    slots: int = 1
    max_runtime_seconds: float = float("inf")
    grace_seconds: float = 8.0
    patience_seconds: float = 15 * 60.0  # of a result for its store: longer than most outages, and cheaper than the training


class StopNote:
    """SIGTERM and SIGINT, noted from `listen` on. The first process of a container gets neither before it.

    `fenced` says that somebody else's result counts by now: nothing is worth saving then.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.asked_at = math.inf  # by the monotonic clock
        self.fenced: TrainerError | None = None

    def listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.asked_at = min(self.asked_at, time.monotonic())


@dataclass
class Supervisor:
    folder: Path
    limits: Limits
    stop: StopNote = field(default_factory=StopNote)
    started_at: datetime = field(default_factory=utc_now)
    look: Callable[[], None] = lambda: None  # whether a cancel is behind a signal; it brings the stop file

    def __post_init__(self) -> None:
        self.attempt = AttemptLayout(self.folder)

    def run(self, ready_fd: int | None) -> int:
        """The attempt's whole life. Returns the exit code, which is also in ``exit.json``; OCCUPIED writes nothing."""
        lock = self._own()
        if lock is None:
            announce(ready_fd, "occupied")
            return ExitCode.OCCUPIED
        self.stop.listen()
        config = self.attempt / AttemptLayout.CONFIG
        job = parse_job(config.read_bytes(), str(config))
        process = psutil.Process()
        write_json(
            self.attempt / AttemptLayout.JOB,
            JobFile(
                run_id=job.run_id,
                attempt=job.attempt,
                fingerprint=job.fingerprint,
                host=socket.gethostname(),
                pid=process.pid,
                pid_created_at=process.create_time(),
            ),
        )
        announce(ready_fd, "ready")
        log_to_file(self.attempt / AttemptLayout.LOG)
        record = self._live(job, lock)
        write_json(self.attempt / AttemptLayout.EXIT, record)
        return record.exit_code

    def _own(self) -> int | None:
        """The attempt's lock, or None where it is held or the attempt already had its job."""
        deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
        while True:
            lock = try_lock(self.attempt / AttemptLayout.LOCK)
            if lock is not None and (self.attempt / AttemptLayout.JOB).exists():
                os.close(lock)
                return None
            if lock is not None or time.monotonic() > deadline:
                return lock
            time.sleep(0.05)

    def _live(self, job: TrainJob, lock: int) -> ExitRecord:
        slot = self._wait_for_slot(job)
        if self.stop.fenced is not None:
            return describe_error(self.stop.fenced, self.started_at)
        if self._stop_wanted():
            return self._stopped_before_start()
        oom_kills = read_oom_kills()
        fit = self._spawn([lock] if slot is None else [lock, slot])
        timed_out = self._watch(fit)
        return self._describe(fit.returncode, timed_out=timed_out, oom_killed=read_oom_kills() > oom_kills)

    # --- Waiting for the machine -----------------------------------------------------------------

    def _wait_for_slot(self, job: TrainJob) -> int | None:
        """The lock of a free slot; None where none is wanted or the job was stopped first."""
        if self.limits.slots_dir is None:
            return None
        told = ""
        while not self._stop_wanted():
            for number in range(self.limits.slots):
                path = self.limits.slots_dir / f"slot-{number}"
                slot = try_lock(path)
                if slot is not None:
                    path.write_text(job.run_id)
                    return slot
            holders = ", ".join(sorted(self._slot_holders())) or "another training"
            if holders != told:
                told = holders
                message = f"waits until this machine is free (run {holders} trains)"
                log.info(message)
                write_json(
                    self.attempt / AttemptLayout.PROGRESS,
                    Progress(attempt=job.attempt, phase=Phase.QUEUED, epochs=job.config.epochs, message=message, host=socket.gethostname()),
                )
            time.sleep(QUEUE_TICK_SECONDS)
        return None

    def _slot_holders(self) -> set[str]:
        assert self.limits.slots_dir is not None
        paths = (self.limits.slots_dir / f"slot-{number}" for number in range(self.limits.slots))
        return {path.read_text().strip() for path in paths if path.exists()} - {""}

    def _stopped_before_start(self) -> ExitRecord:
        self._look_behind_signal()
        return ExitRecord(
            exit_code=ExitCode.CANCELLED if self._cancelled() else ExitCode.PREEMPTED,
            reason=None if self._cancelled() else FailureReason.PREEMPTED,
            message="stopped before the training started",
            cancelled=self._cancelled(),
            started_at=self.started_at,
        )

    # --- The fit -----------------------------------------------------------------------------------

    def _spawn(self, locks: list[int]) -> subprocess.Popen[bytes]:
        log_path = self.attempt / AttemptLayout.LOG
        with log_path.open("ab") as output:
            return subprocess.Popen(
                # -P: never import from the working directory, which may have a `trainer` of its own.
                [sys.executable, "-P", "-u", "-m", "trainer.task", "--attempt-dir", str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=locks,
                start_new_session=True,
                env={**os.environ, ENV_SUPERVISOR_PID: str(os.getpid()), ENV_LOCK_FD: str(locks[0])},
            )

    def _watch(self, fit: subprocess.Popen[bytes]) -> bool:
        """Waits for the fit; stops it when asked to or when its time is over. True where its time was over."""
        deadline = time.monotonic() + self.limits.max_runtime_seconds
        kill_at = float("inf")
        timed_out = False
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                fit.wait(TICK_SECONDS)
                kill_group(fit.pid)  # data loaders must not outlive the fit
                return timed_out
            reap_orphans(fit.pid)
            now = time.monotonic()
            timed_out = timed_out or now > deadline
            if self.stop.fenced is not None:
                kill_group(fit.pid)  # nothing of it is worth saving
                continue
            if (timed_out or self._stop_wanted()) and kill_at == float("inf"):
                log.info("stopping the training: %s", "its time is over" if timed_out else "asked to")
                kill_at = now + self.limits.grace_seconds
                fit.send_signal(signal.SIGTERM)
            if now > kill_at:
                log.info("it did not stop within %.0f s: killed", self.limits.grace_seconds)
                kill_group(fit.pid)
                kill_at = now + self.limits.grace_seconds

    def _look_behind_signal(self) -> None:
        if self.stop.signal is not None and not self._cancelled():
            self.look()

    def _cancelled(self) -> bool:
        return (self.attempt / AttemptLayout.STOP).exists()

    def _stop_wanted(self) -> bool:
        return self.stop.signal is not None or self.stop.fenced is not None or self._cancelled()

    # --- How it ended --------------------------------------------------------------------------------

    def _describe(self, returncode: int, *, timed_out: bool, oom_killed: bool) -> ExitRecord:
        if self.stop.fenced is not None and returncode != 0:
            return describe_error(self.stop.fenced, self.started_at)
        failure = read_json(self.attempt / AttemptLayout.FAILURE) or {}
        code, reason, message, hint = explain_exit(returncode, failure, oom_killed=oom_killed)
        stopped = code != ExitCode.OK and (code == ExitCode.PREEMPTED or returncode < 0)
        if stopped:
            self._look_behind_signal()
        cancelled = stopped and self._cancelled()
        if timed_out and stopped:
            code, reason = ExitCode.TIMEOUT, FailureReason.TIMEOUT
            message = f"stopped after its maximum run time of {self.limits.max_runtime_seconds:.0f} s; {message}"
            hint = "raise --max-runtime-seconds; `trainyard resume` goes on from the checkpoint"
        elif stopped and self.stop.signal is not None and not cancelled:
            code, reason = ExitCode.PREEMPTED, FailureReason.PREEMPTED
        return ExitRecord(
            exit_code=ExitCode.CANCELLED if cancelled else code,
            reason=None if cancelled else reason,
            message=message,
            hint=hint,
            signal=-returncode if returncode < 0 else None,
            cancelled=cancelled,
            started_at=self.started_at,
            phase_seconds=read_json(self.attempt / "phases.json") or {},
        )


def describe_error(error: TrainerError, started_at: datetime) -> ExitRecord:
    reason = EXIT_REASONS.get(error.code, FailureReason.UNKNOWN)
    return ExitRecord(exit_code=error.code, reason=reason, message=error.message, hint=error.hint, started_at=started_at)


def log_to_file(path: Path) -> None:
    """The supervisor's words among those of the fit."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if any(isinstance(handler, logging.FileHandler) and handler.baseFilename == str(path) for handler in log.handlers):
        return
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s supervisor: %(message)s", "%Y-%m-%dT%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def explain_exit(returncode: int, failure: dict[str, str], *, oom_killed: bool) -> tuple[int, FailureReason | None, str, str]:
    """Exit code, reason, message and hint for how the fit ended. Pure.

    `returncode` is as in subprocess: negative for a signal. `failure` is the fit's own ``failure.json``.
    """
    if returncode == 0:
        return ExitCode.OK, None, "", ""
    hint = "use a smaller batch size, image size or number of workers, or a machine with more memory"
    if oom_killed and WORKER_LOST in failure.get("message", ""):
        message = "the system killed a data-loading process: out of memory"
        return ExitCode.OUT_OF_MEMORY, FailureReason.OUT_OF_MEMORY, message, hint
    if failure and returncode > 0:
        reason = EXIT_REASONS.get(returncode, FailureReason.USER_CODE)
        return returncode, reason, failure.get("message", ""), failure.get("hint", "")
    if returncode == -signal.SIGKILL and oom_killed:
        return ExitCode.OUT_OF_MEMORY, FailureReason.OUT_OF_MEMORY, "the system killed the training: out of memory", hint
    if returncode < 0:
        name = signal.Signals(-returncode).name
        crashed = -returncode in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGABRT, signal.SIGFPE)
        reason = FailureReason.USER_CODE if crashed else FailureReason.INFRASTRUCTURE
        return (ExitCode.USER_CODE if crashed else ExitCode.UNAVAILABLE), reason, f"the training was ended by {name}", ""
    reason = EXIT_REASONS.get(returncode, FailureReason.USER_CODE)
    return returncode, reason, f"the training ended with exit code {returncode} and left no explanation", "the log's last lines may tell"


def kill_group(pid: int) -> None:
    """SIGKILL to the process group that the fit leads; gone already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def reap_orphans(fit: int) -> None:
    """Takes leave of ended processes that the kernel handed to this one, as it does to a container's first, before the fit ends."""
    with contextlib.suppress(ChildProcessError):
        # Looked at first: how the fit ended is for its Popen to learn.
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid != fit:
            os.waitpid(ended.si_pid, 0)


def read_oom_kills(root: Path = Path("/")) -> int:
    """How often the kernel killed for want of memory: in this control group where that counts, else on the machine.

    ``memory.events`` is of version 2 (cgroups(7)), ``memory.oom_control`` of version 1.
    """
    groups = [group for _, inner, top in own_groups(root) for group in (inner, top)]
    for path in (*(group / name for group in groups for name in ("memory.events", "memory.oom_control")), root / "proc/vmstat"):
        if path.is_file():
            for line in path.read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0


def announce(descriptor: int | None, word: str) -> None:
    """Tells the launcher, which may be gone already."""
    if descriptor is None:
        return
    with contextlib.suppress(BrokenPipeError):
        os.write(descriptor, f"{word}\n".encode())
    os.close(descriptor)
