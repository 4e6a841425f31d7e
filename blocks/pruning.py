"""What of old runs may be deleted, and its deletion. Nothing is touched while a run is open or somebody works on it."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from blocks.attempts import Action, next_step_of
from blocks.driving import drivers, is_alive
from blocks.job import JobState
from blocks.record import RunRecord
from trainer.contract import AttemptLayout, RunLayout, utc_now
from trainer.locks import is_held
from trainer.storage import is_bucket, to_path, to_uri


@dataclass(frozen=True)
class Removal:
    """Paths of one run that go, or the names of its objects in a bucket, and what that frees.

    Links count as links: a dataset they point to stays.
    """

    record: RunRecord
    name: str
    state: str
    files: int
    bytes: int
    paths: tuple[Path, ...] = ()
    objects: tuple[str, ...] = ()

    @property
    def uris(self) -> list[str]:
        return [path.as_uri() for path in self.paths] + [f"{self.record.uri}/{name}" for name in self.objects]


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
    if not is_bucket(record.uri) and any(is_held(folder / AttemptLayout.LOCK) for folder in _subfolders(_attempts_folder(record))):
        return "its training process is still there"
    return "a process still works on it" if working else ""


def state_of(record: RunRecord) -> JobState:
    """How a run that is over has ended."""
    attempts = record.attempts()
    outcome = record.outcome(attempts[-1]) if attempts else None
    return outcome.state if outcome else JobState.CANCELLED  # over without an attempt: cancelled before it was planned


def whole_run(record: RunRecord) -> Removal:
    return _removal_of_objects(record, record.folder.sizes()) if is_bucket(record.uri) else _removal(record, (to_path(record.uri),))


def leftovers(record: RunRecord, *, keep_best: bool = False) -> Removal:
    """The checkpoints and working folders of every attempt; with `keep_best` not the best epoch's checkpoint."""
    if is_bucket(record.uri):
        return _leftovers_in_bucket(record, keep_best=keep_best)
    paths: list[Path] = []
    for attempt in _subfolders(_attempts_folder(record)):
        work, checkpoints = attempt / AttemptLayout.WORK, attempt / AttemptLayout.CHECKPOINTS
        paths += [work] if work.is_dir() else []
        best = _best_checkpoint(record, f"{RunLayout.ATTEMPTS}/{attempt.name}/{AttemptLayout.CHECKPOINTS}") if keep_best else ""
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
        if removal.files and not any(f"{uri}/".startswith(f"{gone}/") for uri in wanted for gone in removal.uris):
            found.append(removal)
    return found


def weights_of_open_runs(records: list[RunRecord]) -> list[str]:
    """URIs of what trainings which are not over start from: a checkpoint of another run, maybe."""
    found: list[str] = []
    for record in records:
        try:
            weights = record.run().asked().config.weights
        except ValidationError:
            continue
        if weights and "/" in weights and why_in_use(record):
            found.append(to_uri(weights))
    return found


def delete(removal: Removal) -> bool:
    """Deletes the paths. False, and nothing is touched, where the run is in use again by now."""
    if why_in_use(removal.record):
        return False
    if removal.objects:
        # What vouches for others goes before them: run.json, after which it is no run, and a checkpoint's record.
        removal.record.folder.delete_all([name for name in removal.objects if name.endswith(".json")])
        removal.record.folder.delete_all([name for name in removal.objects if not name.endswith(".json")])
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
    return Removal(record, record.run().name, state_of(record).value, len(files), size, paths)


def _removal_of_objects(record: RunRecord, sizes: dict[str, int]) -> Removal:
    return Removal(record, record.run().name, state_of(record).value, len(sizes), sum(sizes.values()), objects=tuple(sorted(sizes)))


def _leftovers_in_bucket(record: RunRecord, *, keep_best: bool) -> Removal:
    """A container's working folder goes with it: only checkpoints are left."""
    found: dict[str, int] = {}
    best: dict[PurePosixPath, str] = {}
    for name, size in record.folder.sizes().items():
        path = PurePosixPath(name)
        if not path.match(f"{RunLayout.ATTEMPTS}/*/{AttemptLayout.CHECKPOINTS}/epoch-*"):
            continue
        if keep_best and path.parent not in best:
            best[path.parent] = _best_checkpoint(record, str(path.parent))
        if path.stem != best.get(path.parent):
            found[name] = size
    return _removal_of_objects(record, found)


def _ended_at(record: RunRecord) -> datetime:
    attempts = record.attempts()
    outcome = record.outcome(attempts[-1]) if attempts else None
    return outcome.closed_at if outcome else record.run().created_at


def _best_checkpoint(record: RunRecord, folder: str) -> str:
    """The name, without ending, of the best epoch's checkpoint as the newest one names it."""
    for name in sorted(record.folder.names(folder), reverse=True):
        if not PurePosixPath(name).match("epoch-*.json"):
            continue
        try:
            return f"epoch-{int(json.loads(record.folder.get(f'{folder}/{name}') or b'')['best_epoch']):04d}"
        except (OSError, ValueError, KeyError, TypeError):  # damaged: an older one tells
            continue
    return ""


def _attempts_folder(record: RunRecord) -> Path:
    return to_path(record.uri) / RunLayout.ATTEMPTS


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()) if folder.is_dir() else []
