"""What is to be fetched, sorted by object: on disk, as a million files do not fit into the memory that a training leaves."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from trainer.errors import ExitCode, TrainerError
from trainer.file_tree import NameRules
from trainer.packs import STAGE_AGAIN, InPlace, StagedFile, object_key

PART_BYTES = 4 * 2**20
GAP_BYTES = 2**20  # a request costs about as much as this many bytes
PART_FILES = 8192
CACHE_KIB = 16 * 1024


class Wanted(NamedTuple):
    """A file, and where its content lies: ``size`` bytes of the object ``key`` from ``offset`` on."""

    key: str
    offset: int
    sha256: bytes
    path: str
    size: int

    def compare(self, digest: bytes) -> None:
        """Raises TrainerError (DATA) where its content has another digest than it should have."""
        if digest != self.sha256:
            raise self.wrong()

    def wrong(self) -> TrainerError:
        return TrainerError(
            f"{self.path} in {self.key} is damaged: its sha256 is not {self.sha256.hex()[:12]}...",
            hint=STAGE_AGAIN,
            code=ExitCode.DATA,
        )


class Part(NamedTuple):
    """A range of one object and the files in it. Longer than PART_BYTES only where it is one file and its copies."""

    key: str
    start: int
    end: int
    files: list[Wanted]

    @property
    def is_large(self) -> bool:
        return self.end - self.start > PART_BYTES

    def cut(self, content: memoryview, file: Wanted) -> memoryview:
        """What of the range's content is the file's."""
        return content[file.offset - self.start :][: file.size]


def wanted(file: StagedFile) -> Wanted:
    return Wanted(object_key(file), file.offset, file.sha256, file.path, file.size)


class FetchIndex:
    """A table beside the folder that is filled; nobody but one fetch sees it, so it needs no journal."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)  # of a fetch that was killed
        self._db = sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{CACHE_KIB}"):
            self._db.execute(f"PRAGMA {setting}")
        self._db.execute(
            "CREATE TABLE files (key TEXT, offset INTEGER, sha256 BLOB, path TEXT, size INTEGER,"
            " PRIMARY KEY (key, offset, sha256, path)) WITHOUT ROWID"
        )
        self._db.execute("CREATE TABLE in_place (path TEXT PRIMARY KEY, sha256 BLOB, size INTEGER, source TEXT, key TEXT) WITHOUT ROWID")

    def close(self) -> None:
        self._db.close()
        self.path.unlink(missing_ok=True)

    def fill(self, files: Iterable[StagedFile]) -> None:
        def staged() -> Iterator[Wanted]:
            for file in files:
                if file.in_place is None:
                    yield wanted(file)
                else:
                    self._db.execute("INSERT INTO in_place VALUES (?, ?, ?, ?, ?)", (file.path, file.sha256, file.size, *file.in_place))

        with self._transaction():
            self._db.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?)", staged())

    def refuse_collisions(self, rules: NameRules) -> None:
        """Raises TrainerError (CONFIG) for two files or folders whose names are one name by these rules."""
        self._db.execute("CREATE TABLE names (name TEXT PRIMARY KEY, path TEXT) WITHOUT ROWID")
        with self._transaction():
            last: list[str] = []
            for (path,) in self._db.execute("SELECT path FROM files UNION ALL SELECT path FROM in_place"):
                parts = path.split("/")
                known = 0
                while known < min(len(parts), len(last)) and parts[known] == last[known]:
                    known += 1
                for end in range(known + 1, len(parts) + 1):
                    self._take_name("/".join(parts[:end]), rules)
                last = parts

    def _take_name(self, path: str, rules: NameRules) -> None:
        name = rules.key(path)
        if self._db.execute("INSERT INTO names VALUES (?, ?) ON CONFLICT DO NOTHING", (name, path)).rowcount:
            return
        [other] = self._db.execute("SELECT path FROM names WHERE name = ?", (name,)).fetchone()
        if other != path:
            raise TrainerError(
                f"the file system of {self.path.parent} takes {other[:200]!r} and {path[:200]!r} for one name",
                hint="fetch to a file system that tells them apart, or rename one of them and stage the dataset again",
                code=ExitCode.CONFIG,
            )

    def sort_paths(self) -> None:
        """By path also, for `has`."""
        self._db.execute("CREATE INDEX IF NOT EXISTS paths ON files (path)")

    def has(self, path: str) -> bool:
        query = "SELECT 1 FROM files WHERE path = ? UNION ALL SELECT 1 FROM in_place WHERE path = ?"
        return self._db.execute(query, (path, path)).fetchone() is not None

    def paths(self) -> Iterator[tuple[str, int]]:
        """All by path, with their sizes; in place or not."""
        return iter(self._db.execute("SELECT path, size FROM files UNION ALL SELECT path, size FROM in_place ORDER BY path"))

    def files(self) -> Iterator[Wanted]:
        """All, by object and offset."""
        rows = self._db.execute("SELECT key, offset, sha256, path, size FROM files ORDER BY key, offset, sha256, path")
        return map(Wanted._make, rows)

    def files_in_place(self) -> Iterator[StagedFile]:
        """Those that are no objects of the store."""
        rows = self._db.execute("SELECT path, sha256, size, source, key FROM in_place ORDER BY path")
        return (StagedFile(path, sha256, size, "", 0, InPlace(source, key)) for path, sha256, size, source, key in rows)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            self._db.execute("BEGIN")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as exc:
            full = exc.sqlite_errorname == "SQLITE_FULL"
            raise TrainerError(
                f"{self.path}: {exc}",
                hint="free some space, or choose another folder",
                code=ExitCode.DISK_FULL if full else ExitCode.OCCUPIED,
            ) from exc


class Needs:
    """The disk for files that are to come: whole blocks, one also for each folder that is not there, and the bytes of all paths,
    of which the index makes copies when it sorts them. ``entries`` are files and folders, as file systems count them."""

    def __init__(self, block: int, has_folder: Callable[[str], bool]) -> None:
        self.bytes = self.entries = 0
        self._block, self._has_folder = block, has_folder
        self._last = ""

    def add(self, path: str, size: int, there: int | None) -> None:
        """In the order of their paths. ``there`` are the bytes that it has already; None where there is no such file."""
        self.bytes += -(-max(0, size - (there or 0)) // self._block) * self._block + len(path.encode())
        self.entries += there is None
        parent = path.rpartition("/")[0]
        if parent != self._last:
            self._add_folders(parent.split("/") if parent else [], self._last.split("/"))
            self._last = parent

    def _add_folders(self, parts: list[str], last: list[str]) -> None:
        known = 0
        while known < min(len(parts), len(last)) and parts[known] == last[known]:
            known += 1
        new = sum(not self._has_folder("/".join(parts[:end])) for end in range(known + 1, len(parts) + 1))
        self.bytes += new * self._block
        self.entries += new


def cut_parts(files: Iterable[Wanted]) -> Iterator[Part]:
    """Ranges to read, from files sorted by object and offset. No file lies in two; what nobody wants is left out where that pays."""
    part: Part | None = None
    for file in files:
        end = file.offset + file.size
        if part is not None and _belongs(part, file, end):
            part.files.append(file)
            part = part._replace(end=max(part.end, end))
            continue
        if part is not None:
            yield part
        part = Part(file.key, file.offset, end, [file])
    if part is not None:
        yield part


def _belongs(part: Part, file: Wanted, end: int) -> bool:
    if file.key != part.key or len(part.files) >= PART_FILES:
        return False
    if part.is_large or file.size > PART_BYTES:
        first = part.files[0]
        return (file.offset, file.sha256, file.size) == (first.offset, first.sha256, first.size)
    return max(end, part.end) - part.start <= PART_BYTES and file.offset - part.end < GAP_BYTES
