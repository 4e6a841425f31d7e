"""What a finished fit leaves: metrics, evaluation, sample pictures, and last of all the manifest that makes it a result."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from trainer.contract import METRIC_NAMES, AttemptLayout, ManifestFile, ResultManifest, TrainJob
from trainer.files import write_json
from trainer.frameworks import Box, Evaluation
from trainer.progress import finite

if TYPE_CHECKING:
    from trainer.dataset import DatasetIndex, ImageItem

MAX_SAMPLES = 16
GRID_PAIRS = 8
GRID_COLUMNS = 2  # pairs beside each other
TILE = 300  # pixels
MARGIN = 8
HEADER = 30
SAMPLE_SIDE = 640  # pixels; smaller images are enlarged until boxes and names can be read
PAPER, INK, TRUTH = (250, 250, 248), (40, 40, 40), (90, 90, 90)
COLOURS = [(230, 85, 13), (49, 130, 189), (49, 163, 84), (196, 48, 127), (117, 107, 177), (166, 118, 29), (0, 150, 150), (203, 24, 29)]

Predictions = Sequence[tuple["ImageItem", Sequence[Box]]]


def choose_samples(index: DatasetIndex, split: str) -> list[ImageItem]:
    """Up to 16 images of the split, evenly spread over its sorted paths, so that the same data give the same samples."""
    images = sorted((image for image in index.images if image.split == split), key=lambda image: image.path)
    if len(images) <= MAX_SAMPLES:
        return images
    return [images[position * len(images) // MAX_SAMPLES] for position in range(MAX_SAMPLES)]


def write_metrics(layout: AttemptLayout, evaluation: Evaluation, val: dict[str, float], *, best_epoch: int, epochs: int) -> None:
    headline = {name: evaluation.metrics.get(name) for name in METRIC_NAMES}
    document = {"split": evaluation.split, **headline, "best_epoch": best_epoch, "epochs": epochs, "val": val}
    write_json(layout / AttemptLayout.METRICS, finite(document))


def write_evaluation(layout: AttemptLayout, evaluation: Evaluation) -> None:
    """``evaluation.json``: per class figures with precision-recall points at IoU 0.5, the confusion matrix, the thresholds."""
    document: dict[str, Any] = {
        "schema_version": 1,
        "split": evaluation.split,
        "images": evaluation.images,
        "instances": evaluation.instances,
        "metrics": finite(evaluation.metrics),
        "classes": evaluation.classes,
        "confusion_matrix": {"classes": evaluation.confusion_names, "rows": "true", "columns": "predicted", "counts": evaluation.confusion},
        "thresholds": finite(evaluation.thresholds),
    }
    write_json(layout / AttemptLayout.EVALUATION, document)


# --- Pictures --------------------------------------------------------------------------------------


def true_boxes(image: ImageItem, classes: Sequence[str]) -> list[Box]:
    return [
        Box(name=classes[index], left=x - width / 2, top=y - height / 2, right=x + width / 2, bottom=y + height / 2)
        for index, x, y, width, height in image.boxes
    ]


def write_samples(layout: AttemptLayout, predictions: Predictions, *, root: Path, classes: Sequence[str]) -> None:
    """``samples/<n>-<name>.jpg`` with predictions drawn, and ``samples/grid.jpg``: truth beside prediction."""
    folder = layout / AttemptLayout.SAMPLES
    folder.mkdir(parents=True, exist_ok=True)
    for number, (image, boxes) in enumerate(predictions, start=1):
        picture = open_picture(root / image.path)
        scale = max(1.0, SAMPLE_SIDE / max(picture.size))
        picture = picture.resize((round(picture.width * scale), round(picture.height * scale)))
        draw_boxes(picture, boxes, classes).save(folder / f"{number:02d}-{Path(image.path).stem}.jpg", quality=90)
    if predictions:
        draw_grid(predictions, root=root, classes=classes).save(folder / "grid.jpg", quality=90)


def open_picture(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


@lru_cache
def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu, which has most alphabets' letters, from matplotlib where that is installed; else Pillow's own."""
    spec = find_spec("matplotlib")
    path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf" if spec and spec.origin else None
    return ImageFont.truetype(path, size) if path and path.is_file() else ImageFont.load_default(size)


def draw_boxes(picture: Image.Image, boxes: Sequence[Box], classes: Sequence[str]) -> Image.Image:
    """Draws into the picture: one colour per class, name and confidence on a filled label. Returns it."""
    draw = ImageDraw.Draw(picture)
    side = max(picture.size)
    font = load_font(max(11, side // 40))
    for box in sorted(boxes, key=lambda b: b.confidence or 0.0):
        colour = COLOURS[classes.index(box.name) % len(COLOURS)] if box.name in classes else INK
        left, right = sorted((box.left * picture.width, box.right * picture.width))
        top, bottom = sorted((box.top * picture.height, box.bottom * picture.height))
        draw.rectangle((left, top, right, bottom), outline=colour, width=max(2, side // 200))
        text = box.name if box.confidence is None else f"{box.name} {box.confidence:.2f}"
        x0, y0, x1, y1 = draw.textbbox((0, 0), text, font=font)
        width, height = x1 - x0 + 6, y1 - y0 + 6
        x = max(0, min(left, picture.width - width))
        y = top - height if top >= height else top
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + 3 - x0, y + 3 - y0), text, fill="white", font=font)
    return picture


def draw_grid(predictions: Predictions, *, root: Path, classes: Sequence[str]) -> Image.Image:
    """Up to eight images, each as a pair: the truth on the left, the prediction on the right."""
    # Images with something to find say more than empty ones.
    chosen = sorted(predictions, key=lambda item: not item[0].boxes)[:GRID_PAIRS]
    columns = min(GRID_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    pair = 2 * TILE + MARGIN
    size = (columns * pair + (columns + 1) * 3 * MARGIN, HEADER + rows * (TILE + 2 * MARGIN) + MARGIN)
    grid = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(grid)
    font = load_font(16)
    for column in range(columns):
        left = 3 * MARGIN + column * (pair + 3 * MARGIN)
        draw.text((left, MARGIN), "Truth", fill=TRUTH, font=font)
        draw.text((left + TILE + MARGIN, MARGIN), "Prediction", fill=INK, font=font)
    for position, (image, boxes) in enumerate(chosen):
        row, column = divmod(position, columns)
        left = 3 * MARGIN + column * (pair + 3 * MARGIN)
        top = HEADER + MARGIN + row * (TILE + 2 * MARGIN)
        picture = open_picture(root / image.path)
        for offset, shown in ((0, true_boxes(image, classes)), (TILE + MARGIN, boxes)):
            tile = draw_boxes(ImageOps.contain(picture, (TILE, TILE)), shown, classes)
            grid.paste(tile, (left + offset + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
    return grid


# --- The manifest ------------------------------------------------------------------------------------


def list_result_files(layout: AttemptLayout) -> dict[str, ManifestFile]:
    """Every file of the result with its hash: the model folder, the samples, metrics and evaluation."""
    folders = [layout.folder / "model", layout / AttemptLayout.SAMPLES]
    paths = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    paths += [layout / AttemptLayout.METRICS, layout / AttemptLayout.EVALUATION]
    files: dict[str, ManifestFile] = {}
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files[path.relative_to(layout.folder).as_posix()] = ManifestFile(sha256=digest, bytes=path.stat().st_size)
    return files


def build_manifest(
    layout: AttemptLayout, job: TrainJob, evaluation: Evaluation, *, best_epoch: int, epochs: int, versions: dict[str, str]
) -> ResultManifest:
    """The manifest of what lies in the attempt's folder now. The caller writes it, when nothing else remains to be done."""
    config = job.config
    return ResultManifest(
        run_id=job.run_id,
        attempt=job.attempt,
        framework=config.framework,
        task=config.task,
        model=Path(config.weights).name if config.weights else Path(config.model).name,
        dataset_version=job.dataset.version,
        fingerprint=job.fingerprint,
        best_epoch=best_epoch,
        epochs=epochs,
        metrics={name: value for name in METRIC_NAMES if (value := finite(evaluation.metrics.get(name))) is not None},
        metrics_split="test" if evaluation.split == "test" else "val",
        versions=versions,
        files=list_result_files(layout),
    )
