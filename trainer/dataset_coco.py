"""Read COCO files: one JSON per split, boxes "x y width height" in pixels."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from trainer.dataset_raw import (
    IMAGE_SUFFIXES,
    SPLIT_FOLDER,
    Found,
    ProblemKind,
    RawBox,
    RawDataset,
    RawImage,
    Split,
    answers,
    as_split,
    data_error,
    list_visible,
    parse_numbers,
    split_in_name,
)


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


def read_coco(found: Found, raw: RawDataset) -> None:
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
