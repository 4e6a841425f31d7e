"""Brings a staged dataset version to a folder: ranges in parallel, every file's sha256 compared, taken up again after a cut.

Files are written into ``<folder>.partial-<version>`` and renamed once all are there, so the folder is whole or absent.
What a fetch that was cut left there is compared again and kept where it is right; a large file goes on from its last byte. So is what
one of another version left, unless files lie in place: what came of those is not compared.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from trainer.errors import ExitCode, TrainerError
from trainer.fetch_index import FetchIndex, Needs, Part, Wanted, cut_parts
from trainer.file_tree import FileTree, open_root, probe_names, remove_others, write_all
from trainer.in_place import fetch_in_place
from trainer.locks import holding
from trainer.packs import (
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    STAGE_AGAIN,
    ManifestHeader,
    StagedFile,
    check_version,
    count_names,
    manifest_key,
    merge_manifests,
    open_manifest,
)
from trainer.partial_folders import choose_partial, remove_partials
from trainer.ranges import RangeReader
from trainer.silence import SilenceWatch
from trainer.storage import PATIENCE, folders_told_plainly, open_store, told_plainly
from trainer.verified_folder import read_state, remember, why_not_whole

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MAX_MANIFESTS = 16  # of one version; a stage writes nine at most before one says all again
READ_BYTES = 2**20
HEADER_BYTES = 256 * 1024
INDEX_BYTES = 256  # of a file in the index of a fetch, about
LOOK_FILES = 1000
MIB = 2**20

Progress = Callable[[int, int], None]
MakeRoom = Callable[[ManifestHeader, int], None]


@dataclass(frozen=True)
class Fetched:
    """``fetched_bytes`` are those of files that were not there; of a large file that a cut left, the rest."""

    version: str
    files: int
    bytes: int
    fetched_files: int
    fetched_bytes: int


def read_header(store_uri: str, version: str) -> ManifestHeader:
    """What a version is in all. Reads no more of its manifest than the beginning. Raises as `read_version` does."""
    import obstore

    with told_plainly(store_uri):
        try:
            beginning = obstore.open_reader(open_store(store_uri), manifest_key(version), buffer_size=HEADER_BYTES)
        except FileNotFoundError as exc:
            raise _not_there(version) from exc
        return open_manifest(cast("IO[bytes]", beginning), version)[0]


def read_version(store: ObjectStore, version: str) -> tuple[ManifestHeader, Iterator[StagedFile]]:
    """Header and files of a version, in the order of their paths; they are checked while they are read.

    Raises TrainerError: NOT_FOUND for a version that is not there, DATA for a damaged manifest.
    """
    import obstore

    parts: list[Iterator[StagedFile | str]] = []
    read = names = 0
    newest: ManifestHeader | None = None
    wanted: str | None = version
    while wanted:
        try:
            found = obstore.get(store, manifest_key(wanted))
        except FileNotFoundError as exc:
            raise _not_there(wanted) from exc
        read += found.meta["size"]
        if read > MAX_MANIFEST_BYTES:
            raise _too_much(version, f"have more than {MAX_MANIFEST_BYTES // MIB} MiB")
        header, lines = open_manifest(bytes(found.bytes()), wanted)
        names += count_names(header)
        if names > MAX_HEADER_BYTES:
            raise _too_much(version, f"name more packs and places than {MAX_HEADER_BYTES // MIB} MiB hold")
        newest = newest or header
        parts.append(lines)
        wanted = header.base
        if wanted and len(parts) == MAX_MANIFESTS:
            raise _too_much(version, "name each other without end")
    assert newest is not None
    return newest, check_version(newest, merge_manifests(parts))


def _too_much(version: str, what: str) -> TrainerError:
    return TrainerError(f"the manifests of version {version[:12]} {what}", hint=STAGE_AGAIN, code=ExitCode.DATA)


def _not_there(version: str) -> TrainerError:
    return TrainerError(
        f"the store has no dataset version {version[:12]}",
        hint="`trainyard dataset list --store STORE` shows what it has; "
        "`trainyard dataset stage PATH --name NAME --store STORE --again` writes anew what is lost",
        code=ExitCode.NOT_FOUND,
    )


def fetch_version(
    store_uri: str,
    version: str,
    to: Path,
    on_progress: Progress | None = None,
    *,
    on_wait: Callable[[str], None] | None = None,
    on_silence: Callable[[str], None] | None = None,
    repair: MakeRoom | None = None,
    verified: Path | None = None,
) -> Fetched:
    """Makes `to` the files of a version. Nothing is fetched where it is there already.

    `on_progress` gets bytes done and bytes in all; `on_wait` is told who fetches to there already; `on_silence` hears, from
    another thread, that the store does not answer. With `repair`, a folder that lacks files is filled where it is, else it is
    refused; before a file is written it gets the header, which the manifest's lines bear out by then, and the bytes that the disk
    lacks, and may free some. `verified` is where it is remembered what was verified: `to` is read
    again where it is not as it was then.
    Raises TrainerError: NOT_FOUND, DATA (damaged or hostile), DISK_FULL, OCCUPIED (`to` holds something else, or cannot be
    replaced), CONFIG (a file system that takes two names for one), PERMISSION and UNAVAILABLE from the store.
    """
    if os.path.lexists(to) and not to.is_dir():
        raise TrainerError(f"{to} is a file, or a link to none", hint="give a new or empty folder", code=ExitCode.OCCUPIED)
    to = Path(os.path.realpath(to))
    if not to.name:
        raise TrainerError(f"{to} is no folder to fetch to", hint="give a new or empty folder", code=ExitCode.OCCUPIED)
    with told_plainly(store_uri), folders_told_plainly():
        store = open_store(store_uri)
        with holding(to.with_name(f"{to.name}.lock"), on_wait):
            header, files = read_version(store, version)
            if to.exists() and any(to.iterdir()):
                # What is to be repaired is read by the repair, in parallel.
                on_bytes = None if repair else Count(header.bytes, on_progress).add
                why = why_not_whole(to, version, lambda: read_version(store, version)[1], verified, on_bytes)
                if not why:
                    return Fetched(version, header.files, header.bytes, 0, 0)
                if not repair:
                    raise TrainerError(f"{to} holds other files: {why}", hint="give a new or empty folder", code=ExitCode.OCCUPIED)
                folder = to
            else:
                _refuse_irreplaceable(to, version)
                folder = choose_partial(to, version, lambda: read_version(store, version)[1])
            with SilenceWatch(on_silence, PATIENCE.total_seconds()) as silence:
                fetch = _Fetch(store_uri, header, folder, on_progress, silence, repair=folder == to)
                got, state = fetch.run(files, to.with_name(f"{to.name}.index"), repair, with_state=verified is not None)
            if folder != to:
                folder.rename(to)  # an empty one makes way
                remove_partials(to)
            if verified is not None:
                remember(verified, state)
            return got


def _refuse_irreplaceable(to: Path, version: str) -> None:
    """An empty folder that the fetched one cannot come in place of: told now, as it would be after all has come."""
    hint = f"give a folder in it, such as {to}/{version[:12]}"
    try:
        if os.path.samestat(os.stat("."), to.stat()):  # noqa: PTH116 - also of one that is gone
            raise TrainerError(f"{to} is the current folder, which cannot be replaced", hint=hint, code=ExitCode.OCCUPIED)
        aside = to.with_name(f"{to.name}.aside")
        to.rename(aside)
        aside.rename(to)
    except FileNotFoundError:
        return
    except OSError as exc:
        if exc.errno != errno.EBUSY:
            raise
        raise TrainerError(f"something is mounted at {to}, so it cannot be replaced", hint=hint, code=ExitCode.OCCUPIED) from exc


def _free_bytes(found: os.statvfs_result) -> int:
    return found.f_bavail * found.f_frsize


class Count:
    """What is done, of all threads."""

    def __init__(self, total: int, on_progress: Progress | None) -> None:
        self.done = self.fetched_files = self.fetched_bytes = 0
        self._total, self._on_progress = total, on_progress
        self._lock = threading.Lock()

    def add(self, done: int, *, files: int = 0, fetched: int = 0) -> None:
        with self._lock:
            self.done += done
            self.fetched_files += files
            self.fetched_bytes += fetched
            if self._on_progress:
                self._on_progress(self.done, self._total)


class _Fetch:
    """One fetch into one folder. With `resumed`, there are files that may be right, half, or something else.

    With `repair` it was whole once, and what has become of it nobody knows.
    """

    def __init__(
        self,
        store_uri: str,
        header: ManifestHeader,
        folder: Path,
        on_progress: Progress | None,
        silence: SilenceWatch,
        *,
        repair: bool = False,
    ) -> None:
        self.store_uri, self.header, self.folder, self.repair = store_uri, header, folder, repair
        self.resumed = os.path.lexists(folder)
        self.silence = silence
        self.reader = RangeReader(open_store(store_uri, "fetch"), silence)
        self.count = Count(header.bytes, on_progress)

    def run(self, files: Iterator[StagedFile], index_path: Path, make_room: MakeRoom | None, *, with_state: bool) -> tuple[Fetched, str]:
        """What was fetched and, if it is wanted, the state of the folder then."""
        header = self.header
        with open_root(self.folder) as root:
            self._refuse_full(root, header.files * INDEX_BYTES, 0)
            with contextlib.closing(FetchIndex(index_path)) as index:
                self._plan(files, index, root, make_room)
                rules = probe_names(root)
                if any(rules):
                    index.refuse_collisions(rules)
                self.reader.in_parallel(cut_parts(index.files()), lambda part: self._fetch_part(root, part))
                self._fetch_in_place(root, index)
                if self.resumed:
                    index.sort_paths()
                    remove_others(root, index.has)
                with FileTree(root, self.folder, make=False) as tree:
                    state = read_state(tree, header.version, index.paths()) if with_state else ""
        return Fetched(header.version, header.files, header.bytes, self.count.fetched_files, self.count.fetched_bytes), state

    def _plan(self, files: Iterator[StagedFile], index: FetchIndex, root: int, make_room: MakeRoom | None) -> None:
        """Fills the index. Refuses what does not fit as soon as that shows, since the index takes of the same disk.

        Where room can be made, that shows at the end only: until then the index leaves as much as it takes.
        """

        def has_folder(path: str) -> bool:
            if not self.resumed:
                return False
            try:
                return stat.S_ISDIR(os.stat(path, dir_fd=root, follow_symlinks=False).st_mode)
            except OSError:  # what is in the way is told when it is made
                return False

        needs = Needs(os.fstatvfs(root).f_frsize, has_folder)

        def planned() -> Iterator[StagedFile]:
            with FileTree(root, self.folder, make=False) as tree:
                for number, file in enumerate(files):
                    needs.add(file.path, file.size, tree.size(file.path) if self.resumed else None)
                    if number % LOOK_FILES == 0:
                        self._refuse_full(root, *((index.path.stat().st_size, 0) if make_room else (needs.bytes, needs.entries)))
                    yield file

        index.fill(planned())
        if make_room:
            make_room(self.header, max(0, needs.bytes - _free_bytes(os.fstatvfs(root))))
        self._refuse_full(root, needs.bytes, needs.entries)

    def _refuse_full(self, root: int, needed: int, files: int) -> None:
        found = os.fstatvfs(root)
        free = _free_bytes(found)
        hint = "free some space, or choose another folder"
        if needed > free:
            message = f"the disk is full at {self.folder}: {needed / MIB:.0f} MiB needed, {free / MIB:.0f} MiB are free"
            raise TrainerError(message, hint=hint, code=ExitCode.DISK_FULL)
        if found.f_files and files > found.f_favail:  # some file systems count no files
            message = f"the disk is full at {self.folder}: it takes {found.f_favail} more files and folders, and {files} are needed"
            raise TrainerError(message, hint=hint, code=ExitCode.DISK_FULL)

    def _fetch_part(self, root: int, part: Part) -> None:
        with FileTree(root, self.folder) as tree:
            missing = [file for file in part.files if not self._is_there(tree, file)] if self.resumed else part.files
            if part.is_large and missing:
                there = next((file for file in part.files if file not in missing), None) if self.resumed else None
                self._fetch_large(tree, part, missing, there)
            elif missing:
                for smaller in cut_parts(missing):
                    self._fetch_small(tree, smaller)

    def _fetch_in_place(self, root: int, index: FetchIndex) -> None:
        def missing() -> Iterator[StagedFile]:
            with FileTree(root, self.folder) as tree:
                for file in index.files_in_place():
                    # A fetch that was cut is of this version, which knows one state of the object, and what failed half way is shorter.
                    if self.resumed and not self.repair and tree.size(file.path) == file.size:
                        self.count.add(file.size)
                    else:
                        yield file

        def write(file: StagedFile, pieces: Iterator[bytes]) -> None:
            with FileTree(root, self.folder) as tree:
                if self.resumed:
                    tree.remove(file.path)
                with tree.opened(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, file.size) as descriptor:
                    for piece in pieces:
                        write_all(descriptor, memoryview(piece))

        fetch_in_place(missing(), self.store_uri, write, lambda size: self.count.add(size, files=1, fetched=size), self.silence)

    def _is_there(self, tree: FileTree, file: Wanted) -> bool:
        if not tree.holds(file.path, file.size, file.sha256):
            return False
        self.count.add(file.size)
        return True

    def _fetch_small(self, tree: FileTree, part: Part) -> None:
        started = time.monotonic()
        content = self.reader.read(part.key, part.start, part.end)
        read = time.monotonic()
        total = 0
        for file in part.files:
            cut = part.cut(content, file)
            file.compare(hashlib.sha256(cut).digest())
            if self.resumed:
                tree.remove(file.path)
            tree.write(file.path, cut)
            total += file.size
        self.reader.streams.adapt(read - started, time.monotonic() - read)
        self.count.add(total, files=len(part.files), fetched=total)

    def _fetch_large(self, tree: FileTree, part: Part, missing: list[Wanted], there: Wanted | None) -> None:
        """One file from the store, its copies from it; all of them copies where an earlier fetch brought one."""
        source, *copies = missing if there is None else [there, *missing]
        if there is None and not (self.resumed and self._append(tree, part, source, self._kept(tree, source))):
            if self.resumed:
                tree.remove(source.path)
            if not self._append(tree, part, source, 0):
                raise source.wrong()
        self.count.add(0, files=len(missing))
        for copy in copies:
            if self.resumed:
                tree.remove(copy.path)
            tree.copy(source.path, copy.path, copy.size)
            self.count.add(copy.size, fetched=copy.size)

    def _kept(self, tree: FileTree, file: Wanted) -> int:
        """Bytes to go on from. What cannot be the beginning of the file is removed."""
        size = tree.size(file.path)
        if not size or size >= file.size:  # an empty one is no beginning
            tree.remove(file.path)
            return 0
        return size

    def _append(self, tree: FileTree, part: Part, file: Wanted, kept: int) -> bool:
        """Writes the file from byte `kept` on. Whether it is right then; it is removed where it is not."""
        total = hashlib.sha256()
        with tree.opened(file.path, os.O_RDWR | os.O_CREAT | (0 if kept else os.O_EXCL), file.size) as descriptor:
            while content := os.read(descriptor, READ_BYTES):
                total.update(content)
            self.count.add(kept)
            for piece in self.reader.read_ahead(part.key, part.start + kept, part.end):
                total.update(piece)
                write_all(descriptor, piece)
                self.count.add(len(piece), fetched=len(piece))
        if total.digest() == file.sha256:
            return True
        tree.remove(file.path)
        self.count.add(-file.size, fetched=kept - file.size)
        return False
