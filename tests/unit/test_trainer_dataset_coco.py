"""COCO files in the variations that real exports come in, and the ways in which they are broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.datasets import CENTRE, coco, counts, draw, kinds, label, refused
from trainer.dataset import DatasetFormat, ProblemKind, check_dataset


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 3), (3, 17, 90)])
def test_coco_category_ids(tmp_path: Path, ids: tuple[int, ...]) -> None:
    names = [draw(tmp_path / "images" / f"{n}.png").name for n in range(10)]
    coco(tmp_path / "annotations/instances_default.json", names, ids=ids)
    index = check_dataset(tmp_path)
    assert (index.format, index.classes) == (DatasetFormat.COCO, tuple(f"class {i}" for i in ids))
    assert all([box[0] for box in image.boxes] == [0, 1, 2] for image in index.images)
    assert all(box[1:] == CENTRE for image in index.images for box in image.boxes)


def test_coco_split_files(tmp_path: Path) -> None:
    for split, folder in (("train2017", "train2017"), ("val2017", "images/val2017")):
        names = [draw(tmp_path / folder / f"{n}.png").name for n in range(4)]
        coco(tmp_path / f"annotations/instances_{split}.json", names)
    (tmp_path / "annotations/captions_train2017.json").write_text("{}")
    index = check_dataset(tmp_path)
    assert [index.count("train") + index.count("test"), index.count("val")] == [4, 4]
    assert index.split_sources == {"train": "given", "val": "given", "test": "made"}


def test_coco_beside_images_in_split_folders(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        names = [draw(tmp_path / split / f"{split}{n}.jpg").name for n in range(2)]
        coco(tmp_path / split / "_annotations.coco.json", names)
    assert counts(check_dataset(tmp_path)) == [2, 2, 2]


def test_coco_file_given(tmp_path: Path) -> None:
    names = [draw(tmp_path / "images/val" / f"{n}.png").name for n in range(10)]
    index = check_dataset(coco(tmp_path / "annotations/instances_val.json", names))
    assert index.root == str(tmp_path)
    assert counts(index) == [8, 1, 1], "a single file is the whole set"


def test_coco_crowds_missing_and_broken(tmp_path: Path) -> None:
    names = [draw(tmp_path / f"{n}.png").name for n in range(10)]
    draw(tmp_path / "unlisted.png")
    extra = [
        {"id": 50, "image_id": 0, "category_id": 1, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"id": 51, "image_id": 1, "category_id": 1, "bbox": [0, 0, 5]},
        {"id": 52, "image_id": 1, "category_id": 7, "bbox": [0, 0, 5, 5]},
        {"id": 53, "image_id": 1, "category_id": 1, "bbox": [5, 5, 0, 5]},
        {"id": 54, "image_id": 1, "category_id": 1, "bbox": [30, 5, 20, 5]},
        {"id": 55, "image_id": 99, "category_id": 1, "bbox": [0, 0, 5, 5]},
        {"id": 56, "image_id": 2, "category_id": 1, "bbox": [-0.5, 0, 41, 20]},
    ]
    coco(tmp_path / "annotations.json", [*names, "gone.png"], annotations=extra)
    index = check_dataset(tmp_path, max_problem_share=0.5)
    found = {
        (p.path, p.kind.value, *(n for n in ("51", "52", "53", "54", "55") if f"annotation {n} " in p.message)) for p in index.problems
    }
    assert found == {
        ("1.png", "malformed-label", "51"),
        ("1.png", "unknown-class", "52"),
        ("1.png", "degenerate-box", "53"),
        ("1.png", "out-of-range-box", "54"),
        ("annotations.json", "malformed-label", "55"),
        ("gone.png", "missing-image"),
    }
    assert index.left_out == 1
    assert len(index.images) == 10
    assert (0, 0.5, 0.5, 1.0, 1.0) in index.images[2].boxes, "half a pixel of overshoot is clipped"
    assert any("1 crowd" in note for note in index.notes)
    assert any("1 images in the folders" in note for note in index.notes)


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/secret.png", "..\\secret.png"])
def test_coco_image_outside_is_refused(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "secret.png")
    coco(tmp_path / "set/annotations.json", [name])
    assert "outside the dataset" in refused(tmp_path / "set").message


def test_coco_very_long_name_is_only_missing(tmp_path: Path) -> None:
    coco(tmp_path / "annotations.json", ["x" * 5000 + ".png"])
    assert "missing-image" in refused(tmp_path).message


@pytest.mark.parametrize("text", ["", "[]", "{", '{"images": []}', '{"images": 1, "annotations": [], "categories": []}', "[" * 5000])
def test_coco_that_is_none(tmp_path: Path, text: str) -> None:
    label(tmp_path / "annotations.json", text)
    assert "annotations.json is not a COCO annotation file" in refused(tmp_path).message


def test_coco_files_that_disagree(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    coco(tmp_path / "train.json", ["a.png"])
    other = coco(tmp_path / "val.json", ["a.png"])
    other.write_text(other.read_text().replace("class 1", "cat"))
    assert "two names" in refused(tmp_path).message


def test_coco_size_that_does_not_match(tmp_path: Path) -> None:
    names = [draw(tmp_path / f"{n}.png").name for n in range(10)]
    draw(tmp_path / "3.png", (80, 40))
    coco(tmp_path / "annotations.json", names)
    index = check_dataset(tmp_path, max_problem_share=0.1)
    assert kinds(index) == [ProblemKind.SIZE_MISMATCH]
    assert "40 x 20" in index.problems[0].message
    assert index.left_out == 1
