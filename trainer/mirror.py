"""Keeps an attempt's objects in step with its folder on this machine, for a trainer whose disk goes away with it.

What a reader could take for more than it is comes in an order that forbids it: a checkpoint before the record that names it,
every file of the result before the manifest, and ``exit.json``, as on the disk, when all else is there. Before such a file is
replaced, what vouches for it is removed. So a mirror may be killed at any point: the next one, of whichever process, goes on.
"""

from __future__ import annotations

import logging
import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from trainer.checkpoint import CheckpointRecord, checkpoint_path, record_path
from trainer.contract import AttemptLayout, ExitCode, ManifestFile, ResultManifest, RunLayout, TrainerError
from trainer.fencing import Claim, refuse_newer_attempt
from trainer.files import write_atomic
from trainer.storage import ObjectFolder, folders_told_plainly, list_paths, open_store, to_uri, told_plainly
from trainer.transfer import checked_name, in_parallel, open_for_files, pull_files, push_file

LONG_LOG_BYTES = 2**20
LONG_LOG_SHARE = 64  # stores cannot append: a longer log is sent anew when it has grown by this part of itself
CHECKPOINT = re.compile(r"(?:(\d+)/)?checkpoints/epoch-(\d+)\.(?:pt|json)")

log = logging.getLogger("trainer")


class Stat(NamedTuple):
    size: int
    mtime_ns: int
    inode: int


def stat_of(path: Path) -> Stat | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return Stat(found.st_size, found.st_mtime_ns, found.st_ino)


class Mirror:
    """One attempt's. Where nothing has changed, `sync` costs a stat of each file and no request."""

    def __init__(self, folder: Path, uri: str, claim: Claim | None = None) -> None:
        """With a `claim`, nothing is written once another container has the attempt."""
        self.layout = AttemptLayout(folder)
        self.objects = ObjectFolder(uri)
        self._claim = claim
        self._sent: dict[str, tuple[Stat | None, ...]] = {}  # the files as they were when they last arrived
        self._whole: set[str] = set()  # the checkpoints that arrived
        self._there: set[str] | None = None  # names of objects
        self._folder: Stat | None = None

    def has_news(self) -> bool:
        """Whether checkpoints came or went since it was last asked: a machine that is lost next loses no more than an epoch."""
        before, self._folder = self._folder, stat_of(self.layout / AttemptLayout.CHECKPOINTS)
        return self._folder != before

    def forget(self) -> None:
        """What it knows of the store, where another container's last write may have come later: the next `sync` looks at all of it."""
        self._sent.clear()
        self._there = None

    def sync(self) -> None:
        """Sends what is new or changed. To be repeated at will, and once more when the attempt has ended.

        Raises TrainerError: DATA (a file of the result is not what the manifest says), OCCUPIED (a newer attempt exists,
        so this one's result is kept back), SUPERSEDED (another container has the attempt), PERMISSION, UNAVAILABLE. The next
        call goes on from there.
        """
        with folders_told_plainly(), told_plainly(self.objects.uri):
            if self._there is None:
                self._store = open_for_files(self.objects.uri, "mirror")
                self._there = set(list_paths(self._store, ""))
            self._send_checkpoints(self._there)
            for name in (AttemptLayout.PROGRESS_LINES, AttemptLayout.PROGRESS, *self._logs()):
                self._send_living(name)
            self._send_result(self._there)
            self._send_living(AttemptLayout.EXIT)

    def _send_living(self, name: str) -> None:
        """A file that is replaced or grows: as it is now."""
        path = self.layout / name
        now, before = stat_of(path), self._sent.get(name, (None,))[0]
        if now is None or now == before:
            return
        ended = (self.layout / AttemptLayout.EXIT).exists()
        if before and not ended and LONG_LOG_BYTES < before.size <= now.size < before.size + before.size // LONG_LOG_SHARE:
            return
        self._put(name, path.read_bytes())
        self._sent[name] = (now,)

    def _logs(self) -> list[str]:
        files = sorted((self.layout / AttemptLayout.LOGS).rglob("*"))
        return [path.relative_to(self.layout.folder).as_posix() for path in files if path.is_file()]

    # --- Checkpoints ---

    def _send_checkpoints(self, there: set[str]) -> None:
        folder = self.layout / AttemptLayout.CHECKPOINTS
        # In the order of their epochs: the best one, which a record names, is there before it.
        for path in sorted(folder.glob("epoch-*.pt")):
            self._send_checkpoint(path, there)
        kept = {_name(path) for path in folder.glob("epoch-*.pt")}
        newest = max((_epoch(name) for name in kept & self._whole), default=0)
        # Those of before this process too, but never the last ones there are.
        for name in sorted(there):
            if CHECKPOINT.fullmatch(name) and _epoch(name) < newest and f"{name.rpartition('.')[0]}.pt" not in kept:
                self._delete(name, there)  # the record, which sorts first, before the file

    def _send_checkpoint(self, path: Path, there: set[str]) -> None:
        data, record = _name(path), _name(record_path(path))
        now = (stat_of(path), stat_of(record_path(path)))
        if None in now or self._sent.get(data) == now:
            return
        try:
            text = record_path(path).read_bytes()
            said = CheckpointRecord.model_validate_json(text)
            file = ManifestFile(sha256=said.sha256, bytes=said.bytes)
            push_file(self._store, data, path, file, before_write=partial(self._delete, record, there), while_written=self._refuse_lost)
            self._put(record, text)
            there |= {data, record}
            self._whole.add(data)
        except (OSError, TrainerError, ValidationError) as exc:
            if (stat_of(path), stat_of(record_path(path))) != now:
                return  # removed or replaced meanwhile: the next call sees what came of it
            if isinstance(exc, OSError) or (isinstance(exc, TrainerError) and exc.code is not ExitCode.DATA):
                raise
            log.warning("checkpoint not sent: %s", exc)  # nor looked at again until it changes
            self._whole.discard(data)
        self._sent[data] = now

    def _delete(self, name: str, there: set[str]) -> None:
        self._refuse_superseded()
        if name in there:
            self.objects.delete(name)
            there.discard(name)

    def _put(self, name: str, data: bytes) -> None:
        self._refuse_superseded()
        self.objects.put(name, data)

    def _refuse_lost(self) -> None:
        """Called in the middle of an upload, where obstore takes no other request."""
        if self._claim is not None:
            self._claim.refuse_lost()

    def _refuse_superseded(self, *, afresh: bool = False) -> None:
        if self._claim is not None:
            self._claim.check(afresh=afresh)

    # --- The result ---

    def _send_result(self, there: set[str]) -> None:
        path = self.layout / AttemptLayout.MANIFEST
        now = stat_of(path)
        if now is None:
            if self._sent.pop(AttemptLayout.MANIFEST, None):  # the trainer took it back
                self._delete(AttemptLayout.MANIFEST, there)
            return
        if self._sent.get(AttemptLayout.MANIFEST) == (now,):
            return
        text = path.read_bytes()
        files = ResultManifest.model_validate_json(text).files
        revoke = partial(self._delete, AttemptLayout.MANIFEST, there)
        in_parallel(
            lambda name: push_file(
                self._store, name, self.layout / name, files[name], before_write=revoke, while_written=self._refuse_lost
            ),
            {checked_name(name): file.bytes for name, file in files.items()},
        )
        self._refuse_newer_attempt()
        self._refuse_superseded(afresh=True)
        self.objects.put(AttemptLayout.MANIFEST, text)
        there.add(AttemptLayout.MANIFEST)
        self._refuse_superseded(afresh=True)  # by one that puts its own manifest there
        try:
            self._refuse_newer_attempt()  # planned meanwhile, it may not have seen the manifest
        except TrainerError:
            self._delete(AttemptLayout.MANIFEST, there)
            raise
        self._sent[AttemptLayout.MANIFEST] = (now,)

    def _refuse_newer_attempt(self) -> None:
        parent, _, number = self.objects.uri.rpartition("/")
        refuse_newer_attempt(ObjectFolder(parent), int(number))


def pull_checkpoints(run_uri: str, folder: Path) -> Path | None:
    """Brings the run's newest whole checkpoint, and the best one that it names, to where `find_checkpoint` looks in the run's `folder`.

    None where there is none. Raises TrainerError: CONFIG where none of those there is whole, PERMISSION, UNAVAILABLE.
    """
    attempts = ObjectFolder(to_uri(run_uri)).child(RunLayout.ATTEMPTS)
    with told_plainly(attempts.uri):
        listed = [name for name in list_paths(open_store(attempts.uri), "") if name.endswith(".json")]
    found = {(int(match[2]), int(match[1])): name for name in listed if (match := CHECKPOINT.fullmatch(name)) and match[1]}
    problems: list[str] = []
    for key in sorted(found, reverse=True):
        try:
            record = _pull_checkpoint(attempts, found[key], folder)
        except TrainerError as exc:
            if exc.code not in (ExitCode.DATA, ExitCode.NOT_FOUND):
                raise
            problems.append(exc.message)
            continue
        for problem in problems:
            log.warning("checkpoint left out: %s", problem)
        _pull_best(attempts, found, record, folder)
        return checkpoint_path(folder / RunLayout.ATTEMPTS / str(key[1]) / AttemptLayout.CHECKPOINTS, record.epoch)
    if problems:
        raise TrainerError(
            f"the run has checkpoints, but none is whole: {'; '.join(problems)}",
            hint="start a new run, or delete the damaged checkpoints to start this one from scratch",
            code=ExitCode.CONFIG,
        )
    return None


def _read_record(attempts: ObjectFolder, name: str) -> tuple[bytes, CheckpointRecord]:
    text = attempts.get(name) or b""
    try:
        return text, CheckpointRecord.model_validate_json(text)
    except ValidationError as exc:
        raise TrainerError(f"{name} is no checkpoint's record", code=ExitCode.DATA) from exc


def _pull_checkpoint(attempts: ObjectFolder, name: str, folder: Path) -> CheckpointRecord:
    text, record = _read_record(attempts, name)
    local = folder / RunLayout.ATTEMPTS
    data = name.removesuffix(".json") + ".pt"
    pull_files(attempts.uri, local, {data: ManifestFile(sha256=record.sha256, bytes=record.bytes)})
    with folders_told_plainly():
        write_atomic(local / name, text)
    return record


def _pull_best(attempts: ObjectFolder, found: dict[tuple[int, int], str], record: CheckpointRecord, folder: Path) -> None:
    """Of another epoch, perhaps of another attempt. Where it is lost, the trainer says what it does without."""
    for key in sorted(found, reverse=True):
        if key[0] == record.best_epoch < record.epoch:
            try:
                if _read_record(attempts, found[key])[1].sha256 == record.best_sha256:
                    _pull_checkpoint(attempts, found[key], folder)
                    return
            except TrainerError as exc:
                if exc.code not in (ExitCode.DATA, ExitCode.NOT_FOUND):
                    raise


def _name(path: Path) -> str:
    return f"{AttemptLayout.CHECKPOINTS}/{path.name}"


def _epoch(name: str) -> int:
    match = CHECKPOINT.fullmatch(name)
    return int(match[2]) if match else 0
