"""This machine as a provider: a job is a supervised process that outlives its launcher. The reference implementation.

Idempotency: the lock on the attempt's folder, taken by the supervisor before it writes ``job.json``.
Two submitters may start two supervisors; one owns the attempt, the other leaves without a trace.
Liveness is the lock and not a process id. A stop is a file that the supervisor watches, so it reaches a
job from any process that sees the folder, and never a stranger that was given the same process id.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import psutil
from pydantic import Field, JsonValue

from blocks.attempt_objects import PHASE_STATES, parse_exit, read_log
from blocks.errors import ConfigError, JobNotFound, ProviderError, QuotaError, ServiceUnavailable
from blocks.job import (
    Capabilities,
    CheckLine,
    CheckReport,
    FailureReason,
    JobRef,
    JobSpec,
    JobState,
    JobStatus,
    LogBatch,
    Plan,
    Problem,
)
from blocks.naming import job_name
from blocks.places import home
from blocks.provider import AlreadyExists, Provider
from trainer.contract import AttemptLayout, ExitRecord, JobFile, Progress, TrainJob, UserInput, utc_now
from trainer.files import read_json, write_json
from trainer.locks import is_held
from trainer.storage import ObjectFolder, to_path

START_TIMEOUT_SECONDS = 60.0  # a cold interpreter on a busy machine
GIB = 1024**3


class LocalSettings(UserInput):
    """Settings of the provider `local`."""

    home: Path = Field(default_factory=home, description="Folder for runs, locks and the list of jobs.")
    python: str = Field(default=sys.executable, description="Interpreter that has the `train` extra.")
    slots: int = Field(default=1, ge=1, le=64, description="Trainings at a time on this machine; others wait.")
    min_free_gib: float = Field(default=1.0, ge=0, description="Refuse to start with less free disk than this.")
    cache_limit_gib: float = Field(default=50.0, gt=0, description="Least recently used datasets leave this machine's cache above this.")
    grace_seconds: float = Field(
        default=8.0, ge=1, le=120, description="Time to save a checkpoint between being asked to stop and being killed."
    )


class LocalProvider(Provider[LocalSettings]):
    NAME: ClassVar[str] = "local"
    SETTINGS: ClassVar[type[UserInput]] = LocalSettings
    CAPABILITIES: ClassVar[Capabilities] = Capabilities(
        spot=False, nodes=1, needs_image=False, local_files=True, max_runtime_seconds=28 * 86_400, poll_seconds=(0.25, 2.0)
    )

    def check(self, output_uri: str = "") -> CheckReport:
        disk = self._check_disk(to_path(output_uri) if output_uri else None)
        return CheckReport(provider=self.NAME, lines=(self._check_python(), disk, self._check_machine()))

    def poll(self, ref: JobRef) -> JobStatus:
        return parse_status(read_native(AttemptLayout(to_path(ref.output_uri)), ref.run_id))

    def list_jobs(self) -> Iterator[tuple[JobRef, JobStatus]]:
        for path in sorted((self.settings.home / "jobs").glob("ty-*")):
            attempt = AttemptLayout(Path(path.read_text()))
            job = read_json(attempt / AttemptLayout.JOB)
            if job is not None:
                ref = build_ref(JobFile.model_validate(job), attempt.folder)
                yield ref, self.poll(ref)

    def logs(self, ref: JobRef, cursor: str = "") -> LogBatch:
        """The cursor is the offset in bytes of the first unread line."""
        # Asked before reading: lines written in between belong to the next batch.
        ended = self.poll(ref).state.is_terminal
        return read_log(self.objects(ref.output_uri), cursor, ended=ended)

    def cancel(self, ref: JobRef) -> None:
        attempt = AttemptLayout(to_path(ref.output_uri))
        if attempt.folder.exists():
            ObjectFolder(ref.output_uri).create(AttemptLayout.STOP, utc_now().isoformat().encode())
            wake_supervisor(attempt)

    def _validate(self, spec: JobSpec) -> tuple[Problem, ...]:
        problems: list[Problem] = []
        if spec.resources.nodes == 1 and (spec.resources.instance_type or spec.resources.region):
            problems.append(
                Problem(
                    field="resources", message="this machine has no instance types or regions", hint="leave instance_type and region empty"
                )
            )
        if not spec.output_uri.startswith("file://"):
            problems.append(
                Problem(
                    field="output", message=f"{spec.output_uri} is not a folder of this machine", hint="give an absolute path as output"
                )
            )
        return tuple(problems)

    def _build(self, spec: JobSpec) -> tuple[dict[str, JsonValue], str, str]:
        return build_request(spec, self.settings), "this-machine", "local"

    def _find(self, plan: Plan) -> JobRef | None:
        folder = to_path(plan.spec.attempt_uri)
        job = read_json(folder / AttemptLayout.JOB)
        return None if job is None else build_ref(JobFile.model_validate(job), folder)

    def _create(self, plan: Plan) -> JobRef:
        folder = to_path(plan.spec.attempt_uri)
        self._require_disk(folder)
        write_json(folder / AttemptLayout.CONFIG, build_job(plan))
        jobs = ObjectFolder(str(self.settings.home))
        jobs.put(f"jobs/{job_name(plan.spec.run_id, plan.spec.attempt)}", str(folder).encode())
        word = launch([str(part) for part in plan.request["argv"]], folder)  # type: ignore[union-attr]
        job = read_json(folder / AttemptLayout.JOB)
        if word != "ready" or job is None:
            raise AlreadyExists(f"the supervisor said {word!r}")
        return build_ref(JobFile.model_validate(job), folder)

    def _translate(self, exc: Exception) -> ProviderError | None:
        if isinstance(exc, PermissionError):
            return ConfigError(f"cannot write: {exc}", hint="choose another output folder, or mend its permissions")
        if isinstance(exc, OSError) and exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return QuotaError(f"the disk is full: {exc}", hint="free space, or choose another output folder")
        if isinstance(exc, OSError):
            return ServiceUnavailable(f"this machine refused: {exc}")
        return None

    def _require_disk(self, folder: Path) -> None:
        line = self._check_disk(folder)
        if not line.ok:
            raise QuotaError(line.message, hint=line.fix)

    def _check_disk(self, folder: Path | None = None) -> CheckLine:
        place = existing_parent(folder or self.settings.home)
        free = shutil.disk_usage(place).free / GIB
        ok = free >= self.settings.min_free_gib
        fix = "" if ok else "free space (`trainyard runs` names what is stored), choose another --output, or lower min_free_gib"
        return CheckLine(name="disk", ok=ok, message=f"{free:.1f} GiB free at {place}, {self.settings.min_free_gib:g} wanted", fix=fix)

    def _check_python(self) -> CheckLine:
        probe = "import importlib.metadata as m; print(*(f'{p} {m.version(p)}' for p in ('torch', 'ultralytics')), sep=', ')"
        answer = subprocess.run([self.settings.python, "-P", "-c", probe], capture_output=True, text=True, timeout=60, check=False)
        ok = answer.returncode == 0
        return CheckLine(
            name="trainer",
            ok=ok,
            message=answer.stdout.strip() if ok else f"{self.settings.python} lacks torch or ultralytics",
            fix="" if ok else "uv sync --extra train   (or: pip install 'trainyard[train]')",
        )

    def _check_machine(self) -> CheckLine:
        busy = sum(is_held(self.settings.home / "slots" / f"slot-{number}") for number in range(self.settings.slots))
        free = self.settings.slots - busy
        state = f"{free} of {self.settings.slots} free" if free else "all busy; the next training waits"
        return CheckLine(name="slots", ok=True, message=f"{state} (trainings at a time on {socket.gethostname()})")


# --- Pure ----------------------------------------------------------------------------------------------


def build_request(spec: JobSpec, settings: LocalSettings) -> dict[str, JsonValue]:
    """The supervisor's command line and the job it reads. No clock, no environment."""
    folder = str(to_path(spec.attempt_uri))
    cache: dict[str, JsonValue] = {}
    if spec.dataset.store_uri is not None:
        cache = {"cache_dir": str(settings.home / "cache" / "datasets"), "cache_limit_gib": settings.cache_limit_gib}
    argv: list[JsonValue] = [
        # -P: the working directory, which may have a `trainer` of its own, stays off the import path.
        *(settings.python, "-P", "-m", "trainer"),
        *("--attempt-dir", folder),
        *("--slots-dir", str(settings.home / "slots")),
        *("--slots", str(settings.slots)),
        *("--max-runtime-seconds", str(spec.max_runtime_seconds)),
        *("--grace-seconds", str(settings.grace_seconds)),
    ]
    return {
        "argv": argv,
        "job": {
            "run_id": spec.run_id,
            "attempt": spec.attempt,
            "name": spec.name,
            "config": spec.config.model_dump(mode="json"),
            "dataset": spec.dataset.model_dump(mode="json", exclude_none=True),
            **cache,
        },
    }


def build_job(plan: Plan) -> TrainJob:
    return TrainJob.model_validate({**plan.request["job"], "fingerprint": plan.fingerprint})  # type: ignore[dict-item]


def build_ref(job: JobFile, folder: Path) -> JobRef:
    return JobRef(
        provider=LocalProvider.NAME,
        native_id=job_name(job.run_id, job.attempt),
        run_id=job.run_id,
        attempt=job.attempt,
        scope=job.host,
        output_uri=folder.as_uri(),
        fingerprint=job.fingerprint,
        submitted_at=job.created_at,
        console_url=(folder / AttemptLayout.LOG).as_uri(),
    )


def parse_status(native: dict[str, Any]) -> JobStatus:
    """What the attempt's files and its lock say. `native` as `read_native` gives it."""
    job = JobFile.model_validate(native["job"])
    progress = Progress.model_validate(native["progress"]) if native["progress"] else None
    if native["exit"]:
        return parse_exit(ExitRecord.model_validate(native["exit"]), progress, cost_usd=0.0)
    started = job.created_at
    if not native["alive"]:
        return JobStatus(
            state=JobState.FAILED,
            native_state="vanished",
            reason=FailureReason.INFRASTRUCTURE,
            message="the training process is gone and left no word: the machine restarted, or it was killed",
            progress=progress,
            started_at=started,
            ended_at=progress.updated_at if progress else started,
            cost_usd=0.0,
        )
    state = PHASE_STATES[progress.phase] if progress else JobState.STARTING
    message = progress.message if progress else ""
    if native["stopping"]:
        state, message = JobState.STOPPING, "asked to stop; saving"
    phase = progress.phase.value if progress else "starting"
    return JobStatus(state=state, native_state=phase, message=message, progress=progress, started_at=started, cost_usd=0.0)


# --- The world -------------------------------------------------------------------------------------------


def read_native(attempt: AttemptLayout, run_id: str) -> dict[str, Any]:
    """The attempt's state on disk. Raises JobNotFound where no supervisor ever owned it."""
    job = read_json(attempt / AttemptLayout.JOB)
    if job is None:
        raise JobNotFound(f"no job was started in {attempt.folder}", provider=LocalProvider.NAME, run_id=run_id)
    # The lock before the exit record: a job that ends in between is then seen with its record.
    alive = is_held(attempt / AttemptLayout.LOCK)
    return {
        "job": job,
        "alive": alive,
        "exit": read_json(attempt / AttemptLayout.EXIT),
        "progress": read_json(attempt / AttemptLayout.PROGRESS),
        "stopping": (attempt / AttemptLayout.STOP).exists(),
    }


def wake_supervisor(attempt: AttemptLayout) -> None:
    """A supervisor that was suspended (SIGSTOP) would never see the stop file; it is on this host, or is left alone."""
    job = read_json(attempt / AttemptLayout.JOB)
    if job is None or job.get("host") != socket.gethostname():
        return
    known = JobFile.model_validate(job)
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(known.pid)
        if abs(process.create_time() - known.pid_created_at) < 1 and process.status() == psutil.STATUS_STOPPED:
            process.resume()


def launch(argv: list[str], folder: Path) -> str:
    """Starts the supervisor in a session of its own; returns its first word: ready, occupied, or none."""
    read_end, write_end = os.pipe()
    try:
        (folder / AttemptLayout.LOGS).mkdir(parents=True, exist_ok=True)
        with (folder / AttemptLayout.LOG).open("ab") as output:
            subprocess.run(
                [*argv, "--detach", "--ready-fd", str(write_end)],
                # A training needs nothing of the flow's server, whose logins and keys are among these.
                env={name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=[write_end],
                start_new_session=True,
                cwd=folder,
            )
    finally:
        os.close(write_end)
    try:
        readable, _, _ = select.select([read_end], [], [], START_TIMEOUT_SECONDS)
        return os.read(read_end, 64).decode().strip() if readable else ""
    finally:
        os.close(read_end)


def existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
