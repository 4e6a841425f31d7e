"""The files of a dataset folder, in the order of their paths: what is staged, and what never is."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import NamedTuple
from urllib.parse import urlsplit

from trainer.errors import ExitCode, TrainerError
from trainer.packs import MAX_NAME_BYTES, MAX_PATH_PARTS, check_path
from trainer.storage import to_path

IGNORE_FILE = ".trainyardignore"
# Version control, caches, environments, and what desktops leave behind.
EXCLUDED = frozenset(
    {".git", ".hg", ".svn", ".dvc", "__pycache__", "node_modules", ".venv", ".tox", ".nox", ".ipynb_checkpoints", ".cache"}
    | {".pytest_cache", ".mypy_cache", ".ruff_cache", ".trainyard", ".DS_Store", "Thumbs.db", "desktop.ini"}
)
ENVIRONMENT = "pyvenv.cfg"  # in the folder of every virtual environment
BRACKETS = re.compile(r"\\.|\[[!^]?+\]?+[^\]]*\]")  # escaped, or closed: a first ] is one of the letters
STORE_FOLDERS = ("packs", "files", "manifests", "refs", "leases", "pins")  # where a store's own objects lie
EXCLUDED_SUFFIXES = (".cache",)  # Ultralytics writes labels.cache beside the labels


class Stat(NamedTuple):
    """What tells that a file is unchanged. Times in nanoseconds."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def stat_of(result: os.stat_result) -> Stat:
    return Stat(result.st_size, result.st_mtime_ns, result.st_ctime_ns, result.st_ino)


def require_folder(root: Path) -> None:
    if not root.is_dir():
        raise TrainerError(f"{root} is not a folder", hint="give the folder of the dataset", code=ExitCode.NOT_FOUND)


@dataclass
class Scan:
    """One walk over a folder. ``left_out`` counts what was not followed or is no file, with an example of each kind."""

    root: Path
    only: Sequence[str] | None = None  # these paths, sorted, and no others
    store: str | None = None  # the folder of the store itself, where it lies within
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])

    def files(self) -> Iterator[tuple[str, Stat]]:
        """Relative POSIX paths, sorted by code point, which is also the order of their UTF-8 bytes.

        Raises TrainerError: NOT_FOUND for no folder, DATA for a name that no manifest can hold, PERMISSION.
        """
        require_folder(self.root)
        self._real = os.path.realpath(self.root)
        self._within: dict[str, bool] = {}  # folders of wanted paths
        if self.only is not None:
            yield from ((path, self._look_at_wanted(path)) for path in self.only)
            return
        self._ignored = _read_ignored(self.root)
        try:
            yield from self._below(str(self.root), "")
        except (FileNotFoundError, NotADirectoryError) as exc:
            raise vanished_error(exc.filename) from exc

    def _look_at_wanted(self, path: str) -> Stat:
        full = f"{self.root}/{path}"
        folder = path.rpartition("/")[0]
        if folder not in self._within:
            self._within[folder] = Path(os.path.realpath(f"{self.root}/{folder}")).is_relative_to(self._real)
        if not self._within[folder]:
            message = f"{full} lies behind a link that leads out of the folder"
            raise TrainerError(message, hint="put the folder itself there, or train without staging", code=ExitCode.DATA)
        try:
            found = self._look(full, path)
        except FileNotFoundError as exc:
            raise vanished_error(full) from exc
        except OSError as exc:
            raise TrainerError(f"cannot read {full}: {exc.strerror}", hint="check the dataset again", code=ExitCode.DATA) from exc
        if found is None:
            message = f"{full} is a link that leads out of the folder, or no file"
            raise TrainerError(message, hint="put the file itself there, or train without staging", code=ExitCode.DATA)
        return found

    def _below(self, folder: str, prefix: str) -> Iterator[tuple[str, Stat]]:
        if prefix.count("/") >= MAX_PATH_PARTS:
            hint = "move what is needed of it up, or leave it out by a pattern in .trainyardignore"
            raise TrainerError(f"{folder} is deeper than {MAX_PATH_PARTS} folders", hint=hint, code=ExitCode.DATA)
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except PermissionError as exc:
            raise TrainerError(f"cannot read the folder {folder}", hint="mend its permissions", code=ExitCode.PERMISSION) from exc
        try:
            names = _names_in(descriptor, folder)
            if ENVIRONMENT in names:
                return
            for name in names:
                bare = name.removesuffix("/")
                path = prefix + name
                if bare in EXCLUDED or name.endswith(EXCLUDED_SUFFIXES) or (self._ignored and self._ignored(path)):
                    continue
                if path == self.store:
                    self._leave_out("the store itself", path)
                elif bare != name:
                    yield from self._below(f"{folder}/{bare}", path)
                elif found := self._look(name, path, descriptor):
                    yield path, found
        finally:
            os.close(descriptor)

    def _look(self, name: str, path: str, folder: int | None = None) -> Stat | None:
        """Of a file by its name in an open folder, which spares the system the way there, or by its whole path."""
        if not (path.isascii() and len(path) <= MAX_NAME_BYTES):  # hot; no file system has the other names that are refused
            try:
                check_path(path)
            except UnicodeEncodeError as exc:
                shown = os.fsencode(f"{self.root}/{path}").decode(errors="backslashreplace")
                hint = "rename the file (convmv does so for a whole folder), or leave it out by a pattern in .trainyardignore"
                raise TrainerError(f"the name of {shown} is not UTF-8 text", hint=hint, code=ExitCode.DATA) from exc
            except ValueError as exc:
                raise TrainerError(f"{f'{self.root}/{path}'!r}: {exc}", hint="rename the file", code=ExitCode.DATA) from exc
        try:
            result = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except OSError as exc:
            exc.filename = f"{self.root}/{path}"
            raise
        if S_ISREG(result.st_mode):
            return stat_of(result)
        if not S_ISLNK(result.st_mode):
            return self._leave_out("neither file nor folder", path)
        target = os.path.realpath(f"{self.root}/{path}")
        if not target.startswith(self._real + os.sep) or not os.path.isfile(target):  # noqa: PTH113 - hot
            return self._leave_out("links out of the folder or to folders", path)
        return stat_of(os.stat(target))  # noqa: PTH116 - hot

    def _leave_out(self, kind: str, path: str) -> None:
        count, example = self.left_out.get(kind, (0, path))
        self.left_out[kind] = (count + 1, example)


def _names_in(descriptor: int, folder: str) -> list[str]:
    """Sorted; the slash behind a folder sorts it where the paths of its files belong."""
    try:
        with os.scandir(descriptor) as entries:
            return sorted(entry.name + "/" if entry.is_dir(follow_symlinks=False) else entry.name for entry in entries)
    except OSError as exc:
        exc.filename = folder
        raise


def vanished_error(full: str) -> TrainerError:
    hint = "run it again when nothing deletes files there; what has arrived is not sent again"
    return TrainerError(f"{full} vanished while the folder was staged", hint=hint, code=ExitCode.DATA)


def _read_ignored(root: Path) -> Callable[[str], bool] | None:
    try:
        content = (root / IGNORE_FILE).read_bytes()
    except FileNotFoundError:
        return None
    return parse_ignored(content, str(root / IGNORE_FILE))


def parse_ignored(content: bytes, place: str) -> Callable[[str], bool]:
    """What ``.trainyardignore`` names, by the rules of ``.gitignore``. Raises TrainerError (DATA) for what is no text or no pattern."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as exc:
        raise TrainerError(f"{place} is not UTF-8 text", hint="mend the file", code=ExitCode.DATA) from exc
    from pathspec import GitIgnoreSpec

    for number, line in enumerate(lines, 1):
        try:
            if not line.startswith("#") and "[" in BRACKETS.sub("", line):  # git takes it for nothing, and the library for a letter
                raise ValueError("a bracket that is not closed")
            GitIgnoreSpec.from_lines([line])
        except (ValueError, re.error) as exc:
            message = f"{place}, line {number}: {line[:80]!r} is no pattern"
            raise TrainerError(message, hint="mend that line; the rules are those of .gitignore", code=ExitCode.DATA) from exc
    return GitIgnoreSpec.from_lines(lines).match_file


def place_within(store_uri: str, root: Path) -> str | None:
    """The store's folder as a path of a scan of `root`, with a slash at its end; None where it lies elsewhere.

    Raises TrainerError (CONFIG) where the folder is the store, or of its own objects.
    """
    if urlsplit(store_uri).scheme != "file":
        return None
    place, real = Path(os.path.realpath(to_path(store_uri))), Path(os.path.realpath(root))
    if place == real:
        raise TrainerError(f"{root} is the store itself", hint="give another folder as --store", code=ExitCode.CONFIG)
    if real.is_relative_to(place) and real.relative_to(place).parts[0] in STORE_FOLDERS:
        message = f"{root} is where the store {place} keeps its own objects"
        raise TrainerError(message, hint="give the folder of the dataset, or another --store", code=ExitCode.CONFIG)
    return f"{place.relative_to(real).as_posix()}/" if place.is_relative_to(real) else None
