"""The fit: reads ``config.json`` of an attempt's folder, verifies the data, trains, writes the result.

``python -m trainer.task --attempt-dir DIR``. The supervisor starts it and reads what it leaves: the exit
code, ``failure.json`` and ``phases.json``.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from trainer.checkpoint import Checkpoint, find_best, find_checkpoint, list_checkpoints
from trainer.contract import (
    EXIT_REASONS,
    AttemptLayout,
    ExitCode,
    FailureReason,
    Phase,
    ResultManifest,
    TrainerError,
    TrainJob,
    parse_job,
)
from trainer.dataset_source import open_data
from trainer.fencing import refuse_newer_attempt
from trainer.files import DISK_FULL, write_json
from trainer.frameworks import FitContext, FrameworkTrainer, get_trainer
from trainer.progress import ProgressWriter
from trainer.result import build_manifest, choose_samples, write_evaluation, write_metrics, write_samples
from trainer.stopping import Stopper, StopRequested
from trainer.storage import ObjectFolder

PHASES = "phases.json"
log = logging.getLogger("trainer")


class PhaseClock:
    """Adds up where the time went and keeps ``phases.json`` current, so that a killed fit leaves it too."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 3)
            write_json(self._path, dict(self.seconds))


# --- Reading -----------------------------------------------------------------------------------------


def read_job(layout: AttemptLayout) -> TrainJob:
    path = layout / AttemptLayout.CONFIG
    try:
        text = path.read_bytes()
    except FileNotFoundError as exc:
        raise TrainerError(f"{path} does not exist", hint="give the folder of an attempt", code=ExitCode.CONFIG) from exc
    return parse_job(text, path.name)


def attempts_of(layout: AttemptLayout) -> ObjectFolder:
    return ObjectFolder(layout.folder.parent.as_uri())


def write_manifest(layout: AttemptLayout, manifest: ResultManifest) -> None:
    """The last write of a fit. Taken back where a newer attempt was planned meanwhile, which may not have seen it."""
    write_json(layout / AttemptLayout.MANIFEST, manifest)
    try:
        refuse_newer_attempt(attempts_of(layout), layout.number)
    except TrainerError:
        (layout / AttemptLayout.MANIFEST).unlink()
        raise


# --- The fit -----------------------------------------------------------------------------------------


def fit(layout: AttemptLayout, stopper: Stopper | None = None) -> ResultManifest:
    """Trains the attempt's job, going on from the run's newest checkpoint, and writes the result.

    Also for use inside another process. Raises TrainerError for expected failures and StopRequested when stopped.
    """
    layout = AttemptLayout(layout.folder.absolute())
    stopper = stopper or Stopper()
    clock = PhaseClock(layout / PHASES)
    job = read_job(layout)
    for name in (AttemptLayout.FAILURE, AttemptLayout.MANIFEST):
        (layout / name).unlink(missing_ok=True)
    progress = ProgressWriter(layout, attempt=job.attempt, epochs=job.config.epochs)
    progress.update(message="reading the dataset's index")
    shutil.rmtree(layout / AttemptLayout.WORK, ignore_errors=True)  # of a fit of this attempt that was killed

    def tell(message: str) -> None:
        stopper.check()
        progress.update(at_most_every_second=True, message=message)

    try:
        with ExitStack() as stack:
            with clock.phase("fetching"):
                data = stack.enter_context(open_data(job, layout, tell))
            context = FitContext(job=job, index=data.index, data_root=data.root, layout=layout, progress=progress, stopper=stopper)
            return _fit(context, clock)
    finally:
        shutil.rmtree(layout / AttemptLayout.WORK, ignore_errors=True)


def _fit(context: FitContext, clock: PhaseClock) -> ResultManifest:
    config = context.config
    trainer = get_trainer(config.framework, config.task)(context)
    with clock.phase("importing"):
        context.progress.update(message=f"loading {config.framework.value}")
        trainer.import_framework()
    with clock.phase("preparing"):
        context.progress.update(message="checking the data and the configuration")
        context.refuse_changed_data()
        trainer.prepare()
        start = find_start(context, trainer)
    if start is None or not start.record.finished:
        with clock.phase("training"):
            train(context, trainer, start)
    last, _ = find_checkpoint(context.layout, context.job, trainer.load_checkpoint)
    if last is None or not last.record.finished:
        raise TrainerError("the training ended without a checkpoint of its last epoch", code=ExitCode.UNEXPECTED)
    best = find_best(context.layout, last) or last
    if best.record.epoch != last.record.best_epoch:
        log.warning("the checkpoint of the best epoch %d is lost; the last epoch is kept instead", last.record.best_epoch)
    with clock.phase("evaluating"):
        manifest = evaluate(context, trainer, best, last)
    with clock.phase("finishing"):
        context.progress.update(phase=Phase.FINISHING, message="checking data and attempt, writing the manifest")
        context.stopper.check()
        context.refuse_changed_data()
        refuse_newer_attempt(attempts_of(context.layout), context.layout.number)
        with context.stopper.deferred():
            write_manifest(context.layout, manifest)
            context.progress.update(message="done", eta_seconds=0.0)
            context.stopper.reason = ""  # a signal that came this late has nothing left to stop
    log.info("done: %s", {name: round(value, 4) for name, value in manifest.metrics.items()})
    return manifest


def find_start(context: FitContext, trainer: FrameworkTrainer) -> Checkpoint | None:
    """The checkpoint to go on from, None to start at the beginning. Says in log and progress what it decided."""
    checkpoint, problems = find_checkpoint(context.layout, context.job, trainer.load_checkpoint)
    for problem in problems:
        log.warning("checkpoint left out: %s", problem)
    if checkpoint is None:
        context.progress.rewind(None, 0)
        context.progress.update(epoch=0)
        return None
    record = checkpoint.record
    what = "finishing the run from" if record.finished else "resuming after"
    message = f"{what} epoch {record.epoch} of {record.epochs} (attempt {record.attempt})"
    if problems:
        message += f"; a damaged checkpoint was left out: {'; '.join(problems)}"
    log.info(message)
    with context.stopper.deferred():
        context.progress.rewind(record.progress, record.epoch)
    known = record.progress.metrics if record.progress else {}
    context.progress.update(epoch=record.epoch, metrics=known, message=message)
    return checkpoint


def train(context: FitContext, trainer: FrameworkTrainer, start: Checkpoint | None) -> None:
    message = context.progress.latest.message if start else ""
    context.progress.update(phase=Phase.TRAINING, step=0, message=message)
    try:
        trainer.train(start)
    except TrainerError:
        raise
    except Exception:
        context.refuse_changed_data()  # a file that vanished explains the failure better
        raise


def evaluate(context: FitContext, trainer: FrameworkTrainer, best: Checkpoint, last: Checkpoint) -> ResultManifest:
    """Writes model, metrics, evaluation and samples; returns the manifest of them, which is not written yet."""
    layout, index = context.layout, context.index
    split = "test" if index.count("test") else "val"
    context.progress.update(phase=Phase.EVALUATING, step=0, message=f"evaluating epoch {best.record.epoch} on the {split} split")
    for name in ("model", AttemptLayout.SAMPLES):
        shutil.rmtree(layout / name, ignore_errors=True)
    model = layout / AttemptLayout.MODEL
    trainer.export(best.path, model)
    evaluation = trainer.evaluate(model, split)  # what is handed over, in 16 bits, not what it was made from
    val = best.record.progress.metrics if best.record.progress else {}
    epochs = {"best_epoch": best.record.epoch, "epochs": last.record.epoch}
    write_metrics(layout, evaluation, val, **epochs)
    write_evaluation(layout, evaluation)
    context.stopper.check()
    chosen = choose_samples(index, split)
    boxes = trainer.predict(model, [context.data_root / image.path for image in chosen])
    write_samples(layout, list(zip(chosen, boxes, strict=True)), root=context.data_root, classes=index.classes)
    return build_manifest(layout, context.job, evaluation, versions=trainer.versions(), **epochs)


# --- Ending ------------------------------------------------------------------------------------------

_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "insufficient shared memory", "cannot allocate memory")
_MEMORY_HINT = "use a smaller batch_size or image_size, fewer workers, or a machine with more memory"


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether the host or the GPU ran out of memory. By type, by errno, then by torch's words where it has no type."""
    if isinstance(exc, MemoryError) or type(exc).__name__ == "OutOfMemoryError":
        return True
    if isinstance(exc, OSError) and exc.errno == errno.ENOMEM:
        return True
    return isinstance(exc, RuntimeError) and any(phrase in str(exc).lower() for phrase in _MEMORY_PHRASES)


def find_full_disk(exc: BaseException) -> OSError | None:
    """The error of a full disk or quota, also where a library wrapped it into one of its own."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if isinstance(current, OSError) and current.errno in DISK_FULL:
            return current
        if any(os.strerror(number) in str(current) for number in DISK_FULL):
            return OSError(errno.ENOSPC, " ".join(str(current).split()))
        current = current.__cause__ or current.__context__
    return None


def explain(exc: BaseException) -> TrainerError:
    """Any failure as a TrainerError: what is wrong, what to do, and its class."""
    if isinstance(exc, TrainerError):
        return exc
    if is_out_of_memory(exc):
        first = next(iter(str(exc).splitlines()), "") or type(exc).__name__
        return TrainerError(f"out of memory: {first}", hint=_MEMORY_HINT, code=ExitCode.OUT_OF_MEMORY)
    if full := find_full_disk(exc):
        place = f" at {full.filename}" if full.filename else ""
        hint = "free some space, or choose another output folder; the last saved checkpoint is kept"
        return TrainerError(f"the disk is full{place} ({full.strerror})", hint=hint, code=ExitCode.DISK_FULL)
    if isinstance(exc, PermissionError):
        hint = "mend the permissions, or choose another folder"
        return TrainerError(f"no permission: {exc.filename or exc}", hint=hint, code=ExitCode.PERMISSION)
    text = " ".join(str(exc).split())
    return TrainerError(f"{type(exc).__name__}: {text}", hint="the log has the traceback", code=ExitCode.USER_CODE)


def explain_stop(layout: AttemptLayout, reason: str) -> TrainerError:
    paths = list_checkpoints(layout)
    saved = f"checkpoint of epoch {int(paths[0].stem.removeprefix('epoch-'))} saved" if paths else "no epoch was finished yet"
    return TrainerError(f"{reason}; {saved}", hint="a new attempt of the run goes on from there", code=ExitCode.PREEMPTED)


def write_failure(layout: AttemptLayout, error: TrainerError) -> None:
    reason = EXIT_REASONS.get(error.code, FailureReason.UNKNOWN)
    document = {"code": int(error.code), "reason": reason.value, "message": error.message, "hint": error.hint}
    try:
        write_json(layout / AttemptLayout.FAILURE, document)
    except OSError as exc:  # the exit code still tells
        log.error("cannot write %s: %s", AttemptLayout.FAILURE, exc)


def run(layout: AttemptLayout, stopper: Stopper) -> int:
    """`fit` with every ending turned into a log line, ``failure.json`` and an exit code."""
    try:
        fit(layout, stopper)
        return ExitCode.OK
    except (StopRequested, KeyboardInterrupt) as exc:
        error = explain_stop(layout, str(exc) or "interrupted")
        log.info(error.message)
    except BaseException as exc:
        error = explain(exc)
        log.error(error.message, exc_info=None if isinstance(exc, TrainerError) else exc)
    write_failure(layout, error)
    return error.code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.task", description="Train one attempt.")
    parser.add_argument("--attempt-dir", type=Path, required=True, help="folder that holds config.json")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S", stream=sys.stdout)
    stopper = Stopper()
    stopper.install()
    return run(AttemptLayout(options.attempt_dir.absolute()), stopper)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads and exit handlers of libraries must not keep a stopped fit from ending.
    os._exit(status)
