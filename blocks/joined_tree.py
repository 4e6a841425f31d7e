"""The files of a registered dataset while it is put together: objects in place, and labels laid over them.

They are held in a temporary SQLite database, which goes to disk when it grows and is gone with the process,
so that a million objects need no more memory than a few, and come out in the order that a manifest needs.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from typing import Any

from blocks.label_matching import coco_folders, expected_label, image_keys, is_image, is_label, label_key
from trainer.packs import InPlace, StagedFile, VersionHash

COLUMNS = "path, sha256, size, pack, offset, source, key"
_TABLE = "(path TEXT PRIMARY KEY, sha256 BLOB, size INT, pack TEXT, offset INT, source TEXT, key TEXT) WITHOUT ROWID"
SCHEMA = f"""
CREATE TABLE files {_TABLE};
CREATE TABLE base {_TABLE};
CREATE TABLE folders (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE labels (path TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE label_keys (key TEXT PRIMARY KEY, path TEXT, used INT) WITHOUT ROWID;
CREATE TABLE labelled (path TEXT PRIMARY KEY) WITHOUT ROWID;
"""
_DIFFERS = "base.path IS NULL OR " + " OR ".join(f"base.{column} IS NOT files.{column}" for column in COLUMNS.split(", ")[1:])
_CHANGED = f"FROM files LEFT JOIN base USING (path) WHERE {_DIFFERS}"
_GONE = "FROM base WHERE path NOT IN (SELECT path FROM files)"


class JoinedTree:
    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(f"PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; PRAGMA cache_size=-32768; {SCHEMA}")
        self._database.execute("BEGIN")
        self._last_parent = ""

    def close(self) -> None:
        self._database.close()

    # --- Filling it ---

    def add(self, files: Iterable[StagedFile], table: str = "files") -> None:
        """A path that is there already gets the new content."""
        query = f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - constants
        self._database.executemany(query, ((*file[:5], *(file.in_place or ("", ""))) for file in files))

    def add_base(self, files: Iterable[StagedFile]) -> None:
        """The version before, to tell what differs from it."""
        self.add(files, "base")

    def forget_base(self) -> None:
        self._database.execute("DELETE FROM base")

    def add_folders_of(self, path: str) -> None:
        parent = path.rpartition("/")[0]
        if parent == self._last_parent:
            return
        self._last_parent = parent
        while parent:
            self._database.execute("INSERT OR IGNORE INTO folders VALUES (?)", (parent,))
            parent = parent.rpartition("/")[0]

    def drop_folder_markers(self) -> tuple[int, str]:
        """Forgets empty objects that stand for a folder, as consoles and file systems over buckets make them: count and an example."""
        where = "size = 0 AND path IN (SELECT path FROM folders)"
        count, example = self._one(f"SELECT count(*), min(path) FROM files WHERE {where}")  # noqa: S608 - constants
        self._database.execute(f"DELETE FROM files WHERE {where}")  # noqa: S608 - constants
        return count, example or ""

    def find_both(self) -> str:
        """A path that would have to be a file and a folder at once, if any."""
        row = self._one("SELECT min(path) FROM (SELECT path FROM files UNION ALL SELECT path FROM labels) WHERE path IN folders")
        return row[0] or ""

    # --- Labels ---

    def add_labels(self, paths: Iterable[str]) -> None:
        """Names of label files, before they are staged."""
        for path in paths:
            self._database.execute("INSERT OR IGNORE INTO labels VALUES (?)", (path,))
            self.add_folders_of(path)
            if is_label(path):
                self._database.execute("INSERT OR IGNORE INTO label_keys VALUES (?, ?, 0)", (label_key(path), path))

    def add_labels_among_files(self) -> None:
        """Objects that are labels by their names, beside those that were given."""
        paths = (path for (path,) in self._database.execute("SELECT path FROM files") if is_label(path))
        self._database.executemany("INSERT OR IGNORE INTO label_keys VALUES (?, ?, 0)", ((label_key(path), path) for path in paths))

    def find_overlaid_image(self) -> str:
        """An image that the labels would replace, if any."""
        return next((row[0] for row in self._database.execute("SELECT path FROM labels JOIN files USING (path)") if is_image(row[0])), "")

    def match_labels(self) -> None:
        """Pairs images with labels by name."""
        for path in self.images():
            marked = self._database.execute("UPDATE label_keys SET used = 1 WHERE key IN (?, ?, ?)", image_keys(path))
            if marked.rowcount:
                self._database.execute("INSERT OR IGNORE INTO labelled VALUES (?)", (path,))

    def match_coco(self, file: str, names: Iterable[str]) -> list[str]:
        """Pairs the images that the COCO file at this path names with those that there are; returns names that fit none."""
        places = coco_folders(file)
        marks = ", ".join("?" * len(places))
        query = f"INSERT OR IGNORE INTO labelled SELECT path FROM files WHERE path IN ({marks}) LIMIT 1"  # noqa: S608 - question marks
        return [name for name in names if not self._database.execute(query, [place + name for place in places]).rowcount]

    def count_labelled(self) -> int:
        return self._one("SELECT count(*) FROM labelled")[0]

    def find_unlabelled(self) -> tuple[str, str]:
        """An image without a label, and where a training looks for that, by the kind of the other labels; empty where all have one."""
        rows = self._database.execute("SELECT path FROM files WHERE path NOT IN (SELECT path FROM labelled) ORDER BY path")
        image = next((path for (path,) in rows if is_image(path)), "")
        like = self._one("SELECT coalesce(min(path), '.txt') FROM label_keys")[0]
        return (image, expected_label(image, like)) if image else ("", "")

    def find_json(self) -> str:
        """An object that may be a COCO file; empty where there is none."""
        row = self._database.execute("SELECT path FROM files WHERE path GLOB '*.[jJ][sS][oO][nN]' ORDER BY length(path), path").fetchone()
        return row[0] if row else ""

    def unused_labels(self) -> tuple[int, str]:
        """How many labels are of no image, and one of them."""
        return self._one("SELECT count(*), coalesce(min(path), '') FROM label_keys WHERE NOT used")

    def labels(self) -> Iterator[str]:
        return (row[0] for row in self._database.execute("SELECT path FROM labels ORDER BY path"))

    def images(self) -> Iterator[str]:
        return (row[0] for row in self._database.execute("SELECT path FROM files ORDER BY path") if is_image(row[0]))

    def outline(self) -> list[str]:
        """A few names that tell which format the whole has: an image with its label, and files that describe a dataset."""
        image = self._one("SELECT min(path) FROM labelled")[0]
        pair = self._database.execute("SELECT path FROM label_keys WHERE key IN (?, ?, ?)", image_keys(image))
        described = self._database.execute(
            "SELECT path FROM (SELECT path FROM labels UNION SELECT path FROM files)"
            " WHERE path GLOB '*.[yY]*[mM][lL]' OR path GLOB '*.[jJ][sS][oO][nN]' ORDER BY length(path) LIMIT 100"
        )
        return [image, *(row[0] for row in pair), *(row[0] for row in described)]

    # --- Reading it ---

    def version(self) -> VersionHash:
        total = VersionHash()
        for row in self._database.execute("SELECT path, sha256, size FROM files ORDER BY path"):
            total.add(*row)
        return total

    def count_in_place(self) -> tuple[int, int]:
        """Files and bytes of them."""
        return self._one("SELECT count(*), coalesce(sum(size), 0) FROM files WHERE source != ''")

    def count_difference(self) -> tuple[int, int]:
        """Files that are new or changed against the base, and those that are gone."""
        return self._one(f"SELECT count(*) {_CHANGED}")[0], self._one(f"SELECT count(*) {_GONE}")[0]

    def packs(self, *, difference: bool) -> tuple[str, ...]:
        rows = self._database.execute(f"SELECT DISTINCT files.pack {_CHANGED if difference else 'FROM files'} ORDER BY 1")
        return tuple(row[0] for row in rows if row[0])

    def lines(self, *, difference: bool) -> Iterator[StagedFile | str]:
        """A manifest's lines: all files, or what differs from the base."""
        columns = ", ".join("path" if column == "path" else f"files.{column}" for column in COLUMNS.split(", "))
        query = (
            f"SELECT {columns} {_CHANGED} UNION ALL SELECT path, NULL, 0, '', 0, '', '' {_GONE}" if difference else "SELECT * FROM files"
        )
        for row in self._database.execute(f"{query} ORDER BY path"):
            path, digest, size, pack, offset, *place = row
            yield path if digest is None else StagedFile(path, digest, size, pack, offset, InPlace(*place) if place[0] else None)

    def _one(self, query: str) -> tuple[Any, ...]:
        return self._database.execute(query).fetchone()
