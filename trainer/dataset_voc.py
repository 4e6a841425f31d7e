"""Read Pascal VOC: one XML per image, boxes "xmin ymin xmax ymax" in pixels; splits in ImageSets/Main."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree
from xml.parsers import expat

from trainer.dataset_raw import (
    IMAGE_SUFFIXES,
    SPLIT_FOLDER,
    SPLITS,
    Found,
    ProblemKind,
    RawBox,
    RawDataset,
    RawImage,
    Split,
    as_split,
    has_files,
    parse_numbers,
    split_folders,
    subfolder,
    walk_files,
)


class _VocLabel(NamedTuple):
    path: Path
    size: tuple[int, int] | None
    objects: list[tuple[int, str, tuple[float, float, float, float]]]


class _VocFolder(NamedTuple):
    split: Split | None
    labels: dict[str, Path]  # by path below the folder, without suffix: that is how the two are paired
    images: dict[str, Path]


def voc_folders(base: Path) -> list[tuple[Split | None, Path, Path]]:
    """Split, folder of XML files and folder of images: the devkit's layout, or XML beside the images in split folders."""
    labels = subfolder(base, "annotations")
    if labels and has_files(labels, [".xml"]):
        return [(None, labels, subfolder(base, "jpegimages", "images") or (labels if has_files(labels, IMAGE_SUFFIXES) else base))]
    folders: list[tuple[Split | None, Path, Path]] = [(split, p, p) for split, p in split_folders(base) if has_files(p, [".xml"])]
    return folders


def read_voc(found: Found, raw: RawDataset) -> None:
    read: list[tuple[Split | None, Path, _VocLabel]] = []
    for split, labels, images in voc_folders(found.base):
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
