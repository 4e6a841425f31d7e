"""Draw the demo dataset: circles, squares and triangles on noise, in the YOLO layout, so that a first run needs no download."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from trainer.contract import ExitCode, TrainerError

CLASSES = ("circle", "square", "triangle")
MIN_SIZE = 32  # pixels; in a smaller image three shapes find no room
_TRIES = 20  # places tried for a shape before it is left out

Rng = np.random.Generator
Edges = tuple[int, int, int, int]


def write_shapes(folder: Path, *, train: int = 384, val: int = 64, test: int = 64, size: int = 96, seed: int = 0) -> Path:
    """Write a dataset of ``size`` x ``size`` pixel images with 1 to 3 shapes each; returns ``folder``.

    Returns at once where the folder holds the same request already. It is drawn beside the folder and renamed, so a cut
    leaves nothing half-made. Raises TrainerError (CONFIG) where the folder holds anything else, or the request is impossible.
    """
    counts = {"train": train, "val": val, "test": test}
    if size < MIN_SIZE or min(train, val) < 1 or test < 0 or seed < 0:
        message = f"cannot draw shapes with train={train}, val={val}, test={test}, size={size}, seed={seed}"
        raise TrainerError(message, hint=f"Use train and val >= 1, test and seed >= 0, size >= {MIN_SIZE}.", code=ExitCode.CONFIG)
    description = _describe(counts, size, seed)
    if _is_complete(folder, description):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place:
        drawn = Path(place) / "drawn"
        for number, (split, count) in enumerate(counts.items()):
            # A generator of its own for each split: more training images leave the other splits as they are.
            _write_split(drawn, split, count, size, np.random.default_rng([seed, number]))
        (drawn / "data.yaml").write_text(description, encoding="utf-8")
        shutil.copymode(folder.parent, drawn)
        try:
            drawn.rename(folder)
        except OSError:  # someone else finished first, or it holds other things
            if not _is_complete(folder, description):
                message = f"{folder} exists and does not hold these shapes"
                raise TrainerError(message, hint="Use another folder, or remove it.", code=ExitCode.CONFIG) from None
    return folder


def _describe(counts: dict[str, int], size: int, seed: int) -> str:
    document = {**{split: f"images/{split}" for split, count in counts.items() if count}, "names": list(CLASSES)}
    request = " ".join(f"{key}={value}" for key, value in {**counts, "size": size, "seed": seed}.items())
    return f"# Shapes drawn by Trainyard: {request}\n{yaml.safe_dump(document, sort_keys=False)}"


def _is_complete(folder: Path, description: str) -> bool:
    try:
        return (folder / "data.yaml").read_text(encoding="utf-8") == description
    except OSError:
        return False


def _write_split(folder: Path, split: str, count: int, size: int, rng: Rng) -> None:
    images, labels = folder / "images" / split, folder / "labels" / split
    if count:
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
    for number in range(count):
        image, rows = _draw_image(size, rng)
        image.save(images / f"shapes_{number:05}.jpg", quality=92)
        (labels / f"shapes_{number:05}.txt").write_text("".join(rows), encoding="utf-8")


def _draw_image(size: int, rng: Rng) -> tuple[Image.Image, list[str]]:
    image = Image.fromarray(rng.integers(0, 120, (size, size, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    taken: list[Edges] = []
    rows: list[str] = []
    for _ in range(int(rng.integers(1, 4))):
        edges = _choose_place(size, taken, rng)
        if edges is None:
            continue
        kind = int(rng.integers(len(CLASSES)))
        red, green, blue = (int(value) for value in rng.integers(100, 256, 3))
        _draw_shape(draw, kind, edges, (red, green, blue))
        taken.append(edges)
        rows.append(_label_row(kind, edges, size))
    return image, rows


def _choose_place(size: int, taken: list[Edges], rng: Rng) -> Edges | None:
    """Edges in pixels, both inclusive, of a square that touches no other: hidden shapes would be labelled but not visible."""
    for _ in range(_TRIES):
        side = int(rng.integers(size // 6, size * 2 // 5))
        left, top = (int(value) for value in rng.integers(0, size - side, 2))
        edges = (left, top, left + side - 1, top + side - 1)
        if all(edges[2] < o[0] or o[2] < edges[0] or edges[3] < o[1] or o[3] < edges[1] for o in taken):
            return edges
    return None


def _draw_shape(draw: ImageDraw.ImageDraw, kind: int, edges: Edges, colour: tuple[int, int, int]) -> None:
    left, top, right, bottom = edges
    if CLASSES[kind] == "circle":
        draw.ellipse(edges, fill=colour)
    elif CLASSES[kind] == "square":
        draw.rectangle(edges, fill=colour)
    else:
        draw.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=colour)


def _label_row(kind: int, edges: Edges, size: int) -> str:
    left, top, right, bottom = edges[0], edges[1], edges[2] + 1, edges[3] + 1
    x, y, width, height = ((left + right) / 2 / size, (top + bottom) / 2 / size, (right - left) / size, (bottom - top) / size)
    return f"{kind} {x:.6f} {y:.6f} {width:.6f} {height:.6f}\n"
