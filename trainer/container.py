"""One attempt in a container: from what the platform tells to what it collects, around the same supervisor as on any machine.

The attempt's folder is a scratch one. What it gains goes to the run's record while the training runs: the job's ``output_uri``, or
else the folder whose files the platform keeps over a restart. The same attempt may be started again on another machine, also
while this one still trains: see `trainer.fencing`.

What is written where, by a user of any number, without a home, on a root file system that is read-only:

- ``TMPDIR`` (``/tmp``): one folder ``trainyard-*``, with the attempt, its checkpoints, a home and the caches of libraries; gone at
  the end, but where the result could not be sent. Room: three checkpoints, the model, and the dataset where no cache is named.
- ``/dev/shm``: batches on their way from loading processes, and the dataset where it fits into half of what is free.
- ``cache_dir``: fetched datasets, for all pods that mount it; files are writable for its group (``fsGroup``).
- the record, ``model_dir``, and the file where the platform looks for the reason of a failure.
"""

from __future__ import annotations

import logging
import os
import pwd
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TypeVar

from trainer.certificates import choose_certificates
from trainer.contract import (
    ENV_HOME,
    AttemptLayout,
    ExitCode,
    ExitRecord,
    RunLayout,
    TrainerError,
    TrainJob,
    parse_job,
    utc_now,
)
from trainer.delivery import LOG_SECONDS, Courier, LogFollower, Repeated, collect, restore
from trainer.environment import ENV_NODE, ENV_POD, Environment, Told, detect, refuse_several_machines
from trainer.fencing import Claim, Fenced, refuse_newer_attempt
from trainer.files import DISK_FULL, write_json
from trainer.mirror import Mirror, pull_checkpoints
from trainer.mounts import ENV_MOUNTS, Mounts
from trainer.storage import ObjectFolder, folders_told_plainly, to_uri, told_plainly
from trainer.supervisor import Limits, StopNote, Supervisor, describe_error, log_to_file
from trainer.watching import RecordWatch

LOOK_SECONDS = 5.0
TICK_SECONDS = 0.2
BRIEF_SECONDS = 2.0
GROUP_UMASK = 0o002
T = TypeVar("T")
log = logging.getLogger("trainer")


@dataclass(frozen=True)
class Container:
    """What is settled before anything is fetched. `record` is a URI that this machine reaches, perhaps by a mount."""

    environment: Environment
    job: TrainJob
    record: str
    model_dir: str
    layout: AttemptLayout

    @property
    def objects(self) -> ObjectFolder:
        return ObjectFolder(f"{self.record}/{RunLayout.ATTEMPTS}/{self.job.attempt}")


def run_in_container(told: Told, limits: Limits, root: Path = Path("/")) -> int:
    """The attempt's whole life. Returns its exit code."""
    stop = StopNote()
    stop.listen()
    started_at = utc_now()
    environment: Environment | None = None
    container: Container | None = None
    os.umask(GROUP_UMASK)  # volumes are shared by pods whose users have nothing in common but a group
    with ExitStack() as stack:
        try:
            environment = detect(os.environ, root, told)
            scratch = Path(tempfile.mkdtemp(prefix="trainyard-"))
            stack.callback(shutil.rmtree, scratch, ignore_errors=True)
            os.environ.update(choose_variables(os.environ, scratch, environment.mounts))
            container = settled = unless_stopped(partial(settle, environment, scratch), stop)
            claim = unless_stopped(partial(prepare, settled), stop)
            ended = train(settled, claim, limits, stop)
        except NotSent as exc:
            stack.pop_all()  # what is on the disk is all there is
            ended = give_up(container, exc, started_at)
        except (TrainerError, OSError) as exc:
            ended = give_up(container, explain(exc), started_at)
        if environment is not None:
            tell_platform(environment, ended)
        return ended.exit_code


class NotSent(TrainerError):
    """The training ended well, and its result is on this machine alone."""


def say(text: object) -> None:
    """Where there is no log yet: the output, which platforms keep."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def explain(exc: TrainerError | OSError) -> TrainerError:
    if isinstance(exc, TrainerError):
        return exc
    code = ExitCode.DISK_FULL if exc.errno in DISK_FULL else ExitCode.PERMISSION
    place = f" ({exc.filename})" if exc.filename else ""
    hint = "mount a folder that can be written and has room, and name it by TMPDIR"
    return TrainerError(f"cannot write on this machine: {exc.strerror or exc}{place}", hint=hint, code=code)


def unless_stopped(work: Callable[[], T], stop: StopNote) -> T:
    """The outcome of work that may wait for a store; it is left alone where a signal comes. Raises TrainerError (PREEMPTED) then."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:
            future.set_exception(exc)

    Thread(target=run, daemon=True).start()
    while not wait([future], TICK_SECONDS).done:
        if stop.signal is not None:
            break
    if stop.signal is not None:
        hint = "a new attempt of the run goes on from its last checkpoint"
        raise TrainerError("stopped before the training started", hint=hint, code=ExitCode.PREEMPTED)
    return future.result()


# --- Before the training -------------------------------------------------------------------------------


def settle(environment: Environment, scratch: Path) -> Container:
    """Raises TrainerError: CONFIG, NOT_FOUND, PERMISSION, UNAVAILABLE."""
    refuse_several_machines(environment)
    mounts = environment.mounts
    job = localize(read_config(mounts.localize(environment.config)), mounts)
    record = job.output_uri or (mounts.localize(environment.checkpoint_dir) if environment.checkpoint_dir else "")
    if not record:
        raise TrainerError(
            f"the job has no place for its checkpoints and its result ({environment.PLATFORM})",
            hint="give the job an output_uri, or --checkpoint-dir a folder that outlives the container",
            code=ExitCode.CONFIG,
        )
    layout = AttemptLayout(scratch / job.run_id / RunLayout.ATTEMPTS / str(job.attempt))
    model_dir = mounts.localize(environment.model_dir) if environment.model_dir else ""
    if environment.cache_dir:
        job = job.model_copy(update={"cache_dir": environment.cache_dir})
    return Container(environment, job, to_uri(record), to_uri(model_dir) if model_dir else "", layout)


def read_config(place: str) -> TrainJob:
    """The job at a path or a URI. Raises TrainerError (CONFIG, NOT_FOUND); PERMISSION, UNAVAILABLE of a store."""
    folder, _, name = to_uri(place).rpartition("/")
    with folders_told_plainly(), told_plainly(place):
        text = ObjectFolder(folder).get(name)
    if text is None:
        raise TrainerError(f"there is no job at {place}", hint="check path, mounts and bucket", code=ExitCode.NOT_FOUND)
    return parse_job(text, place)


def localize(job: TrainJob, mounts: Mounts) -> TrainJob:
    """The job with the folders of this machine for what is mounted, so that nothing of it needs a network."""
    data = job.dataset
    found = mounts.find(data.root) if "://" in data.root else None
    store = mounts.localize(data.store_uri) if data.store_uri else None
    dataset = data.model_copy(
        update={
            "root": data.root if found is None else str(found),
            "index_uri": mounts.localize(data.index_uri),
            "store_uri": store,
            "store_endpoint": data.store_endpoint if store == data.store_uri else None,
        }
    )
    output = mounts.localize(job.output_uri.rstrip("/")) if job.output_uri else None
    return job.model_copy(update={"dataset": dataset, "output_uri": output})


def choose_variables(environ: Mapping[str, str], scratch: Path, mounts: Mounts) -> dict[str, str]:
    """What libraries need where the user has no name and no home, and nothing but scratch can be written. Those set and of use stay."""
    folders = {
        "HOME": "home",
        ENV_HOME: "home/trainyard",
        "XDG_CACHE_HOME": "cache",
        "MPLCONFIGDIR": "cache/matplotlib",
        "TORCH_HOME": "cache/torch",
        "TORCHINDUCTOR_CACHE_DIR": "cache/inductor",
        "TRITON_CACHE_DIR": "cache/triton",
    }
    chosen: dict[str, str] = {}
    for name, folder in folders.items():
        if not (environ.get(name) and os.access(environ[name], os.W_OK | os.X_OK)):
            (scratch / folder).mkdir(parents=True, exist_ok=True)
            chosen[name] = str(scratch / folder)
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        chosen["USER"] = chosen["LOGNAME"] = environ.get("USER") or "trainyard"
    return {**chosen, **choose_certificates(environ), ENV_MOUNTS: mounts.to_json()}


def prepare(container: Container) -> Claim:
    """Takes the attempt, and makes its folder as a restart has to find it. Raises TrainerError (OCCUPIED) where a newer one was planned."""
    job, layout = container.job, container.layout
    attempts = ObjectFolder(f"{container.record}/{RunLayout.ATTEMPTS}")
    with folders_told_plainly(), told_plainly(container.record):
        refuse_newer_attempt(attempts, job.attempt)
        environ = container.environment.environ
        claim = Claim.take(container.objects.uri, pod=environ.get(ENV_POD, ""), node=environ.get(ENV_NODE, ""))
        write_json(layout / AttemptLayout.CONFIG, job)
        restore(container.objects, layout)
    pull_checkpoints(container.record, layout.folder.parent.parent)
    return claim


# --- The training and after it -------------------------------------------------------------------------


def train(container: Container, claim: Claim, limits: Limits, stop: StopNote) -> ExitRecord:
    """How the training ended. Raises TrainerError where its result is there, but cannot be sent or is kept back."""
    layout = container.layout
    log_file = layout / AttemptLayout.LOG
    follower = LogFollower(log_file)
    log_to_file(log_file)
    log.info("on %s; the record is at %s", container.environment.PLATFORM, container.record)
    log.info("this container is number %d of attempt %d", claim.owner.generation, container.job.attempt)
    watch = RecordWatch(container.record, layout, claim, stop)
    watch.look()
    courier = Courier(Mirror(layout.folder, container.objects.uri, claim), stop, limits.patience_seconds)
    courier.start()
    # A platform's time to stop in is for saving and for sending.
    within = replace(limits, grace_seconds=limits.grace_seconds / 2)
    supervisor = Supervisor(layout.folder, within, stop, look=lambda: look_briefly(watch))
    try:
        with Repeated(follower.follow, LOG_SECONDS), Repeated(watch.look, LOOK_SECONDS):
            supervisor.run(None)
            ended = ExitRecord.model_validate_json((layout / AttemptLayout.EXIT).read_bytes())
            send_last(container, courier, limits, stop, ended)
    except TrainerError as exc:
        claim.give_up(exc)
        raise
    finally:
        follower.follow()
    if ended.exit_code == ExitCode.OK and container.model_dir:
        collect(layout, container.model_dir)
    return ended


def look_briefly(watch: RecordWatch) -> None:
    """A store that is away must not use up the time to stop in."""
    thread = Thread(target=watch.look, daemon=True)
    thread.start()
    thread.join(BRIEF_SECONDS)


def send_last(container: Container, courier: Courier, limits: Limits, stop: StopNote, ended: ExitRecord) -> None:
    """Raises Fenced; NotSent where a result is there that could not be sent. How a training failed is told in any case."""

    def is_over() -> bool:
        return stop.fenced is not None or time.monotonic() > stop.asked_at + limits.grace_seconds

    try:
        courier.finish(is_over)
        return
    except Fenced:
        raise
    except TrainerError as exc:
        error = exc
    if stop.fenced is not None:
        raise stop.fenced
    if ended.exit_code != ExitCode.OK:
        say(f"the record lacks the last of this attempt: {error}")
        return
    code = ExitCode.PREEMPTED if stop.signal is not None else error.code
    hint = f"{error.hint}; a new container goes on from the last checkpoint in the record"
    raise NotSent(f"the result is not in the record: {error.message}; it is kept in {container.layout.folder}", hint=hint, code=code)


def give_up(container: Container | None, error: TrainerError, started_at: datetime) -> ExitRecord:
    """Tells the end in the output and, where that can be reached and is this container's, in the record."""
    record = describe_error(error, started_at)
    say(error)
    hurried = isinstance(error, NotSent) and error.code is ExitCode.PREEMPTED
    if container is not None and not hurried and error.code is not ExitCode.SUPERSEDED:
        try:
            container.objects.put(AttemptLayout.EXIT, record.model_dump_json(indent=1).encode())
        except (TrainerError, OSError) as exc:
            say(f"the record does not say so: {exc}")
    return record


def tell_platform(environment: Environment, ended: ExitRecord) -> None:
    """The failure's reason where the platform looks for it."""
    path = environment.failure_file
    if ended.exit_code == ExitCode.OK or path is None:
        return
    text = str(TrainerError(ended.message or f"exit code {ended.exit_code}", hint=ended.hint))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text[: environment.FAILURE_CHARACTERS])
    except OSError as exc:
        say(f"cannot write {path}: {exc.strerror}")
