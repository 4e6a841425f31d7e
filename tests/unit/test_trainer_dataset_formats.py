"""Which of the three layouts a folder has, and what is said where none or several fit."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.datasets import coco, config, counts, draw, label, refused, yolo
from trainer.contract import ExitCode
from trainer.dataset import check_dataset


def test_missing_path(tmp_path: Path) -> None:
    error = refused(tmp_path / "gone")
    assert error.code == ExitCode.NOT_FOUND
    assert "gone" in error.message


def test_nothing_there_says_what_was_looked_for(tmp_path: Path) -> None:
    assert "it holds nothing" in refused(tmp_path).message
    draw(tmp_path / "pictures/a.png")
    label(tmp_path / "notes.md", "text")
    error = refused(tmp_path)
    assert "notes.md, pictures/" in error.message
    assert "data.yaml" in error.hint
    assert "Annotations/*.xml" in error.hint
    assert error.code == ExitCode.DATA


def test_two_formats_are_ambiguous(tmp_path: Path) -> None:
    config(yolo(tmp_path, "images/{split}"), train="images/train", val="images/val", test="images/test")
    coco(tmp_path / "annotations/instances_train.json", ["a.png"])
    error = refused(tmp_path)
    assert "yolo (data.yaml)" in error.message
    assert "coco (instances_train.json)" in error.message
    assert counts(check_dataset(tmp_path / "data.yaml")) == [2, 2, 2]


def test_one_nested_folder(tmp_path: Path) -> None:
    config(yolo(tmp_path / "cells v1" / "export", "images/{split}"), train="images/train", val="images/val")
    (tmp_path / "cells v1" / "__MACOSX" / "images").mkdir(parents=True)
    label(tmp_path / "cells v1" / "README.md", "text")
    index = check_dataset(tmp_path / "cells v1")
    assert index.name == "cells v1"
    assert index.root.endswith("export")


def test_other_files_are_no_dataset(tmp_path: Path) -> None:
    label(tmp_path / "set.zip", "PK")
    assert "neither" in refused(tmp_path / "set.zip").message


def test_hidden_files_and_links_in_circles(tmp_path: Path) -> None:
    config(yolo(tmp_path, "images/{split}"), train="images/train", val="images/val", test="images/test")
    label(tmp_path / "images/train/._train 0.png", "resource fork")
    label(tmp_path / "images/train/__MACOSX/x.png", "resource fork")
    (tmp_path / "images/train/again").symlink_to(tmp_path / "images/train")
    index = check_dataset(tmp_path)
    assert counts(index) == [2, 2, 2]
    assert index.problems == ()


def test_name_that_is_not_utf8(tmp_path: Path) -> None:
    config(yolo(tmp_path, "images/{split}"), train="images/train", val="images/val")
    try:
        draw(tmp_path / "a.png").rename(tmp_path / "images/train" / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert "not UTF-8" in refused(tmp_path).message
