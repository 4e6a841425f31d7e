"""Read the YOLO layout: one text file per image, rows "class centre-x centre-y width height" as shares of the image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import yaml

from trainer.contract import TrainerError
from trainer.dataset_raw import (
    IMAGE_SUFFIXES,
    SPLITS,
    Found,
    ProblemKind,
    RawBox,
    RawDataset,
    RawImage,
    Split,
    answers,
    data_error,
    first_existing,
    parse_numbers,
    split_folders,
    subfolder,
    walk_files,
)


def read_yolo(found: Found, raw: RawDataset) -> None:
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
