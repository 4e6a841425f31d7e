"""Check a detection dataset, fix its splits and version in an index, and write the folders that Ultralytics reads.

Needs Pillow only, so that the launcher can check a dataset before anything costs money. The user's files are never written to.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import yaml
from pydantic import BaseModel, ConfigDict

from trainer.contract import ExitCode, SplitConfig, StoredRecord, Task, TrainerError
from trainer.dataset_formats import find_dataset, read_found
from trainer.dataset_images import Decoded, decode_image
from trainer.dataset_raw import (
    IMAGE_SUFFIXES,
    SPLITS,
    DatasetFormat,
    LabelFile,
    ProblemKind,
    RawBox,
    RawDataset,
    RawImage,
    Split,
    data_error,
)
from trainer.dataset_splits import SplitSource, assign_splits
from trainer.locations import expand_home

__all__ = [
    "DatasetFormat",
    "DatasetIndex",
    "DatasetProblem",
    "ImageItem",
    "LabelFile",
    "ProblemKind",
    "Split",
    "added_files",
    "changed_files",
    "check_dataset",
    "write_yolo_layout",
]

Box = tuple[int, float, float, float, float]
DEFAULT_SPLIT = SplitConfig.model_validate({})
SLACK = 0.01  # share of the side by which a box may overshoot, as Ultralytics allows; at least one pixel, VOC being 1-based
MIN_AREA = 1e-6  # share of the image
_LAYOUT_MARK = "# Written by Trainyard."


class ImageItem(BaseModel):
    """A usable image. ``width`` and ``height`` are pixels as displayed, EXIF rotation applied, which is how Ultralytics loads it."""

    model_config = ConfigDict(frozen=True)
    path: str  # POSIX, relative to the root
    split: Split
    width: int
    height: int
    bytes: int
    mtime_ns: int
    sha256: str
    boxes: tuple[Box, ...]  # class index, centre x, centre y, width, height; each 0 to 1 of the image


class DatasetProblem(BaseModel):
    """What is wrong with one image; ``path`` is the image, or the COCO file where no image is meant."""

    model_config = ConfigDict(frozen=True)
    path: str
    kind: ProblemKind
    message: str


class DatasetIndex(StoredRecord):
    """Every image and box of a checked dataset. The same files give the same index, on any machine."""

    name: str
    root: str
    format: DatasetFormat
    task: Task
    classes: tuple[str, ...]
    images: tuple[ImageItem, ...]
    label_files: tuple[LabelFile, ...]
    problems: tuple[DatasetProblem, ...] = ()
    left_out: int = 0
    version: str
    split_sources: dict[str, SplitSource]
    notes: tuple[str, ...] = ()

    def count(self, split: str) -> int:
        """Images in a split."""
        return sum(image.split == split for image in self.images)

    def box_counts(self, split: str) -> list[int]:
        """Boxes of each class in a split."""
        counts = Counter(box[0] for image in self.images if image.split == split for box in image.boxes)
        return [counts[index] for index in range(len(self.classes))]


def check_dataset(
    path: Path,
    *,
    task: Task = Task.OBJECT_DETECTION,
    split: SplitConfig = DEFAULT_SPLIT,
    max_problem_share: float = 0.05,
    on_progress: Callable[[int, int], None] | None = None,
) -> DatasetIndex:
    """Read a dataset (a folder, a ``data.yaml`` or a COCO ``.json``), decode every image and judge every box.

    ``on_progress`` is told the images done and the images in all. Raises TrainerError: NOT_FOUND for a missing path,
    CONFIG for a request that cannot be met, DATA where more than ``max_problem_share`` of the images have problems or
    too little is left to train on.
    """
    if task is not Task.OBJECT_DETECTION:
        raise TrainerError(f"the task {task} is not supported yet", hint=f"Use {Task.OBJECT_DETECTION}.", code=ExitCode.CONFIG)
    source = _absolute(path)
    raw = read_found(find_dataset(source))
    root = _common_root(raw)
    listed = _drop_repeats(raw)
    usable = _decode_all(raw, listed, root, on_progress)
    problems = _describe_problems(raw, root)
    label_files = tuple(sorted((_below(root, f) for f in raw.label_files.values()), key=lambda f: f.path))
    left_out = len({p.path for p in problems} - {i.path for i in usable} - {f.path for f in label_files})
    _refuse_problems(problems, len(usable) + left_out, max_problem_share, source)
    given: dict[str, Split | None] = {_relative(image.path, root): image.split for image in listed}
    splits, sources = assign_splits({i.path: i.sha256 for i in usable}, given, split, raw.notes)
    images = tuple(image.model_copy(update={"split": splits[image.path]}) for image in usable)
    index = DatasetIndex(
        name=(source.name if source.is_dir() else raw.base.name) or "dataset",
        root=str(root),
        format=raw.format,
        task=task,
        classes=raw.classes,
        images=images,
        label_files=label_files,
        problems=(*problems, *_shared_images(images)),
        left_out=left_out,
        version=dataset_version((f.path, f.sha256) for f in (*images, *label_files)),
        split_sources=sources,
    )
    _refuse_too_little(index)
    return index.model_copy(update={"notes": (*raw.notes, *_notes_on(index))})


def dataset_version(files: Iterable[tuple[str, str]]) -> str:
    """sha256 over the sorted paths and hashes of all files used."""
    return hashlib.sha256("".join(f"{path}\0{digest}\n" for path, digest in sorted(files)).encode()).hexdigest()


# --- Images and boxes ----------------------------------------------------------------------------


def _decode_all(raw: RawDataset, listed: list[RawImage], root: Path, on_progress: Callable[[int, int], None] | None) -> list[ImageItem]:
    items: list[ImageItem] = []
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        for done, (image, decoded) in enumerate(zip(listed, pool.map(decode_image, [i.path for i in listed]), strict=True), 1):
            if isinstance(decoded, str):
                raw.add_problem(image.path, ProblemKind.UNREADABLE_IMAGE, decoded)
            elif image.size and image.size != (decoded.width, decoded.height):
                stated, real = (f"{w} x {h}" for w, h in (image.size, decoded[:2]))
                message = f"{raw.show(image.label)} is for {stated} pixels, but the image is displayed with {real}"
                raw.add_problem(image.path, ProblemKind.SIZE_MISMATCH, message)
            else:
                boxes = tuple(box for b in image.boxes if (box := _judge_box(raw, image, b, decoded)))
                items.append(ImageItem(path=_relative(image.path, root), split="train", boxes=boxes, **decoded._asdict()))
            if on_progress:
                on_progress(done, len(listed))
    return sorted(items, key=lambda item: item.path)


_BOX_TERMS: dict[DatasetFormat, tuple[str, tuple[str, ...]]] = {
    DatasetFormat.YOLO: ("row", ("x", "y", "width", "height")),
    DatasetFormat.COCO: ("annotation", ("x", "y", "width", "height")),
    DatasetFormat.VOC: ("object", ("xmin", "ymin", "xmax", "ymax")),
}


def box_edges(kind: DatasetFormat, values: tuple[float, float, float, float], width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom as shares of the image, which is ``width`` x ``height`` pixels."""
    a, b, c, d = values
    if kind is DatasetFormat.YOLO:
        return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    right, bottom = (a + c, b + d) if kind is DatasetFormat.COCO else (c, d)
    return a / width, b / height, right / width, bottom / height


def _judge_box(raw: RawDataset, image: RawImage, box: RawBox, size: Decoded) -> Box | None:
    """The box clipped to the image; None, and a problem, where it has no area or lies outside."""
    left, top, right, bottom = box_edges(raw.format, box.values, size.width, size.height)
    unit, terms = _BOX_TERMS[raw.format]
    values = ", ".join(f"{term} {value:g}" for term, value in zip(terms, box.values, strict=True))
    where = f"{raw.show(image.label)} {unit} {box.number} ({raw.classes[box.class_index]}: {values})"
    slack_x, slack_y = max(SLACK, 1 / size.width) + 1e-9, max(SLACK, 1 / size.height) + 1e-9
    outside = min(left + slack_x, top + slack_y, 1 + slack_x - right, 1 + slack_y - bottom) < 0
    ordered = left < right and top < bottom
    left, top, right, bottom = (min(1.0, max(0.0, edge)) for edge in (left, top, right, bottom))
    # In a very large image a real object may be below the least share, but then it has more than a pixel.
    area = (right - left) * (bottom - top)
    if not ordered or (not outside and (area <= 0 or (area < MIN_AREA and area * size.width * size.height < 1))):
        raw.add_problem(image.path, ProblemKind.DEGENERATE_BOX, f"{where} has no area")
        return None
    if outside:
        raw.add_problem(image.path, ProblemKind.OUT_OF_RANGE_BOX, f"{where} reaches outside the image, {size.width} x {size.height} pixels")
        return None
    centre = ((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
    x, y, width, height = (round(value, 9) for value in centre)
    return box.class_index, x, y, width, height


def _absolute(path: Path) -> Path:
    """Absolute, but with links as they are: the path that the user knows."""
    return Path(os.path.normpath(expand_home(path).absolute()))


def _common_root(raw: RawDataset) -> Path:
    """The dataset's folder; or, where a data.yaml points elsewhere, the nearest folder that holds all its files."""
    files = {*raw.label_files, *(image.path for image in raw.images)}
    if all(file.is_relative_to(raw.base) for file in files):
        return raw.base
    return Path(os.path.commonpath([raw.base, *files]))


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _below(root: Path, file: LabelFile) -> LabelFile:
    return file.model_copy(update={"path": _relative(Path(file.path), root)})


def _drop_repeats(raw: RawDataset) -> list[RawImage]:
    """Each image once, in the first of train, val, test that lists it: some sets name their train folder as val, too."""
    rank: dict[Split | None, int] = {**{split: i for i, split in enumerate(SPLITS)}, None: len(SPLITS)}
    kept: dict[Path, RawImage] = {}
    moved: Counter[str] = Counter()
    for image in sorted(raw.images, key=lambda i: (rank[i.split], i.path)):
        first = kept.setdefault(image.path, image)
        if first is not image and first.split == image.split:
            raw.add_problem(image.path, ProblemKind.MALFORMED_LABEL, f"{raw.show(image.label)} lists it twice; the first entry was used")
        elif first is not image:
            raw.add_problem(image.path, ProblemKind.DUPLICATE_IMAGE, f"it is listed in {first.split} and {image.split or 'no split'}")
            moved[f"{first.split} and {image.split or 'no split'}"] += 1
    raw.notes += [f"{count} images are listed in {pair}; they were kept in the first only." for pair, count in moved.items()]
    return list(kept.values())


def _describe_problems(raw: RawDataset, root: Path) -> tuple[DatasetProblem, ...]:
    found = [DatasetProblem(path=_relative(path, root), kind=kind, message=message) for path, kind, message in raw.problems]
    return tuple(sorted(found, key=lambda problem: problem.path))


def _shared_images(images: tuple[ImageItem, ...]) -> list[DatasetProblem]:
    """Images whose very bytes lie in another split, too: figures on that split are then too good."""
    first: dict[str, ImageItem] = {}
    problems: list[DatasetProblem] = []
    for image in sorted(images, key=lambda i: SPLITS.index(i.split)):
        other = first.setdefault(image.sha256, image)
        if other.split != image.split:
            message = f"it is in {image.split}, and the same image is in {other.split} as {other.path}"
            problems.append(DatasetProblem(path=image.path, kind=ProblemKind.DUPLICATE_IMAGE, message=message))
    return problems


# --- What is refused, what is noted --------------------------------------------------------------


def _refuse_problems(problems: tuple[DatasetProblem, ...], total: int, limit: float, source: Path) -> None:
    if not total:
        raise data_error(f"{source} holds no images", f"Add images ({' '.join(s[1:] for s in IMAGE_SUFFIXES)}) and their labels.")
    serious = [problem for problem in problems if problem.kind is not ProblemKind.DUPLICATE_IMAGE]
    affected = len({problem.path for problem in serious})
    if affected <= limit * total:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(problem.kind for problem in serious).items()))
    first = "; ".join(f"{problem.path}: {problem.message}" for problem in serious[:5])
    message = f"{affected} of {total} images ({affected / total:.1%}) have problems, more than {limit:.1%} ({kinds}). First: {first}"
    raise data_error(message, "Mend or remove them, or raise the limit (--max-problem-share); what is broken is then left out.")


def _refuse_too_little(index: DatasetIndex) -> None:
    for split in ("train", "val"):
        if not index.count(split):
            raise data_error(f"the {split} split of {index.root} has no usable image", f"Give at least one labelled image in {split}.")
    if not sum(index.box_counts("train")):
        raise data_error(f"no image in the train split of {index.root} has a box", "Check that the labels lie where the format wants them.")


def _notes_on(index: DatasetIndex) -> list[str]:
    counts = {split: index.box_counts(split) for split in index.split_sources}
    empty = [name for i, name in enumerate(index.classes) if not counts["train"][i]]
    notes = [f"No box of {', '.join(empty[:10])}{' and others' * (len(empty) > 10)} in train."] if empty else []
    notes += [f"The {split} split has no box at all." for split, boxes in counts.items() if not sum(boxes)]
    shared = sum(problem.kind is ProblemKind.DUPLICATE_IMAGE and problem.message.startswith("it is in ") for problem in index.problems)
    return notes + ([f"{shared} images lie in more than one split with the same bytes; figures may be too good."] if shared else [])


# --- Afterwards: did it change, and Ultralytics' layout -------------------------------------------


def changed_files(index: DatasetIndex, root: Path) -> list[str]:
    """Paths that are gone or hold other bytes than the index says. Only files with another size or time are read."""
    return [file.path for file in (*index.images, *index.label_files) if _has_changed(file, root / file.path)]


def added_files(index: DatasetIndex, source: Path) -> list[str]:
    """Paths that a check of `source` would read today and the index does not know. Labels are read, images are not decoded."""
    raw, root = read_found(find_dataset(_absolute(source))), _absolute(Path(index.root))
    files = {*(image.path for image in raw.images), *raw.label_files, *(path for path, _, _ in raw.problems)}
    listed = {_relative(file, root) for file in files}
    return sorted(listed - {item.path for item in (*index.images, *index.label_files, *index.problems)})


def _has_changed(file: ImageItem | LabelFile, path: Path) -> bool:
    try:
        stat = path.stat()
        if stat.st_size != file.bytes:
            return True
        return stat.st_mtime_ns != file.mtime_ns and hashlib.sha256(path.read_bytes()).hexdigest() != file.sha256
    except OSError:
        return True


def write_yolo_layout(index: DatasetIndex, root: Path, folder: Path) -> Path:
    """Write ``images/<split>``, ``labels/<split>`` and ``data.yaml`` below ``folder``, all or nothing; returns the ``data.yaml``.

    Images are links to the originals below ``root``. A JPEG that does not end as one should is copied, because
    Ultralytics saves such files anew in place. An earlier layout is replaced. Raises TrainerError: CONFIG where the
    folder holds anything else, DATA where an image is gone.
    """
    root, folder = _absolute(root), _absolute(folder)
    config = folder / "data.yaml"
    is_ours = config.is_file() and config.read_bytes().startswith(_LAYOUT_MARK.encode())
    if folder == root or (folder.exists() and not is_ours and (not folder.is_dir() or any(folder.iterdir()))):
        raise TrainerError(f"{folder} exists and is no layout of Trainyard", hint="Use another folder, or empty it.", code=ExitCode.CONFIG)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for image in index.images:
        _write_pair(image, root, partial)
    splits = {split: f"images/{split}" for split in SPLITS if index.count(split)}
    document = {"path": str(folder), **splits, "names": dict(enumerate(index.classes))}
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (partial / "data.yaml").write_text(f"{_LAYOUT_MARK}\n{text}", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return config


def _write_pair(image: ImageItem, root: Path, folder: Path) -> None:
    # The path's hash keeps names unique across sub-folders; the plain letters keep them readable in Ultralytics' plots.
    path = PurePosixPath(image.path)
    stem = f"{re.sub(r'[^A-Za-z0-9_-]+', '_', path.stem)[:60]}-{hashlib.sha256(image.path.encode()).hexdigest()[:8]}"
    target, label = folder / "images" / image.split / f"{stem}{path.suffix.lower()}", folder / "labels" / image.split / f"{stem}.txt"
    for parent in (target.parent, label.parent):
        parent.mkdir(parents=True, exist_ok=True)
    original = root / image.path
    try:
        if _is_rewritten(original):
            shutil.copyfile(original, target)
        else:
            target.symlink_to(original)
    except OSError as exc:
        message = f"{image.path} cannot be used from {root}: {exc.strerror}"
        raise data_error(message, "The dataset changed after it was checked; check it again.") from exc
    rows = (f"{index} {x:.9g} {y:.9g} {width:.9g} {height:.9g}\n" for index, x, y, width, height in image.boxes)
    label.write_text("".join(rows), encoding="utf-8")


def _is_rewritten(path: Path) -> bool:
    """Whether Ultralytics would save this file anew: a JPEG whose last two bytes are not its end marker."""
    with path.open("rb") as file:
        if file.read(2) != b"\xff\xd8":
            return False
        file.seek(-2, os.SEEK_END)
        return file.read(2) != b"\xff\xd9"
