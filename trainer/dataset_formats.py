"""Find which of the three layouts a dataset has, and read it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

from trainer.contract import ExitCode, TrainerError
from trainer.dataset_coco import read_coco
from trainer.dataset_raw import (
    DatasetFormat,
    Found,
    RawDataset,
    answers,
    data_error,
    has_files,
    list_visible,
    split_folders,
    subfolder,
)
from trainer.dataset_voc import read_voc, voc_folders
from trainer.dataset_yolo import read_yolo

_COCO_NAME = re.compile(r"(.*coco.*|instances_.*|annotations?|result|(train|valid|val|test)\d*)\.json", re.IGNORECASE)
# COCO ships these beside its instances files; they hold no boxes of the detection task.
_COCO_OTHER_TASK = re.compile(r"(captions|person_keypoints|panoptic|stuff|image_info)_.*", re.IGNORECASE)


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
    if voc_folders(folder):
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
        DatasetFormat.YOLO: read_yolo,
        DatasetFormat.COCO: read_coco,
        DatasetFormat.VOC: read_voc,
    }
    raw = RawDataset(found.format, found.base)
    readers[found.format](found, raw)
    return raw
