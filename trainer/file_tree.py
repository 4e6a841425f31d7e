"""Files below one folder, written so that nothing can land outside it.

Every component of a path is opened by itself, relative to the folder above it, and no link is followed. So a folder that
somebody has prepared with links is refused, and a link that is put there later leads nowhere.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import stat
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from trainer.errors import ExitCode, TrainerError
from trainer.files import DISK_FULL, disk_full_error

COPY_BYTES = 2**20
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextlib.contextmanager
def open_root(path: Path) -> Iterator[int]:
    """The descriptor of a folder, made where it is not there. Raises TrainerError (OCCUPIED) where it is a link or a file."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        root = os.open(path, OPEN_FOLDER)
    except OSError as exc:
        if exc.errno in (errno.ELOOP, errno.ENOTDIR) and os.path.lexists(path):
            raise _no_folder(str(path)) from exc
        raise
    try:
        yield root
    finally:
        os.close(root)


class FileTree:
    """The files below an open folder. For one thread: it keeps the folder of its last file open, as files come sorted."""

    def __init__(self, root: int, place: Path, *, make: bool = True) -> None:
        self.root, self.place, self.make = root, place, make
        self._parent, self._folder = "", root

    def __enter__(self) -> FileTree:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._folder != self.root:
            os.close(self._folder)
        self._parent, self._folder = "", self.root

    def _enter(self, path: str) -> tuple[str, int]:
        """The name of a file and the descriptor of its folder, which is made where it is not there, unless `make` is off."""
        parent, _, name = path.rpartition("/")
        if parent != self._parent:
            self._leave()
            folder = self.root
            for part in parent.split("/") if parent else ():
                inner = self._open_or_make(part, folder, parent)
                if folder != self.root:
                    os.close(folder)
                folder = inner
            self._parent, self._folder = parent, folder
        return name, self._folder

    def _open_or_make(self, name: str, folder: int, parent: str) -> int:
        try:
            try:
                return os.open(name, OPEN_FOLDER, dir_fd=folder)
            except FileNotFoundError:
                if not self.make:
                    raise
                with contextlib.suppress(FileExistsError):  # another thread's
                    os.mkdir(name, dir_fd=folder)
                return os.open(name, OPEN_FOLDER, dir_fd=folder)
        except OSError as exc:
            is_file = exc.errno == errno.ENOTDIR and stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
            if folder != self.root:
                os.close(folder)
            if is_file:
                raise _file_and_folder(parent) from exc
            if exc.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _no_folder(f"{self.place}/{parent}") from exc
            raise self._told(exc, parent, 0) from exc

    def look(self, path: str) -> os.stat_result | None:
        """A regular file; None where there is none."""
        try:
            name, folder = self._enter(path)
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found if stat.S_ISREG(found.st_mode) else None

    def size(self, path: str) -> int | None:
        """Bytes of a regular file; None where there is none."""
        found = self.look(path)
        return found.st_size if found else None

    def holds(self, path: str, size: int, digest: bytes) -> bool:
        """Whether a regular file of this content is there."""
        name, folder = self._enter(path)
        if self.size(path) != size:
            return False
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
        with os.fdopen(descriptor, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest() == digest

    def remove(self, path: str) -> None:
        """Removes a file or link; none there is fine."""
        name, folder = self._enter(path)
        try:
            os.unlink(name, dir_fd=folder)
        except FileNotFoundError:
            pass
        except (IsADirectoryError, PermissionError) as exc:
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise _file_and_folder(path) from exc
            raise

    @contextlib.contextmanager
    def opened(self, path: str, flags: int, size: int = 0) -> Iterator[int]:
        """The descriptor of a file, for reading and writing. A full disk is told with the `size` that the file needs."""
        name, folder = self._enter(path)
        try:
            descriptor = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=folder)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except FileExistsError as exc:
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                raise _file_and_folder(path) from exc
            raise TrainerError(
                f"{path} cannot be written: something of that name came there meanwhile, or its file system takes two names for one",
                hint="choose a folder of a file system that tells all names apart, which nobody else writes to",
                code=ExitCode.OCCUPIED,
            ) from exc
        except OSError as exc:
            raise self._told(exc, path, size) from exc

    def write(self, path: str, content: memoryview) -> None:
        """A new file."""
        with self.opened(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, len(content)) as descriptor:
            write_all(descriptor, content)

    def copy(self, path: str, to: str, size: int) -> None:
        """A new file of the same content."""
        with self.opened(path, os.O_RDONLY) as source, self.opened(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, size) as descriptor:
            while content := os.read(source, COPY_BYTES):
                write_all(descriptor, memoryview(content))

    def _told(self, exc: OSError, path: str, size: int) -> OSError:
        return disk_full_error(self.place / path, exc.errno, size) if exc.errno in DISK_FULL else exc


def remove_others(root: int, keep: Callable[[str], bool]) -> None:
    """Removes files and links below a folder that are not to be kept, and folders that are empty."""
    for folder, folders, files, descriptor in os.fwalk(".", topdown=False, dir_fd=root):
        for name in files + folders:
            if stat.S_ISDIR(os.stat(name, dir_fd=descriptor, follow_symlinks=False).st_mode):
                with contextlib.suppress(OSError):  # not empty
                    os.rmdir(name, dir_fd=descriptor)
            elif not keep(f"{folder}/{name}".removeprefix("./")):
                os.unlink(name, dir_fd=descriptor)


def write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]


def _file_and_folder(path: str) -> TrainerError:
    return TrainerError(
        f"the dataset has {path[:200]!r} as a file and as a folder",
        hint="rename one of them and stage the dataset again",
        code=ExitCode.DATA,
    )


def _no_folder(path: str) -> TrainerError:
    return TrainerError(f"{path} is a link or a file, and should be a folder", hint="remove it and fetch again", code=ExitCode.OCCUPIED)


# --- File systems that take two names for one ---------------------------------------------------------


class NameRules(NamedTuple):
    """What a file system does not tell apart. macOS: case, and by version how letters with accents are composed."""

    ignores_case: bool
    composes: bool

    def key(self, name: str) -> str:
        """Equal for names that are one name there."""
        if self.composes:
            name = unicodedata.normalize("NFC", name)
        # Folding may take letters apart, so what was composed is composed again.
        return unicodedata.normalize("NFC", name.casefold()) if self.ignores_case else name


def probe_names(root: int) -> NameRules:
    """Finds out by a file that is gone again at once."""
    name = f".probe-{secrets.token_hex(4)}-Aé"
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=root))
    try:
        return NameRules(_is_there(name.swapcase(), root), _is_there(unicodedata.normalize("NFD", name), root))
    finally:
        os.unlink(name, dir_fd=root)


def _is_there(name: str, root: int) -> bool:
    try:
        os.stat(name, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
