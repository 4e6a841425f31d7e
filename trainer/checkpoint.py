"""Checkpoints of a run: written atomically, found and verified again by a later attempt.

``checkpoints/epoch-0003.pt`` holds the state after epoch 3 and ``epoch-0003.json`` says what it is.
The record is written before the file gets its name, so a file without a fitting record is damage,
never a crash at a bad moment. The newest two are kept, and the best epoch of each of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from trainer.contract import AttemptLayout, ExitCode, Progress, StoredRecord, TrainConfig, TrainerError, TrainJob
from trainer.files import write_atomic, write_json

KEEP = 2
# Where and how fast it runs, and what it may load; the training is the same.
FREE_FIELDS = frozenset({"device", "workers", "trust_weights"})


class CheckpointRecord(StoredRecord):
    """``epoch-0003.json``. Epochs are 1-based: `epoch` is the number of finished epochs."""

    sha256: str
    bytes: int
    epoch: int
    epochs: int
    run_id: str
    attempt: int
    config_hash: str
    config: dict[str, Any] = Field(description="The fields under config_hash, to say what differs.")
    dataset_version: str
    best_epoch: int
    best_sha256: str
    finished: bool = Field(False, description="The training ended with this epoch: the last one, or stopped early.")
    progress: Progress | None = Field(None, description="The epoch's line of progress.jsonl.")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    path: Path
    record: CheckpointRecord


Loader = Callable[[Path], dict[str, Any]]


def config_fields(config: TrainConfig) -> dict[str, Any]:
    """The fields that make the training what it is, as JSON values."""
    return config.model_dump(mode="json", exclude=set(FREE_FIELDS))


def hash_config(config: TrainConfig) -> str:
    return hashlib.sha256(json.dumps(config_fields(config), sort_keys=True).encode()).hexdigest()


def checkpoint_path(folder: Path, epoch: int) -> Path:
    return folder / f"epoch-{epoch:04d}.pt"


def record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_checkpoint(
    folder: Path,
    data: bytes,
    job: TrainJob,
    *,
    epoch: int,
    best: CheckpointRecord | None,
    finished: bool = False,
    progress: Progress | None = None,
) -> Checkpoint:
    """Writes the state after `epoch` and removes what is no longer needed.

    `best` is the record of the best epoch before this one; None where this epoch is the best.
    Raises TrainerError (DISK_FULL) by way of OSError; older checkpoints are then still whole.
    """
    digest = hashlib.sha256(data).hexdigest()
    record = CheckpointRecord(
        sha256=digest,
        bytes=len(data),
        epoch=epoch,
        epochs=job.config.epochs,
        run_id=job.run_id,
        attempt=job.attempt,
        config_hash=hash_config(job.config),
        config=config_fields(job.config),
        dataset_version=job.dataset.version,
        best_epoch=best.epoch if best else epoch,
        best_sha256=best.sha256 if best else digest,
        finished=finished,
        progress=progress,
    )
    saved = _write(checkpoint_path(folder, epoch), data, record)
    prune(folder)
    return saved


def _write(path: Path, data: bytes, record: CheckpointRecord) -> Checkpoint:
    path.unlink(missing_ok=True)  # of a timeline that was given up; its record would not fit any more
    write_json(record_path(path), record)
    try:
        write_atomic(path, data)
    except OSError:
        record_path(path).unlink(missing_ok=True)
        raise
    return Checkpoint(path=path, record=record)


def prune(folder: Path) -> None:
    """Keeps the newest checkpoints and the best epochs they name."""
    newest = sorted(folder.glob("epoch-*.pt"), reverse=True)[:KEEP]
    records = [read_record(path) for path in newest]
    kept = {path.stem for path in newest} | {checkpoint_path(folder, r.best_epoch).stem for r in records if r}
    for path in [*folder.glob("epoch-*.pt"), *folder.glob("epoch-*.json")]:
        if path.stem not in kept:
            path.unlink(missing_ok=True)


def read_record(path: Path) -> CheckpointRecord | None:
    """The record beside the checkpoint `path`, or None where it is missing or not one."""
    try:
        return CheckpointRecord.model_validate_json(record_path(path).read_bytes())
    except (OSError, ValidationError):
        return None


def find_damage(checkpoint: Checkpoint, load: Loader) -> str:
    """Why the checkpoint cannot be used, or an empty string. Loads it, so its hash is compared first."""
    record = checkpoint.record
    try:
        size = checkpoint.path.stat().st_size
        if size != record.bytes:
            return f"it has {size} bytes of {record.bytes}"
        if hash_file(checkpoint.path) != record.sha256:
            return "its contents changed since it was written"
        state = load(checkpoint.path)
    except Exception as exc:  # whatever the unpickler of a damaged file raises
        return f"it cannot be read ({type(exc).__name__}: {exc})"
    # The framework counts from 0: `epoch` is the index of the last finished epoch.
    if state.get("epoch") != record.epoch - 1:
        return f"it holds epoch {state.get('epoch', -1) + 1}, not {record.epoch}"
    if not state.get("optimizer"):
        return "it has no optimizer state"
    return "" if state.get("ema") is not None else "it has no model"


def find_conflict(record: CheckpointRecord, job: TrainJob) -> str:
    """Why the checkpoint belongs to another training than `job`, or an empty string."""
    if record.run_id != job.run_id:
        return f"it belongs to run {record.run_id}"
    if record.dataset_version != job.dataset.version:
        return f"it was trained on dataset version {record.dataset_version[:12]}, this attempt has {job.dataset.version[:12]}"
    if record.config_hash == hash_config(job.config):
        return ""
    # The hash differs too where another version of Trainyard knew other fields: what it did not write had its default.
    now, default = config_fields(job.config), config_fields(TrainConfig())
    before = {**default, **{key: value for key, value in record.config.items() if key not in FREE_FIELDS}}
    changed = [
        f"{key} was {before[key]!r}, is {repr(now[key]) if key in now else 'unknown'}" for key in before if before[key] != now.get(key)
    ]
    return f"the configuration changed: {'; '.join(changed)}" if changed else ""


def list_checkpoints(layout: AttemptLayout) -> list[Path]:
    """Checkpoint files of this attempt and earlier ones, the latest epoch first, of equal epochs the newest attempt's."""
    found: list[tuple[int, int, Path]] = []
    for attempt in (layout, *layout.earlier()):
        for path in (attempt / AttemptLayout.CHECKPOINTS).glob("epoch-*.pt"):
            number = path.stem.removeprefix("epoch-")
            if number.isdigit():
                found.append((int(number), attempt.number, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def find_checkpoint(layout: AttemptLayout, job: TrainJob, load: Loader) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint of the run, and what was wrong with newer ones.

    None where there is none at all. Raises TrainerError (CONFIG) where checkpoints exist but belong
    to another training, or none of them is valid: starting from scratch would hide the loss.
    """
    problems: list[str] = []
    for path in list_checkpoints(layout):
        name = f"attempt {path.parent.parent.name}, {path.name}"
        record = read_record(path)
        if record is None:
            problems.append(f"{name}: its record is missing or unreadable")
            continue
        if conflict := find_conflict(record, job):
            raise TrainerError(
                f"cannot resume from {name}: {conflict}",
                hint="start a new run for the changed request, or give the original one to go on with this run",
                code=ExitCode.CONFIG,
            )
        checkpoint = Checkpoint(path=path, record=record)
        if damage := find_damage(checkpoint, load):
            problems.append(f"{name}: {damage}")
            continue
        return checkpoint, problems
    if problems:
        raise TrainerError(
            f"the run has checkpoints, but none can be resumed: {'; '.join(problems)}",
            hint="start a new run, or delete the damaged checkpoints to start this one from scratch",
            code=ExitCode.CONFIG,
        )
    return None, []


def find_best(layout: AttemptLayout, newest: Checkpoint) -> Checkpoint | None:
    """The checkpoint of the best epoch that `newest` names, verified by its hash; None where it is lost."""
    record = newest.record
    if record.best_sha256 == record.sha256:
        return newest
    for attempt in (layout, *layout.earlier()):
        path = checkpoint_path(attempt / AttemptLayout.CHECKPOINTS, record.best_epoch)
        best = read_record(path)
        if best and best.sha256 == record.best_sha256 and path.is_file() and hash_file(path) == best.sha256:
            return Checkpoint(path=path, record=best)
    return None


def adopt_checkpoint(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """A copy in this attempt's `folder`, verified while it is copied; the checkpoint itself where it is there already."""
    if checkpoint.path.parent == folder:
        return checkpoint
    data = checkpoint.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != checkpoint.record.sha256:
        raise TrainerError(f"{checkpoint.path} changed while it was read", hint="try again", code=ExitCode.DATA)
    return _write(folder / checkpoint.path.name, data, checkpoint.record)
