"""What of old runs may be deleted, and its deletion. Nothing is touched while a run is open or somebody works on it."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from blocks.attempts import Action, next_step_of
from blocks.driving import drivers, is_alive
from blocks.job import JobState
from blocks.record import RunRecord
from trainer.contract import AttemptLayout, RunLayout, utc_now
from trainer.locks import is_held
from trainer.storage import to_path


@dataclass(frozen=True)
class Removal:
    """Paths of one run that go, and what that frees. Links count as links: a dataset they point to stays."""

    record: RunRecord
    name: str
    state: str
    paths: tuple[Path, ...]
    files: int
    bytes: int


def why_in_use(record: RunRecord) -> str:
    """Why nothing of the run may be deleted now; empty where it may."""
    try:
        request = record.run().asked()
        step = next_step_of(record, max_attempts=request.max_attempts)
        working = any(is_alive(driver, utc_now()) for driver in drivers(record))
    except ValidationError:
        return "its record is damaged, so that nobody can tell whether it is over"
    if step.action is not Action.DONE:
        return "it is open"
    attempts = _attempts_folder(record)
    if any(is_held(folder / AttemptLayout.LOCK) for folder in _subfolders(attempts)):
        return "its training process is still there"
    return "a process still works on it" if working else ""


def state_of(record: RunRecord) -> JobState:
    """How a run that is over has ended."""
    attempts = record.attempts()
    outcome = record.outcome(attempts[-1]) if attempts else None
    return outcome.state if outcome else JobState.CANCELLED  # over without an attempt: cancelled before it was planned


def whole_run(record: RunRecord) -> Removal:
    return _removal(record, (to_path(record.uri),))


def leftovers(record: RunRecord, *, keep_best: bool = False) -> Removal:
    """The checkpoints and working folders of every attempt; with `keep_best` not the best epoch's checkpoint."""
    paths: list[Path] = []
    for attempt in _subfolders(_attempts_folder(record)):
        work, checkpoints = attempt / AttemptLayout.WORK, attempt / AttemptLayout.CHECKPOINTS
        paths += [work] if work.is_dir() else []
        best = _best_checkpoint(checkpoints) if keep_best else ""
        if best:
            paths += [file for file in checkpoints.iterdir() if file.stem != best]
        elif checkpoints.is_dir():
            paths.append(checkpoints)
    return _removal(record, tuple(sorted(paths)))


def find_leftovers(
    records: list[RunRecord], *, older_than: timedelta = timedelta(0), failed: bool = False, keep_best: bool = False, now: datetime
) -> list[Removal]:
    """What `prune` would delete: of runs that succeeded and, with `failed`, of others that are over too."""
    found: list[Removal] = []
    wanted = weights_of_open_runs(records)
    for record in records:
        if why_in_use(record) or (state_of(record) is not JobState.SUCCEEDED and not failed) or _ended_at(record) > now - older_than:
            continue
        removal = leftovers(record, keep_best=keep_best)
        if removal.paths and not any(file.is_relative_to(path) for file in wanted for path in removal.paths):
            found.append(removal)
    return found


def weights_of_open_runs(records: list[RunRecord]) -> list[Path]:
    """Files that trainings which are not over start from: a checkpoint of another run, maybe."""
    found: list[Path] = []
    for record in records:
        try:
            weights = record.run().asked().config.weights
        except ValidationError:
            continue
        if weights and "/" in weights and why_in_use(record):
            found.append(Path(weights))
    return found


def delete(removal: Removal) -> bool:
    """Deletes the paths. False, and nothing is touched, where the run is in use again by now."""
    if why_in_use(removal.record):
        return False
    for path in removal.paths:
        # Out of the way in one step: who reads meanwhile sees all of it or nothing.
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.removed")
        path.rename(aside)
        if aside.is_dir() and not aside.is_symlink():
            (aside / RunLayout.RUN).unlink(missing_ok=True)  # from here on it is no run
            shutil.rmtree(aside)
        else:
            aside.unlink()
    return True


def _removal(record: RunRecord, paths: tuple[Path, ...]) -> Removal:
    files = [file for path in paths for file in ([path] if not path.is_dir() else path.rglob("*")) if file.is_symlink() or file.is_file()]
    size = sum(file.lstat().st_size for file in files)
    return Removal(record, record.run().name, state_of(record).value, paths, len(files), size)


def _ended_at(record: RunRecord) -> datetime:
    attempts = record.attempts()
    outcome = record.outcome(attempts[-1]) if attempts else None
    return outcome.closed_at if outcome else record.run().created_at


def _best_checkpoint(folder: Path) -> str:
    """The name, without ending, of the best epoch's checkpoint as the newest one names it."""
    for file in sorted(folder.glob("epoch-*.json"), reverse=True):
        try:
            return f"epoch-{int(json.loads(file.read_bytes())['best_epoch']):04d}"
        except (OSError, ValueError, KeyError, TypeError):  # damaged: an older one tells
            continue
    return ""


def _attempts_folder(record: RunRecord) -> Path:
    return to_path(record.uri) / RunLayout.ATTEMPTS


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()) if folder.is_dir() else []
