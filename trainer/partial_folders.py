"""Where a fetch writes to until all is there: ``<folder>.partial-<version>``, beside the folder. Whoever asks holds the folder's lock."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from trainer.packs import StagedFile

PARTIAL = re.compile(r"\.partial-[0-9a-f]{12}")


def choose_partial(to: Path, version: str, read_files: Callable[[], Iterable[StagedFile]]) -> Path:
    """The folder to fill. What a fetch of another version left when it was cut, the newest of such, becomes its beginning.

    Not where files lie in place, since of those a fetch that goes on compares no more than the size, nor where a file is in the
    way of a folder, or a folder in that of a file.
    """
    folder = to.with_name(f"{to.name}.partial-{version[:12]}")
    if not os.path.lexists(folder) and (others := _list_partials(to)):
        newest = max(others, key=lambda other: other.stat().st_mtime_ns)
        if all(file.in_place is None and _has_room(newest, file.path) for file in read_files()):
            newest.rename(folder)
    return folder


def _has_room(folder: Path, path: str) -> bool:
    try:
        return not stat.S_ISDIR(os.lstat(f"{folder}/{path}").st_mode)
    except FileNotFoundError:
        return True
    except NotADirectoryError:
        return False


def remove_partials(to: Path) -> None:
    """Once `to` is whole, none of them can become it. What cannot be removed is not worth an error then."""
    for folder in _list_partials(to):
        shutil.rmtree(folder, ignore_errors=True)


def _list_partials(to: Path) -> list[Path]:
    found = (path for path in to.parent.iterdir() if path.name.startswith(to.name) and PARTIAL.fullmatch(path.name[len(to.name) :]))
    return [path for path in found if path.is_dir() and not path.is_symlink()]
