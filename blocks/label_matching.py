"""Which label belongs to which image, judged by names alone: nobody reads a million labels to find that none of them fits."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ValidationError

from trainer.contract import ExitCode, TrainerError
from trainer.dataset_formats import find_dataset
from trainer.dataset_raw import IMAGE_SUFFIXES

LABEL_SUFFIXES = (".txt", ".xml", ".json", ".yaml", ".yml")
CONFIG_SUFFIXES = (".yaml", ".yml")
LABEL_FOLDERS = ("labels", "annotations")
# Text files that lie beside labels and are none.
NOT_LABELS = frozenset({"classes.txt", "labels.txt", "train.txt", "val.txt", "valid.txt", "test.txt", "trainval.txt", "readme.txt"})
COCO_SPLITS = ("train", "val", "valid", "validation", "test")


class _CocoImage(BaseModel):
    file_name: str


class _CocoNames(BaseModel):
    images: list[_CocoImage]


def is_image(path: str) -> bool:
    return path.lower().endswith(IMAGE_SUFFIXES)


def is_label(path: str) -> bool:
    """Whether it is the label of one image: YOLO's text or VOC's XML."""
    parts = path.lower().split("/")
    return parts[-1].endswith((".txt", ".xml")) and parts[-1] not in NOT_LABELS and "imagesets" not in parts


def image_keys(path: str) -> tuple[str, ...]:
    """What its label may be known by: YOLO's has ``labels`` for the last ``images`` or lies beside it, VOC's is in ``Annotations``."""
    stem = _stem(path)
    return f"txt:{_swap(stem, ('images',), '*')}", f"txt:{stem}", f"xml:{_swap(stem, ('jpegimages', 'images'), '')}"


def label_key(path: str) -> str:
    """The one of `image_keys` that this label is for."""
    if path.lower().endswith(".xml"):
        return f"xml:{_swap(_stem(path), ('annotations',), '')}"
    return f"txt:{_swap(_stem(path), ('labels',), '*')}"


def expected_label(image: str, like: str) -> str:
    """Where a training looks for the image's label, of the kind of the label `like`."""
    if like.lower().endswith(".xml"):
        return f"Annotations/{_swap(_stem(image), ('jpegimages', 'images'), '')}.xml"
    return f"{_swap(_stem(image), ('images',), 'labels')}.txt"


def _stem(path: str) -> str:
    folder, slash, name = path.rpartition("/")
    return f"{folder}{slash}{name.rpartition('.')[0] or name}"


def _swap(stem: str, names: tuple[str, ...], by: str) -> str:
    """The path with its last folder of one of the names replaced, or dropped."""
    parts = stem.split("/")
    last = max((number for number, part in enumerate(parts[:-1]) if part.lower() in names), default=None)
    if last is not None:
        parts[last : last + 1] = [by] if by else []
    return "/".join(parts)


def labels_prefix(folder: Path) -> str:
    """Where a folder of labels is laid over the images: at their root; but one that is itself the ``labels`` of a dataset, as that."""
    if folder.name.lower() not in LABEL_FOLDERS:
        return ""
    inner = [entry for entry in folder.iterdir() if entry.suffix.lower() in CONFIG_SUFFIXES or entry.name.lower() in LABEL_FOLDERS]
    return "" if inner else f"{folder.name}/"


# --- COCO ----------------------------------------------------------------------------------------------


def read_coco_names(file: Path) -> list[str] | None:
    """The images that a COCO file names; None for a file that is no such."""
    try:
        found = _CocoNames.model_validate_json(file.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except ValidationError:
        return None
    return [str(PurePosixPath(image.file_name.replace("\\", "/"))) for image in found.images]


def coco_folders(path: str) -> list[str]:
    """Prefixes below which the images of the COCO file at this path may lie, as `trainer.dataset_coco` looks for them."""
    parent, _, name = path.rpartition("/")
    root = parent.rpartition("/")[0] if parent.rpartition("/")[2].lower() == "annotations" else parent
    stem = name.rpartition(".")[0].removeprefix("instances_")
    bases = [f"{base}/" if base else "" for base in dict.fromkeys((parent, root))]
    places = [place for base in bases for place in (base, f"{base}images/")]
    return [f"{place}{folder}" for place in places for folder in ("", f"{stem}/", *(f"{split}/" for split in COCO_SPLITS))]


# --- The layout ----------------------------------------------------------------------------------------


def find_format(names: Iterable[str], configs: Mapping[str, Path]) -> str:
    """The format that a training would see in files of these names; of some the content is there, too.

    Raises TrainerError (DATA) for none, or several.
    """
    with tempfile.TemporaryDirectory(prefix="trainyard-") as folder:
        root = Path(folder) / "dataset"
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(configs[name].read_bytes() if name in configs else b"")
        try:
            return find_dataset(root).format.value
        except TrainerError as exc:
            message = exc.message.replace(str(root), "the images with their labels")
            raise TrainerError(message, hint=exc.hint, code=ExitCode.DATA) from exc
