"""What a dataset's annotation files say, before anything is checked; and how its folders are walked."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from trainer.contract import ExitCode, TrainerError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_FOLDER = re.compile(r"(train|valid|validation|val|test)\d*", re.IGNORECASE)
_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|valid|validation|val|test)(?=[^a-z]|$)", re.IGNORECASE)


class DatasetFormat(StrEnum):
    YOLO = "yolo"
    COCO = "coco"
    VOC = "pascal-voc"


class ProblemKind(StrEnum):
    UNREADABLE_IMAGE = "unreadable-image"
    MISSING_IMAGE = "missing-image"
    SIZE_MISMATCH = "size-mismatch"  # the annotation states another image size, so its pixels would lie elsewhere
    NO_LABEL = "no-label"
    MALFORMED_LABEL = "malformed-label"
    DEGENERATE_BOX = "degenerate-box"
    OUT_OF_RANGE_BOX = "out-of-range-box"
    UNKNOWN_CLASS = "unknown-class"
    DUPLICATE_IMAGE = "duplicate-image"  # the same image in two splits; nothing is left out for it


class LabelFile(BaseModel):
    """An annotation file, ``data.yaml`` or split list that was read; ``path`` is POSIX, relative to the root."""

    model_config = ConfigDict(frozen=True)
    path: str
    bytes: int
    mtime_ns: int
    sha256: str


class RawBox(NamedTuple):
    """A box as written: its number (row, object or annotation id), class index and four numbers in the format's own terms."""

    number: int
    class_index: int
    values: tuple[float, float, float, float]


class RawImage(NamedTuple):
    """An image with its label. ``size`` is the width and height in pixels that the label states, where it does."""

    path: Path
    split: Split | None
    label: Path
    boxes: tuple[RawBox, ...]
    size: tuple[int, int] | None = None


class Found(NamedTuple):
    format: DatasetFormat
    base: Path
    files: tuple[Path, ...]  # data.yaml, or the COCO files; empty for a layout of folders
    evidence: str


@dataclass
class RawDataset:
    """What the annotation files say. ``label_files`` holds absolute paths; each file is read, and hashed, once."""

    format: DatasetFormat
    base: Path
    classes: tuple[str, ...] = ()
    images: list[RawImage] = field(default_factory=list[RawImage])
    problems: list[tuple[Path, ProblemKind, str]] = field(default_factory=list[tuple[Path, ProblemKind, str]])
    notes: list[str] = field(default_factory=list[str])
    label_files: dict[Path, LabelFile] = field(default_factory=dict[Path, LabelFile])

    def add_problem(self, path: Path, kind: ProblemKind, message: str) -> None:
        self.problems.append((path, kind, message))

    def show(self, path: Path) -> str:
        return os.path.relpath(path, self.base) if path.is_relative_to(self.base) else str(path)

    def read_bytes(self, path: Path) -> bytes:
        try:
            if not path.is_file():  # opening a pipe would wait for ever
                raise FileNotFoundError(errno.ENOENT, "not a regular file")
            with path.open("rb") as file:
                stat, content = os.fstat(file.fileno()), file.read()
        except OSError as exc:
            raise data_error(f"cannot read {self.show(path)}: {exc.strerror}", "Check the file and its permissions.") from exc
        digest = hashlib.sha256(content).hexdigest()
        self.label_files[path] = LabelFile(path=path.as_posix(), bytes=len(content), mtime_ns=stat.st_mtime_ns, sha256=digest)
        return content

    def read_lines(self, path: Path) -> list[str]:
        try:
            lines = self.read_bytes(path).decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as exc:
            raise data_error(f"{self.show(path)} is not UTF-8 text", "Save it as UTF-8.") from exc
        return [line.strip() for line in lines if line.strip()]


def data_error(message: str, hint: str = "") -> TrainerError:
    return TrainerError(message, hint=hint, code=ExitCode.DATA)


# --- Folders -------------------------------------------------------------------------------------


def answers(question: Callable[[Path], bool], path: Path) -> bool:
    """``Path.exists`` and its like, where a name that is too long or a folder that may not be entered is a no, not an error."""
    try:
        return question(path)
    except OSError:
        return False


def list_visible(folder: Path) -> list[Path]:
    """Entries of a folder, sorted, without hidden ones and the ``__MACOSX`` that archives from a Mac leave; [] if it is no folder."""
    try:
        entries = sorted(p for p in folder.iterdir() if not p.name.startswith(".") and p.name != "__MACOSX")
    except (NotADirectoryError, FileNotFoundError):
        return []
    except OSError as exc:
        raise data_error(f"cannot list {folder}: {exc.strerror}", "Check the folder and its permissions.") from exc
    for entry in entries:
        try:
            entry.name.encode()
        except UnicodeEncodeError:  # no JSON document, and so no index, can hold such a name
            raise data_error(f"the file name {os.fsencode(entry.name)!r} in {folder} is not UTF-8", "Rename the file.") from None
    return entries


def walk_files(folder: Path, suffixes: Sequence[str], seen: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Files below a folder with one of the suffixes (any case), sorted; follows links to folders, but never in circles."""
    real = folder.resolve()
    if real in seen:
        return
    for entry in list_visible(folder):
        if answers(Path.is_dir, entry):
            yield from walk_files(entry, suffixes, seen | {real})
        elif entry.suffix.lower() in suffixes:
            yield entry


def has_files(folder: Path | None, suffixes: Sequence[str]) -> bool:
    return folder is not None and next(walk_files(folder, suffixes), None) is not None


def subfolder(folder: Path, *names: str) -> Path | None:
    """The first of the names that exists as a folder, in any case."""
    folders = {p.name.lower(): p for p in reversed(list_visible(folder)) if p.name.lower() in names and answers(Path.is_dir, p)}
    return next((folders[name] for name in names if name in folders), None)


def split_folders(folder: Path) -> list[tuple[Split, Path]]:
    """Sub-folders named like a split (train, val, valid, validation, test, train2017)."""
    return [(as_split(m[1]), p) for p in list_visible(folder) if (m := SPLIT_FOLDER.fullmatch(p.name)) and answers(Path.is_dir, p)]


def as_split(word: str) -> Split:
    return "val" if word.lower().startswith("val") else "test" if word.lower() == "test" else "train"


def split_in_name(name: str) -> Split | None:
    splits: set[Split] = {as_split(word) for word in _SPLIT_IN_NAME.findall(name)}
    return splits.pop() if len(splits) == 1 else None


def first_existing(paths: Iterable[Path]) -> Path | None:
    return next((Path(os.path.normpath(p)) for p in paths if answers(Path.exists, p)), None)


def parse_numbers(texts: Iterable[str | None]) -> list[float] | None:
    try:
        values = [float(text or "") for text in texts]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None
