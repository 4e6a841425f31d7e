"""Find which of the three layouts a dataset has, and read its images, splits, classes and boxes as written.

Nothing is decoded or judged here beyond what the annotation files say; ``trainer.dataset`` opens the images,
checks the boxes against them and makes the splits that are missing.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple, cast
from xml.etree import ElementTree
from xml.parsers import expat

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.contract import ExitCode, TrainerError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
SPLIT_FOLDER = re.compile(r"(train|valid|validation|val|test)\d*", re.IGNORECASE)
_SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|valid|validation|val|test)(?=[^a-z]|$)", re.IGNORECASE)
_COCO_NAME = re.compile(r"(.*coco.*|instances_.*|annotations?|result|(train|valid|val|test)\d*)\.json", re.IGNORECASE)
# COCO ships these beside its instances files; they hold no boxes of the detection task.
_COCO_OTHER_TASK = re.compile(r"(captions|person_keypoints|panoptic|stuff|image_info)_.*", re.IGNORECASE)


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


# --- Which format --------------------------------------------------------------------------------


def find_dataset(path: Path) -> Found:
    """The dataset at an absolute path: a folder, an Ultralytics ``data.yaml`` or a COCO ``.json``.

    Raises TrainerError: NOT_FOUND where nothing is there, DATA where no format or several fit.
    """
    if not answers(Path.exists, path):
        raise TrainerError(f"no dataset at {path}: there is no such file or folder", hint="Check the path.", code=ExitCode.NOT_FOUND)
    if path.is_file():
        return _found_file(path)
    found = _formats_in(path)
    if not found:  # archives often hold a single folder
        inner = [fits for folder in list_visible(path) if folder.is_dir() and (fits := _formats_in(folder))]
        found = inner[0] if len(inner) == 1 else []
    if len(found) > 1:
        listed = "; ".join(f"{f.format} ({f.evidence})" for f in found)
        raise data_error(
            f"{path} fits more than one dataset format: {listed}", "Give the data.yaml or the COCO .json itself, or one folder."
        )
    if not found:
        raise data_error(f"no dataset found in {path}: it holds {_describe(path)}", _LOOKED_FOR)
    return found[0]


_LOOKED_FOR = (
    "Looked for: YOLO (data.yaml, or images/ and labels/ with .txt files, also below train/ and val/), COCO (annotations/*.json, "
    "instances_*.json, _annotations.coco.json) and Pascal VOC (Annotations/*.xml), here and in a single sub-folder."
)


def _found_file(path: Path) -> Found:
    if path.suffix.lower() in (".yaml", ".yml"):
        return Found(DatasetFormat.YOLO, path.parent, (path,), path.name)
    if path.suffix.lower() == ".json":
        base = path.parent.parent if path.parent.name.lower() == "annotations" else path.parent
        return Found(DatasetFormat.COCO, base, (path,), path.name)
    raise data_error(f"{path.name} is neither a data.yaml nor a COCO .json", "Give the dataset's folder; unpack archives first.")


def _describe(folder: Path) -> str:
    names = [p.name + "/" * p.is_dir() for p in list_visible(folder)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"


def _formats_in(folder: Path) -> list[Found]:
    found: list[Found] = []
    pairs = [(subfolder(f, "images"), subfolder(f, "labels")) for f in (folder, *(p for _, p in split_folders(folder)))]
    if config := _yolo_config_file(folder):
        found.append(Found(DatasetFormat.YOLO, folder, (config,), config.name))
    elif any(images and has_files(labels, [".txt"]) for images, labels in pairs):
        found.append(Found(DatasetFormat.YOLO, folder, (), "images/ and labels/*.txt"))
    if files := _coco_files(folder):
        found.append(Found(DatasetFormat.COCO, folder, tuple(files), ", ".join(f.name for f in files[:3])))
    if _voc_folders(folder):
        found.append(Found(DatasetFormat.VOC, folder, (), "*.xml annotations"))
    return found


def _yolo_config_file(folder: Path) -> Path | None:
    files = {p.name.lower(): p for p in list_visible(folder) if p.suffix.lower() in (".yaml", ".yml") and os.access(p, os.R_OK)}
    named = [files[name] for name in ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml") if name in files]
    return named[0] if named else next((p for p in files.values() if p.is_file() and re.search(rb"(?m)^train\s*:", p.read_bytes())), None)


def _coco_files(folder: Path) -> list[Path]:
    annotations = subfolder(folder, "annotations")
    files = [p for p in list_visible(annotations) if p.suffix.lower() == ".json"] if annotations else []
    places = (folder, *(p for _, p in split_folders(folder)))
    files += [p for place in places for p in list_visible(place) if _COCO_NAME.fullmatch(p.name)]
    instances = [p for p in files if p.name.lower().startswith("instances_")]
    return instances or [p for p in files if not _COCO_OTHER_TASK.fullmatch(p.name)]


def read_found(found: Found) -> RawDataset:
    """Read what the annotation files say. Raises TrainerError (DATA) where a file cannot be understood."""
    readers: dict[DatasetFormat, Callable[[Found, RawDataset], None]] = {
        DatasetFormat.YOLO: _read_yolo,
        DatasetFormat.COCO: _read_coco,
        DatasetFormat.VOC: _read_voc,
    }
    raw = RawDataset(found.format, found.base)
    readers[found.format](found, raw)
    return raw


def parse_numbers(texts: Iterable[str | None]) -> list[float] | None:
    try:
        values = [float(text or "") for text in texts]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


# --- YOLO: one text file per image, rows "class centre-x centre-y width height" as shares of the image -------------


def _read_yolo(found: Found, raw: RawDataset) -> None:
    if found.files:
        config = _yolo_config(found.files[0], raw)
        raw.classes = _yolo_names(config, raw.show(found.files[0]))
        sources = _yolo_sources(config, found.files[0], raw)
    else:
        raw.classes = _yolo_class_list(raw)
        sources = _yolo_source_folders(raw)
    for split, places in sources:
        for image in dict.fromkeys(image for place in places for image in _yolo_images(place, raw)):
            _read_yolo_image(image, split, raw)


def _yolo_config(file: Path, raw: RawDataset) -> dict[str, Any]:
    try:
        config: object = yaml.safe_load(raw.read_bytes(file))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as exc:
        raise data_error(f"{raw.show(file)} is not valid YAML: {' '.join(str(exc).split())[:200]}", "Mend the file.") from exc
    if not isinstance(config, dict):
        raise data_error(f"{raw.show(file)} is not a dataset description", "It needs train:, val: and names:, as Ultralytics documents.")
    fields = cast("dict[str, Any]", config)
    if fields.get("kpt_shape"):
        raise _other_task(f"{raw.show(file)} describes keypoints (kpt_shape)", "pose-estimation")
    return fields


def _other_task(what: str, task: str) -> TrainerError:
    hint = f"These labels fit the task {task}; for object-detection every row needs 5 columns: class, centre x, centre y, width, height."
    return data_error(f"{what}, which does not fit the task object-detection", hint)


def _yolo_names(config: dict[str, Any], where: str) -> tuple[str, ...]:
    names: object = config.get("names")
    count: object = config.get("nc")
    if names is None and isinstance(count, int) and 0 < count <= 100_000:
        return tuple(f"class_{i}" for i in range(count))
    if isinstance(names, dict):
        by_index = {str(k): v for k, v in cast("dict[object, object]", names).items()}
        if set(by_index) != {str(i) for i in range(len(by_index))}:
            raise data_error(f"names in {where} are not numbered 0 to {len(by_index) - 1} without gaps", "Number the classes from 0.")
        names = [by_index[str(i)] for i in range(len(by_index))]
    if not isinstance(names, list) or not names:
        raise data_error(f"{where} names no classes", "Add names: with one entry per class.")
    # Only plain values: printing nested YAML aliases can take all memory.
    listed = tuple(str(name) for name in cast("list[object]", names) if isinstance(name, str | int | float))
    if len(listed) != len(cast("list[object]", names)):
        raise data_error(f"names in {where} has entries that are not text", "Give each class one name.")
    if isinstance(count, int) and count != len(listed):
        raise data_error(f"{where} says nc: {count}, but names has {len(listed)} entries", "Make the two agree.")
    return listed


def _yolo_sources(config: dict[str, Any], file: Path, raw: RawDataset) -> list[tuple[Split | None, list[Path]]]:
    """Folders, lists and images of each split. A ``path:`` of another machine, common in exports, falls back to the file's folder."""
    stated = _yaml_texts(config, "path", file)
    base = Path(os.path.normpath(file.parent / (stated[0] if stated else ".")))
    if not answers(Path.is_dir, base):
        raw.notes.append(f"path: {stated[0]} in {file.name} does not exist; its own folder was used.")
        base = file.parent
    sources: list[tuple[Split | None, list[Path]]] = []
    for split in SPLITS:
        keys = ("val", "valid", "validation") if split == "val" else (split,)
        texts = next((texts for key in keys if (texts := _yaml_texts(config, key, file))), list[str]())
        if not texts:
            continue
        places = {text: first_existing((base / text, base / text.removeprefix("../"), file.parent / text)) for text in texts}
        missing = [text for text, place in places.items() if place is None]
        if missing and split != "test":
            raise data_error(f"{file.name} says {split}: {missing[0]}, which does not exist below {base}", f"Correct {split}: or path:.")
        if missing:  # exports name a test folder as a matter of course
            raw.notes.append(f"test: {missing[0]} in {file.name} does not exist and was passed over.")
        sources.append((split, [place for place in places.values() if place]))
    return sources


def _yaml_texts(config: dict[str, Any], key: str, file: Path) -> list[str]:
    value: object = config.get(key) or []
    values = cast("list[object]", value) if isinstance(value, list) else [value]
    texts = [text for text in values if isinstance(text, str)]
    if len(texts) != len(values):
        raise data_error(f"{key}: in {file.name} is neither a path nor a list of paths", f"Correct {key}:.")
    return texts


def first_existing(paths: Iterable[Path]) -> Path | None:
    return next((Path(os.path.normpath(p)) for p in paths if answers(Path.exists, p)), None)


def _yolo_class_list(raw: RawDataset) -> tuple[str, ...]:
    file = first_existing(raw.base / name for name in ("classes.txt", "labels/classes.txt", "obj.names"))
    names = raw.read_lines(file) if file else []
    if not names:
        raise data_error(f"{raw.base} has images and labels, but no class names", "Add a data.yaml, or classes.txt with a name per line.")
    return tuple(names)


def _yolo_source_folders(raw: RawDataset) -> list[tuple[Split | None, list[Path]]]:
    images = subfolder(raw.base, "images")
    split = split_folders(images) if images else [(s, i) for s, p in split_folders(raw.base) if (i := subfolder(p, "images"))]
    if images and not split:
        return [(None, [images])]
    used = {p for _, folder in split for p in walk_files(folder, IMAGE_SUFFIXES)}
    if unused := images and sum(p not in used for p in walk_files(images, IMAGE_SUFFIXES)):
        raw.notes.append(f"{unused} images in images/ lie outside the split folders and were not used.")
    return [(name, [folder for s, folder in split if s == name]) for name in SPLITS]


def _yolo_images(place: Path, raw: RawDataset) -> Iterator[Path]:
    if place.suffix.lower() != ".txt" or place.is_dir():
        yield from walk_files(place, IMAGE_SUFFIXES) if place.is_dir() else [place]
        return
    for line in raw.read_lines(place):
        image = first_existing(folder / line for folder in (place.parent, raw.base))
        if image:
            yield image
        else:
            missing = Path(os.path.normpath(place.parent / line))
            raw.add_problem(missing, ProblemKind.MISSING_IMAGE, f"{raw.show(place)} lists {line}, which does not exist")


def _read_yolo_image(image: Path, split: Split | None, raw: RawDataset) -> None:
    parts, beside = image.parts, image.with_suffix(".txt")
    last = max((i for i, part in enumerate(parts[:-1]) if part.lower() == "images"), default=None)
    labels = (
        [Path(*parts[:last], name, *parts[last + 1 :]).with_suffix(".txt") for name in ("labels", "Labels")] if last is not None else []
    )
    label = next((p for p in (*labels, beside) if p.is_file()), None)
    if label is None:
        expected = raw.show(labels[0] if labels else beside)
        raw.add_problem(image, ProblemKind.NO_LABEL, f"no {expected}; an image without objects needs an empty label file")
        return
    try:
        text = raw.read_bytes(label).decode("utf-8-sig")
    except UnicodeDecodeError:
        raw.add_problem(image, ProblemKind.MALFORMED_LABEL, f"{raw.show(label)} is not UTF-8 text")
        return
    rows = [(number, line.split()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    boxes = [_yolo_box(number, row, image, label, raw) for number, row in rows]
    raw.images.append(RawImage(image, split, label, tuple(box for box in boxes if box)))


def _yolo_box(number: int, row: list[str], image: Path, label: Path, raw: RawDataset) -> RawBox | None:
    where = f"{raw.show(label)} row {number}"
    if len(row) > 6:
        raise _other_task(f"{where} has {len(row)} columns, a polygon", "instance-segmentation")
    values = parse_numbers(row)
    if len(row) != 5 or values is None or values[0] % 1:
        raw.add_problem(image, ProblemKind.MALFORMED_LABEL, f"{where} is not 'class x y width height': {' '.join(row)[:80]!r}")
        return None
    if not 0 <= values[0] < len(raw.classes):
        raw.add_problem(image, ProblemKind.UNKNOWN_CLASS, f"{where} has class {values[0]:g}; known are 0 to {len(raw.classes) - 1}")
        return None
    return RawBox(number, int(values[0]), (values[1], values[2], values[3], values[4]))


# --- COCO: one JSON per split, boxes "x y width height" in pixels ----------------------------------------------------


class _CocoImage(BaseModel):
    id: int | str
    file_name: str
    width: float | None = None
    height: float | None = None


class _CocoAnnotation(BaseModel):
    id: int | str | None = None
    image_id: int | str
    category_id: int
    bbox: Any = None  # judged box by box, so that one bad box does not condemn the file
    iscrowd: int | None = 0


class _CocoCategory(BaseModel):
    id: int
    name: str


class _CocoFile(BaseModel):
    images: list[_CocoImage]
    annotations: list[_CocoAnnotation]
    categories: list[_CocoCategory]


def _read_coco(found: Found, raw: RawDataset) -> None:
    documents = [(file, _coco_document(file, raw)) for file in found.files]
    classes = _coco_classes(documents, raw)
    listed: set[Path] = set()
    for file, document in documents:
        folder = SPLIT_FOLDER.fullmatch(file.parent.name)
        split = split_in_name(file.stem) or (as_split(folder[1]) if folder else None)
        paths = _coco_paths(file, document, split, raw)
        boxes = _coco_boxes(file, document, paths, classes, raw)
        # A single file is the whole set, whatever its name says.
        given = split if len(documents) > 1 else None
        for image in document.images:
            if path := paths.get(image.id):
                size = (round(image.width), round(image.height)) if image.width and image.height else None
                raw.images.append(RawImage(path, given, file, tuple(boxes.get(image.id, [])), size))
        listed |= set(paths.values())
    unlisted = sum(1 for folder in {p.parent for p in listed} for p in list_visible(folder) if p.suffix.lower() in IMAGE_SUFFIXES) - len(
        listed
    )
    if unlisted > 0:
        raw.notes.append(f"{unlisted} images in the folders are in no annotation file and were not used.")


def _coco_document(file: Path, raw: RawDataset) -> _CocoFile:
    try:
        return _CocoFile.model_validate_json(raw.read_bytes(file).removeprefix(b"\xef\xbb\xbf"))
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"{raw.show(file)} is not a COCO annotation file: {where + ': ' if where else ''}{first['msg']}"
        raise data_error(message, "It needs images, annotations and categories, as COCO's instances files have.") from exc


def _coco_classes(documents: list[tuple[Path, _CocoFile]], raw: RawDataset) -> dict[int, int]:
    """Class index by category id, in the order of the ids, which may start at 0 or 1 and have gaps. Sets ``raw.classes``."""
    names: dict[int, str] = {}
    for file, document in documents:
        for category in document.categories:
            if names.setdefault(category.id, category.name) != category.name:
                both = f"{names[category.id]!r} and {category.name!r}"
                raise data_error(
                    f"category {category.id} has two names, {both} (in {raw.show(file)})", "Give the files the same categories."
                )
    if not names:
        raise data_error(f"{', '.join(raw.show(file) for file, _ in documents)}: no categories", "Add the categories list.")
    raw.classes = tuple(names[i] for i in sorted(names))
    return {category: index for index, category in enumerate(sorted(names))}


def _coco_paths(file: Path, document: _CocoFile, split: Split | None, raw: RawDataset) -> dict[int | str, Path]:
    """Where each image lies: below the file's folder, the root, or an ``images`` folder of either, also in a folder named as the split."""
    names = [file.stem.removeprefix("instances_"), *({"val": ["val", "valid", "validation"]}.get(split, [split]) if split else [])]
    places = [place for base in (file.parent, raw.base) for place in (base, base / "images")]
    folders = [p for place in places for p in (place, *(place / name for name in names)) if p.is_dir()]
    paths: dict[int | str, Path] = {}
    for image in document.images:
        name = PurePosixPath(image.file_name.replace("\\", "/"))
        if ".." in name.parts or (name.is_absolute() and not Path(name).is_relative_to(raw.base)):
            message = f"{raw.show(file)} names the image {image.file_name!r}, which lies outside the dataset"
            raise data_error(message, "Name images relative to the dataset's folder.")
        path = next((p for folder in dict.fromkeys(folders) if answers(Path.is_file, p := folder / name)), None)
        if path:
            paths[image.id] = path
        else:
            message = f"{raw.show(file)} names {image.file_name}, which was not found"
            raw.add_problem(file.parent / name, ProblemKind.MISSING_IMAGE, message)
    return paths


def _coco_boxes(
    file: Path, document: _CocoFile, paths: dict[int | str, Path], classes: dict[int, int], raw: RawDataset
) -> dict[int | str, list[RawBox]]:
    known = {image.id for image in document.images}
    boxes: dict[int | str, list[RawBox]] = {}
    crowds = 0
    for position, annotation in enumerate(document.annotations, 1):
        number = annotation.id if isinstance(annotation.id, int) else position
        where, path = f"{raw.show(file)} annotation {number}", paths.get(annotation.image_id, file)
        values = _coco_values(annotation.bbox)
        if annotation.iscrowd:
            crowds += 1
        elif annotation.image_id not in known:
            raw.add_problem(file, ProblemKind.MALFORMED_LABEL, f"{where} is of image {annotation.image_id}, which is not listed")
        elif annotation.category_id not in classes:
            raw.add_problem(path, ProblemKind.UNKNOWN_CLASS, f"{where} has category {annotation.category_id}, which is not listed")
        elif values is None:
            raw.add_problem(path, ProblemKind.MALFORMED_LABEL, f"{where} has no bbox of four numbers: {str(annotation.bbox)[:80]}")
        else:
            boxes.setdefault(annotation.image_id, []).append(RawBox(number, classes[annotation.category_id], values))
    if crowds:
        raw.notes.append(f"{crowds} crowd annotations (iscrowd) in {raw.show(file)} were passed over.")
    return boxes


def _coco_values(bbox: object) -> tuple[float, float, float, float] | None:
    values = parse_numbers(str(v) for v in cast("list[object]", bbox)) if isinstance(bbox, list) else None
    return (values[0], values[1], values[2], values[3]) if values and len(values) == 4 else None


# --- Pascal VOC: one XML per image, boxes "xmin ymin xmax ymax" in pixels; splits in ImageSets/Main -------------------


class _VocLabel(NamedTuple):
    path: Path
    size: tuple[int, int] | None
    objects: list[tuple[int, str, tuple[float, float, float, float]]]


class _VocFolder(NamedTuple):
    split: Split | None
    labels: dict[str, Path]  # by path below the folder, without suffix: that is how the two are paired
    images: dict[str, Path]


def _voc_folders(base: Path) -> list[tuple[Split | None, Path, Path]]:
    """Split, folder of XML files and folder of images: the devkit's layout, or XML beside the images in split folders."""
    labels = subfolder(base, "annotations")
    if labels and has_files(labels, [".xml"]):
        return [(None, labels, subfolder(base, "jpegimages", "images") or (labels if has_files(labels, IMAGE_SUFFIXES) else base))]
    folders: list[tuple[Split | None, Path, Path]] = [(split, p, p) for split, p in split_folders(base) if has_files(p, [".xml"])]
    return folders


def _read_voc(found: Found, raw: RawDataset) -> None:
    read: list[tuple[Split | None, Path, _VocLabel]] = []
    for split, labels, images in _voc_folders(found.base):
        folder = _VocFolder(split, _by_stem(labels, [".xml"]), _by_stem(images, IMAGE_SUFFIXES))
        for entry_split, key in _voc_entries(folder, raw):
            if pair := _voc_pair(key, folder, raw):
                read.append((entry_split, *pair))
    raw.classes = tuple(sorted({name for _, _, label in read for _, name, _ in label.objects}))
    index = {name: i for i, name in enumerate(raw.classes)}
    for split, image, label in read:
        boxes = tuple(RawBox(number, index[name], values) for number, name, values in label.objects)
        raw.images.append(RawImage(image, split, label.path, boxes, label.size))


def _voc_entries(folder: _VocFolder, raw: RawDataset) -> Iterator[tuple[Split | None, str]]:
    known = folder.labels.keys() | folder.images.keys()
    lists = {} if folder.split else _voc_lists(raw.base, raw)
    if unlisted := lists and len(known.difference(*lists.values())):
        raw.notes.append(f"{unlisted} images are in no list of ImageSets/Main and were not used.")
    for split, keys in lists.items():
        for key in dict.fromkeys(keys):
            yield split, key
    for key in [] if lists else sorted(known):
        yield folder.split or _voc_key_split(key), key


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in walk_files(folder, suffixes)}


def _voc_key_split(key: str) -> Split | None:
    match = SPLIT_FOLDER.fullmatch(key.partition("/")[0]) if "/" in key else None
    return as_split(match[1]) if match else None


def _voc_lists(base: Path, raw: RawDataset) -> dict[Split, list[str]]:
    """Entries of each split in ImageSets/Main; trainval stands for train (or val) where that one has no list."""
    sets = subfolder(base, "imagesets")
    folder = (subfolder(sets, "main") or sets) if sets else None
    names = ("train", "val", "trainval", "test")
    files = {name: folder / f"{name}.txt" for name in names if (folder / f"{name}.txt").is_file()} if folder else {}
    lists = {name: [_voc_entry(line) for line in raw.read_lines(file)] for name, file in files.items()}
    both = lists.pop("trainval", [])
    for name, other in (("train", "val"), ("val", "train")):
        if rest := [key for key in both if key not in set(lists.get(other, []))]:
            lists.setdefault(name, rest)
    return {split: lists[split] for split in SPLITS if lists.get(split)}


def _voc_entry(line: str) -> str:
    suffix = PurePosixPath(line).suffix
    return line.removesuffix(suffix) if suffix.lower() in IMAGE_SUFFIXES else line


def _voc_pair(key: str, folder: _VocFolder, raw: RawDataset) -> tuple[Path, _VocLabel] | None:
    label, image = folder.labels.get(key), folder.images.get(key)
    if label is None:
        if image:
            raw.add_problem(image, ProblemKind.NO_LABEL, f"no annotation {key}.xml; an image without objects needs one without <object>")
        else:
            raw.add_problem(raw.base / key, ProblemKind.MISSING_IMAGE, f"ImageSets lists {key}, but there is neither image nor annotation")
        return None
    if image is None:
        raw.add_problem(label.with_suffix(""), ProblemKind.MISSING_IMAGE, f"{raw.show(label)} has no image of the same name")
        return None
    read = _voc_label(label, image, raw)
    return (image, read) if read else None


def _voc_label(file: Path, image: Path, raw: RawDataset) -> _VocLabel | None:
    try:
        root = _parse_xml(raw.read_bytes(file))
    except (expat.ExpatError, ElementTree.ParseError, ValueError, LookupError) as exc:
        raw.add_problem(image, ProblemKind.MALFORMED_LABEL, f"{raw.show(file)} is not usable XML: {exc}")
        return None
    sides = parse_numbers(root.findtext(f"size/{side}") for side in ("width", "height"))
    objects: list[tuple[int, str, tuple[float, float, float, float]]] = []
    for number, element in enumerate(root.findall("object"), 1):
        name = (element.findtext("name") or "").strip()
        values = parse_numbers(element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        if name and values:
            objects.append((number, name, (values[0], values[1], values[2], values[3])))
        else:
            raw.add_problem(
                image, ProblemKind.MALFORMED_LABEL, f"{raw.show(file)} object {number} has no name or no bndbox of four numbers"
            )
    size = (round(sides[0]), round(sides[1])) if sides and min(sides) > 0 else None  # some tools write 0
    return _VocLabel(file, size, objects)


def _parse_xml(content: bytes) -> ElementTree.Element:
    """Parse XML that may come from anywhere: a DOCTYPE, and so every entity, is refused before anything is expanded."""

    def refuse(*_: object) -> None:
        raise ValueError("it has a DOCTYPE")

    scanner = expat.ParserCreate()
    scanner.StartDoctypeDeclHandler = refuse
    scanner.Parse(content, True)
    return ElementTree.fromstring(content)  # noqa: S314 - without a DOCTYPE there are no entities
