"""Small datasets in the three layouts, drawn for tests."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from trainer.contract import TrainerError
from trainer.dataset import DatasetIndex, ProblemKind, check_dataset

# Blood cells: 364 real photographs with boxes.
BCCD = Path(__file__).resolve().parents[2] / "shared/data/bccd"
needs_bccd = pytest.mark.skipif(not BCCD.is_dir(), reason="the BCCD set is not there; put it below shared/data/bccd beside the checkout")
ROW = "0 0.5 0.5 0.5 0.5\n"
CENTRE = (0.5, 0.5, 0.5, 0.5)


def draw(path: Path, size: tuple[int, int] = (40, 20), shade: int | None = None) -> Path:
    """An image unlike any other of the test, unless the shade is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    value = shade if shade is not None else zlib.crc32(str(path).encode())
    Image.new("RGB", size, (value & 255, value >> 8 & 255, value >> 16 & 255)).save(path)
    return path


def label(path: Path, text: str = ROW) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def yolo(root: Path, pattern: str, splits: Iterable[str] = ("train", "val", "test"), count: int = 2) -> Path:
    """Images and labels of each split; the pattern is images/{split} or {split}/images."""
    for split in splits:
        for number in range(count):
            image = draw(root / pattern.format(split=split) / f"{split} {number}.png")
            label(root / pattern.format(split=split).replace("images", "labels") / f"{image.stem}.txt")
    return root


def config(root: Path, name: str = "data.yaml", **fields: Any) -> Path:
    (root / name).write_text(yaml.safe_dump({"names": ["cell"], **fields}), encoding="utf-8")
    return root / name


def coco(file: Path, names: Sequence[str], *, ids: Sequence[int] = (1,), annotations: list[dict[str, Any]] | None = None) -> Path:
    """A COCO file with a centred box of each category in every 40 x 20 image."""
    images = [{"id": i, "file_name": name, "width": 40, "height": 20} for i, name in enumerate(names)]
    boxes = [{"id": 9, "image_id": i["id"], "category_id": c, "bbox": [10, 5, 20, 10]} for i in images for c in ids]
    categories = [{"id": c, "name": f"class {c}"} for c in reversed(ids)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": boxes + (annotations or []), "categories": categories}))
    return file


def voc_xml(*objects: tuple[str, float, float, float, float], size: tuple[int, int] = (40, 20)) -> str:
    parts = (
        f"<object><name>{name}</name><difficult>1</difficult><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
        "</object>"
        for name, a, b, c, d in objects
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{''.join(parts)}</annotation>"


def voc(root: Path, stems: Iterable[str], **lists: Iterable[str]) -> Path:
    for stem in stems:
        draw(root / "JPEGImages" / f"{stem}.png")
        label(root / "Annotations" / f"{stem}.xml", voc_xml(("dog", 10, 5, 30, 15)))
    for name, entries in lists.items():
        label(root / "ImageSets/Main" / f"{name}.txt", "\n".join(entries))
    return root


def counts(index: DatasetIndex) -> list[int]:
    return [index.count(split) for split in ("train", "val", "test")]


def refused(path: Path, **options: Any) -> TrainerError:
    with pytest.raises(TrainerError) as caught:
        check_dataset(path, **options)
    assert caught.value.hint, "every refusal says what to do next"
    return caught.value


def kinds(index: DatasetIndex) -> list[ProblemKind]:
    return [problem.kind for problem in index.problems]
