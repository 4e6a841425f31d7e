from __future__ import annotations

from pathlib import Path

import pytest

from blocks.label_matching import coco_folders, expected_label, find_format, image_keys, is_label, label_key, labels_prefix
from trainer.contract import TrainerError


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.jpg", "labels/train/a.txt"),
        ("train/images/a.b.JPG", "train/labels/a.b.txt"),
        ("images/x/images/a.png", "images/x/labels/a.txt"),
        ("images/a.png", "Labels/a.txt"),
        ("images/a.png", "images/a.txt"),
        ("train/a.png", "train/a.txt"),
        ("JPEGImages/a.jpg", "Annotations/a.xml"),
        ("VOC2007/JPEGImages/a.jpg", "VOC2007/Annotations/a.xml"),
        ("images/sub/a.jpg", "Annotations/sub/a.xml"),
        ("a.jpg", "Annotations/a.xml"),
        ("train/a.jpg", "train/a.xml"),
    ],
)
def test_a_label_is_known_by_where_a_training_looks_for_it(image: str, label: str) -> None:
    assert is_label(label)
    assert label_key(label) in image_keys(image)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("images/train/a.jpg", "train/labels/a.txt"),
        ("images/train/a.jpg", "labels/a.txt"),
        ("images/a.jpg", "labels/b.txt"),
        ("JPEGImages/a.jpg", "labels/a.txt"),
        ("images/a.jpg", "labels/a.xml"),
        ("images/images/a.jpg", "labels/images/a.txt"),
    ],
)
def test_a_label_elsewhere_is_none(image: str, label: str) -> None:
    assert label_key(label) not in image_keys(image)


def test_text_that_is_no_label() -> None:
    assert not any(map(is_label, ["classes.txt", "ImageSets/Main/a.txt", "labels/readme.txt", "data.yaml", "a.jpg"]))


def test_the_place_of_a_label_can_be_told() -> None:
    assert expected_label("images/train/a.jpg", "x/b.txt") == "labels/train/a.txt"
    assert expected_label("a.jpg", "b.txt") == "a.txt"
    assert expected_label("JPEGImages/a.jpg", "b.xml") == "Annotations/a.xml"


def test_the_images_of_a_coco_file_may_lie_below_the_root() -> None:
    folders = coco_folders("annotations/instances_train2017.json")
    assert {"", "images/", "train2017/", "images/train/", "annotations/"} <= set(folders)
    assert "deep/annotations/" in coco_folders("deep/annotations/a.json")
    assert "deep/" in coco_folders("deep/annotations/a.json")


def test_a_folder_of_labels_keeps_its_name_where_it_is_one_half_of_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "labels/train").mkdir(parents=True)
    assert labels_prefix(tmp_path / "labels") == "labels/"
    assert labels_prefix(tmp_path) == ""
    (tmp_path / "labels/labels").mkdir()
    assert labels_prefix(tmp_path / "labels") == ""
    (tmp_path / "Annotations").mkdir()
    (tmp_path / "Annotations/data.yaml").touch()
    assert labels_prefix(tmp_path / "Annotations") == ""


def test_a_few_names_tell_the_format(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("train: images\nnames: [a]\n")
    assert find_format(["images/a.jpg", "labels/a.txt"], {}) == "yolo"
    assert find_format(["a.jpg", "a.txt", "own.yaml"], {"own.yaml": tmp_path / "own.yaml"}) == "yolo"
    assert find_format(["a.jpg", "annotations/a.json"], {}) == "coco"
    assert find_format(["a.jpg", "Annotations/a.xml"], {}) == "pascal-voc"
    with pytest.raises(TrainerError, match="no dataset found in the images with their labels"):
        find_format(["a.jpg", "a.txt"], {})
