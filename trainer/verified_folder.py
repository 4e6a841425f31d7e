"""What was verified of a fetched folder, remembered as one hash over path, size and times of its files.

Content that is damaged later keeps its size, and may keep its mtime; no write keeps the ctime. So a folder of which the hash
is as remembered is whole, and any other is read again. Losing the memory costs that reading.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.errors import ExitCode, TrainerError
from trainer.file_tree import FileTree, open_root
from trainer.files import write_atomic
from trainer.packs import StagedFile


def read_state(tree: FileTree, version: str, files: Iterable[tuple[str, int]]) -> str:
    """The hash of files that are there, by path and size, in the order of their paths.

    Raises TrainerError (OCCUPIED), naming the first that is not.
    """
    total = hashlib.sha256(version.encode())
    for path, size in files:
        found = tree.look(path)
        if found is None or found.st_size != size:
            message = f"{path} is missing, or has another size"
            raise TrainerError(message, hint="see that nothing else writes to the folder, and fetch again", code=ExitCode.OCCUPIED)
        total.update(f"\0{path}\0{size}\0{found.st_mtime_ns}\0{found.st_ctime_ns}".encode())
    return total.hexdigest()


def remember(memory: Path, state: str) -> None:
    with contextlib.suppress(OSError):  # all is read again the next time
        write_atomic(memory, state.encode())


def _is_remembered(memory: Path | None, state: str) -> bool:
    try:
        return memory is not None and memory.read_bytes() == state.encode()
    except OSError:
        return False


def why_not_whole(
    folder: Path, version: str, read_files: Callable[[], Iterable[StagedFile]], memory: Path | None, on_bytes: Callable[[int], None] | None
) -> str:
    """What is wrong with a folder that should be a version; empty where nothing is. With `on_bytes`, what is not remembered is read.

    Makes nothing in the folder. Files that the version has not are not looked at.
    """
    try:
        with open_root(folder) as root, FileTree(root, folder, make=False) as tree:
            state = read_state(tree, version, ((file.path, file.size) for file in read_files()))
            if _is_remembered(memory, state):
                return ""
            if on_bytes is None:
                return "nobody remembers that it was verified"
            for file in read_files():
                if file.in_place:
                    return f"{file.path} is of another bucket, so nobody knows its content, and it was not fetched as it is"
                if not tree.holds(file.path, file.size, file.sha256):
                    return f"{file.path} is not as it was staged"
                on_bytes(file.size)
    except TrainerError as exc:  # also of a link or a file where a folder should be
        return exc.message
    if memory is not None:
        remember(memory, state)
    return ""
