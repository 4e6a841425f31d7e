"""What is known of a folder and its store, in one SQLite file per pair, so that unchanged files are neither read nor sent.

A row is believed while size, mtime, ctime and inode are the same; a file that was written less than two seconds
before it was read is read again the next time, as one more write in the same tick of the clock would not show.
Losing the cache costs reading the files again, never sending them again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from itertools import islice, starmap
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from blocks.counting import Counts
from blocks.errors import ServiceUnavailable
from blocks.places import home
from blocks.scanning import Stat
from trainer.locks import holding
from trainer.packs import StagedFile, file_key, pack_key

SCHEMA_VERSION = 1
T = TypeVar("T")

RACY_NS = 2_000_000_000
LOCK_SECONDS = 3600.0
ROWS_AT_ONCE = 512
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (path TEXT PRIMARY KEY, size INT, mtime_ns INT, ctime_ns INT, inode INT, sha256 BLOB, staged BLOB)
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS placed (sha256 BLOB PRIMARY KEY, pack TEXT, offset INT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS gone (path TEXT PRIMARY KEY) WITHOUT ROWID;
"""


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:24]


def _is_damage(exc: BaseException | None) -> bool:
    """Not that a disk is full, or the file may not be written. What is no text has no code of SQLite's."""
    if not isinstance(exc, sqlite3.DatabaseError):
        return False
    code = getattr(exc, "sqlite_errorcode", None)
    return isinstance(exc, sqlite3.OperationalError) if code is None else code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class StatCache:
    """``seen``: files as last read, with the digest that the last committed version has; ``placed``: where contents lie in the store."""

    def __init__(
        self, root: Path, store_uri: str, name: str, on_wait: Callable[[str], None] | None = None, tell: Callable[[str], None] | None = None
    ) -> None:
        """Waits for whoever stages this folder, or anything as this dataset, to that store from this machine: what he sends need not be
        sent again. `on_wait` is told so; `tell`, of a cache that is damaged. Raises ServiceUnavailable where he has not ended after an
        hour.
        """
        real, folder = os.path.realpath(root), home() / "staging"
        self._path = folder / f"{_digest(str(SCHEMA_VERSION), real, store_uri, name)}.sqlite"
        self._tell = tell
        with ExitStack() as locks:
            try:
                # In this order everywhere, so that no two wait for each other.
                for what in (("name", store_uri, name), ("folder", store_uri, real)):
                    locks.enter_context(holding(folder / f"{_digest(*what)}.lock", on_wait, LOCK_SECONDS))
            except TimeoutError as exc:
                message = f"{exc} has been staging this folder or dataset for an hour"
                raise ServiceUnavailable(message, hint="stop it, or wait for it") from exc
            self._open_or_mend()
            self._locks = locks.pop_all()

    def _open_or_mend(self) -> None:
        try:
            self._open()
        except sqlite3.DatabaseError as exc:
            if not _is_damage(exc):
                raise
            self._put_aside()
            self._open()

    def _open(self) -> None:
        self.writer = sqlite3.connect(self._path, isolation_level=None)
        self.writer.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; PRAGMA cache_size=-16384; {SCHEMA}")
        self.reader = sqlite3.connect(self._path, isolation_level=None)

    def _put_aside(self) -> None:
        """It is only a cache; and somebody may want to know what damaged it."""
        aside = self._path.with_name(f"{self._path.name}.damaged")
        for suffix in ("", "-wal", "-shm"):
            aside.with_name(aside.name + suffix).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                self._path.with_name(self._path.name + suffix).rename(aside.with_name(aside.name + suffix))
        if self._tell:
            self._tell(
                f"what this machine knew of the folder, {self._path}, is damaged, and put aside as {aside.name}: the files are read again, "
                "and what the store has is not sent again"
            )

    def close(self) -> None:
        self.reader.close()
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        """Puts the cache aside after an error that says that it is damaged, as only a use of it may tell."""
        with self._locks:
            self.close()
            if _is_damage(exc):
                self._put_aside()

    def get(self, key: str) -> str:
        row = self.writer.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return row[0] if row else ""

    def set(self, key: str, value: str) -> None:
        self.writer.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def changes(self, files: Iterable[tuple[str, Stat]], counts: Counts, *, distrust: bool) -> Generator[tuple[str, Stat | None]]:
        """Files that are new, changed, gone (no stat) or, with `distrust`, known and in no known pack. The others are counted as reused.

        Both sides are sorted, so a row of each is all that is held. To be closed, as it goes on seeing the cache as it was.
        """
        where = "LEFT JOIN placed USING (sha256)" if distrust else ""
        column = "placed.sha256 IS NOT NULL" if distrust else "1"
        query = f"SELECT path, size, mtime_ns, ctime_ns, inode, {column} FROM seen {where} ORDER BY path"  # noqa: S608 - constants
        rows = iter(self.reader.execute(query))
        row = next(rows, None)
        for path, found in files:
            while row is not None and row[0] < path:
                yield row[0], None
                row = next(rows, None)
            if row is None or row[0] != path:
                yield path, found
                continue
            if row[1:5] != found or not row[5]:
                yield path, found
            else:
                counts.reuse(1, found.size)
            row = next(rows, None)
        while row is not None:
            yield row[0], None
            row = next(rows, None)

    def add_seen(self, rows: Iterable[tuple[str, Stat, bytes, int]]) -> None:
        """Files with their digests, and when their reading began (ns)."""
        self._insert(
            "INSERT INTO seen VALUES (?, ?, ?, ?, ?, ?, NULL)",
            " ON CONFLICT (path) DO UPDATE SET (size, mtime_ns, ctime_ns, inode, sha256) ="
            " (excluded.size, excluded.mtime_ns, excluded.ctime_ns, excluded.inode, excluded.sha256)",
            [
                (path, found.size, found.mtime_ns if found.mtime_ns < began_ns - RACY_NS else -1, *found[2:], digest)
                for path, found, digest, began_ns in rows
            ],
        )

    def _insert(self, first: str, rest: str, rows: Sequence[tuple[Any, ...]]) -> None:
        """Many rows a statement: each statement lets go of the interpreter, which the reading threads wait for."""
        before, _, marks = first.partition(" VALUES ")
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            statement = f"{before} VALUES {', '.join([marks] * len(some))}{rest}"
            self.writer.execute(statement, [value for row in some for value in row])

    def remove(self, path: str) -> None:
        self.writer.execute("INSERT OR IGNORE INTO gone SELECT path FROM seen WHERE path = ? AND staged IS NOT NULL", (path,))
        self.writer.execute("DELETE FROM seen WHERE path = ?", (path,))

    def find_placed_among(self, digests: list[bytes]) -> set[bytes]:
        marks = ", ".join("?" * len(digests))
        return {row[0] for row in self.writer.execute(f"SELECT sha256 FROM placed WHERE sha256 IN ({marks})", digests)}  # noqa: S608

    def add_placed(self, rows: Iterable[tuple[bytes, str, int]]) -> None:
        remaining = iter(rows)
        while some := list(islice(remaining, ROWS_AT_ONCE)):
            self._insert("INSERT OR REPLACE INTO placed VALUES (?, ?, ?)", "", some)

    def forget_stats(self) -> None:
        """All files are read again."""
        self.writer.execute("UPDATE seen SET mtime_ns = -1")

    def forget_placed(self) -> None:
        self.writer.execute("DELETE FROM placed")

    def forget_objects(self, names: set[str]) -> None:
        """Forgets what lies in these packs, or as these large objects."""
        where = "CASE pack WHEN '' THEN lower(hex(sha256)) ELSE pack END IN (SELECT value FROM json_each(?))"
        self.writer.execute(f"DELETE FROM placed WHERE {where}", (json.dumps(sorted(names)),))  # noqa: S608 - constant

    def keep_placed_of_seen(self) -> None:
        """Forgets where contents lie that no file has."""
        self.writer.execute("DELETE FROM placed WHERE sha256 NOT IN (SELECT sha256 FROM seen)")

    def keep_placed(self, objects: set[str]) -> None:
        """Forgets what lies in packs, or as large objects, that the store does not have."""
        packs = {row[0] for row in self.writer.execute("SELECT DISTINCT pack FROM placed WHERE pack != ''")}
        self.writer.executemany("DELETE FROM placed WHERE pack = ?", ((pack,) for pack in packs - objects))
        large = (row[0] for row in self.writer.execute("SELECT sha256 FROM placed WHERE pack = ''").fetchall())
        self.writer.executemany("DELETE FROM placed WHERE sha256 = ?", ((digest,) for digest in large if digest.hex() not in objects))

    def files(self) -> Iterator[tuple[str, bytes, int]]:
        return iter(self.reader.execute("SELECT path, sha256, size FROM seen ORDER BY path"))

    def count_difference(self) -> int:
        changed = self.writer.execute("SELECT count(*) FROM seen WHERE staged IS NOT sha256").fetchone()[0]
        return changed + self.writer.execute("SELECT count(*) FROM gone").fetchone()[0]

    def objects(self, *, difference: bool) -> set[str]:
        """Keys of the packs and large files that a manifest's lines name."""
        where = "WHERE staged IS NOT seen.sha256" if difference else ""
        query = f"SELECT DISTINCT pack, iif(pack = '', sha256, NULL) FROM seen JOIN placed USING (sha256) {where}"  # noqa: S608 - constants
        return {pack_key(pack) if pack else file_key(digest) for pack, digest in self.reader.execute(query)}

    def packs(self, *, difference: bool) -> list[str]:
        where = "AND staged IS NOT seen.sha256" if difference else ""
        query = f"SELECT DISTINCT pack FROM seen JOIN placed USING (sha256) WHERE pack != '' {where} ORDER BY pack"  # noqa: S608
        return [row[0] for row in self.reader.execute(query)]

    def staged_files(self) -> Iterator[StagedFile]:
        query = "SELECT path, sha256, size, pack, offset FROM seen JOIN placed USING (sha256) ORDER BY path"
        return starmap(StagedFile, self.reader.execute(query))

    def lines(self, *, difference: bool) -> Iterator[StagedFile | str]:
        """A manifest's lines: all files, or what differs from the version committed last."""
        if not difference:
            yield from self.staged_files()
            return
        query = (
            "SELECT path, sha256, size, pack, offset FROM seen JOIN placed USING (sha256) WHERE staged IS NOT seen.sha256"
            " UNION ALL SELECT path, NULL, 0, '', 0 FROM gone WHERE path NOT IN (SELECT path FROM seen) ORDER BY path"
        )
        for row in self.reader.execute(query):
            yield row[0] if row[1] is None else StagedFile(*row)

    def commit(self, version: str) -> None:
        """The store's newest version is what was seen."""
        self.writer.execute("BEGIN")
        self.writer.execute("UPDATE seen SET staged = sha256 WHERE staged IS NOT sha256")
        self.writer.execute("DELETE FROM gone")
        self.set("version", version)
        self.set("dirty", "")
        self.writer.execute("COMMIT")


def with_cache(
    use: Callable[[StatCache], T], root: Path, store_uri: str, name: str, on_wait: Callable[[str], None], tell: Callable[[str], None] | None
) -> T:
    """What `use` makes of the cache; of a new one, where it turns out to be damaged."""
    try:
        with StatCache(root, store_uri, name, on_wait, tell) as cache:
            return use(cache)
    except sqlite3.DatabaseError as exc:
        if not _is_damage(exc):
            raise
    with StatCache(root, store_uri, name, on_wait, tell) as cache:
        return use(cache)
