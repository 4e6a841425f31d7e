"""The YOLO layout in the variations that real exports come in, and the ways in which it is broken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.datasets import CENTRE, ROW, config, counts, draw, kinds, label, refused, yolo
from trainer.contract import ExitCode
from trainer.dataset import DatasetFormat, ProblemKind, check_dataset


@pytest.mark.parametrize("pattern", ["images/{split}", "{split}/images"])
@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_yolo_folders(tmp_path: Path, pattern: str, val: str) -> None:
    yolo(tmp_path, pattern, ("train", val, "test"))
    config(tmp_path, train=pattern.format(split="train"), val=pattern.format(split=val), test=pattern.format(split="test"))
    index = check_dataset(tmp_path)
    assert (index.format, index.classes, counts(index)) == (DatasetFormat.YOLO, ("cell",), [2, 2, 2])
    assert index.problems == ()
    assert index.notes == ()
    assert set(index.split_sources.values()) == {"given"}
    assert all(image.boxes == ((0, *CENTRE),) for image in index.images)
    assert check_dataset(tmp_path / "data.yaml") == index.model_copy(update={"name": tmp_path.name})


def test_yolo_without_yaml_takes_classes_txt(tmp_path: Path) -> None:
    yolo(tmp_path, "{split}/images")
    label(tmp_path / "classes.txt", "cell\nother\n")
    index = check_dataset(tmp_path)
    assert (index.classes, counts(index)) == (("cell", "other"), [2, 2, 2])
    assert "classes.txt" in [f.path for f in index.label_files]


def test_yolo_without_any_class_names(tmp_path: Path) -> None:
    assert "no class names" in refused(yolo(tmp_path, "images/{split}")).message


def test_yolo_flat_images(tmp_path: Path) -> None:
    for number in range(20):
        draw(tmp_path / f"images/{number}.PNG")
        label(tmp_path / f"labels/{number}.txt")
    label(tmp_path / "classes.txt", "cell")
    assert counts(check_dataset(tmp_path)) == [16, 2, 2]


def test_yolo_labels_beside_images(tmp_path: Path) -> None:
    for split in ("train", "val"):
        label(draw(tmp_path / split / "a.b.jpg").with_suffix(".txt"))
    config(tmp_path, train="train", val="val", names={0: "cell"})
    assert counts(check_dataset(tmp_path)) == [1, 1, 0]


@pytest.mark.parametrize("names", [["a", "b"], {0: "a", 1: "b"}, {"1": "b", "0": "a"}])
def test_yolo_names(tmp_path: Path, names: Any) -> None:
    config(yolo(tmp_path, "images/{split}"), train="images/train", val="images/val", names=names, nc=2)
    assert check_dataset(tmp_path).classes == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"names": {1: "a", 2: "b"}}, "without gaps"),
        ({"names": []}, "names no classes"),
        ({"names": [["a"]]}, "not text"),
        ({"nc": 2}, "nc: 2"),
        ({"train": "images/nowhere"}, "images/nowhere"),
        ({"train": 7}, "neither a path"),
        ({"kpt_shape": [17, 3]}, "keypoints"),
    ],
)
def test_yolo_broken_config(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    config(yolo(tmp_path, "images/{split}"), **{"train": "images/train", "val": "images/val", **fields})
    error = refused(tmp_path)
    assert message in error.message
    assert error.code == ExitCode.DATA


@pytest.mark.parametrize("text", ["names: [a\n", "just text", "[1, 2]", ""])
def test_yolo_yaml_that_is_none(tmp_path: Path, text: str) -> None:
    label(yolo(tmp_path, "images/{split}") / "data.yaml", text)
    assert "data.yaml" in refused(tmp_path).message


def test_yolo_path_key(tmp_path: Path) -> None:
    yolo(tmp_path / "sets" / "cells", "images/{split}")
    absolute = config(tmp_path, "absolute.yaml", path=str(tmp_path / "sets/cells"), train="images/train", val="images/val")
    relative = config(tmp_path, "relative.yaml", path="sets/cells", train="images/train", val="images/val")
    assert counts(check_dataset(absolute)) == counts(check_dataset(relative)) == [2, 2, 0]
    elsewhere = tmp_path / "configs"
    elsewhere.mkdir()
    index = check_dataset(config(elsewhere, path=str(tmp_path / "sets/cells"), train="images/train", val="images/val"))
    assert index.root == str(tmp_path)
    assert all(".." not in f.path for f in (*index.images, *index.label_files))


def test_yolo_path_of_another_machine(tmp_path: Path) -> None:
    config(
        yolo(tmp_path, "{split}/images", count=4),
        path="/content/nowhere",
        train="../train/images",
        val="../val/images",
        test="../none/images",
    )
    index = check_dataset(tmp_path)
    assert index.count("val") == 4
    assert index.split_sources["test"] == "made"
    assert any("/content/nowhere" in note for note in index.notes)
    assert any("none/images" in note for note in index.notes)


def test_yolo_lists_of_images(tmp_path: Path) -> None:
    yolo(tmp_path, "images/{split}", count=30)
    for split in ("train", "val", "test"):
        names = [f"./images/{split}/{split} {n}.png" for n in range(30)] + (["./images/gone.png"] if split == "train" else [])
        label(tmp_path / f"{split}.txt", "\ufeff" + "\n".join(names) + "\n\n")
    config(tmp_path, train=["train.txt"], val="val.txt", test="test.txt")
    index = check_dataset(tmp_path)
    assert counts(index) == [30, 30, 30]
    assert index.left_out == 1
    assert [(p.path, p.kind) for p in index.problems] == [("images/gone.png", ProblemKind.MISSING_IMAGE)]
    assert {"train.txt", "val.txt", "test.txt", "data.yaml"} <= {f.path for f in index.label_files}


def test_yolo_same_folder_for_train_and_val(tmp_path: Path) -> None:
    config(yolo(tmp_path, "images/{split}", ("train",), count=20), train="images/train", val="images/train")
    index = check_dataset(tmp_path)
    assert counts(index) == [16, 2, 2]
    assert index.split_sources["val"] == "made"
    assert set(kinds(index)) == {ProblemKind.DUPLICATE_IMAGE}
    assert any("first only" in note for note in index.notes)


def test_yolo_empty_label_is_background_and_missing_is_a_problem(tmp_path: Path) -> None:
    config(yolo(tmp_path, "images/{split}"), train="images/train", val="images/val", test="images/test")
    label(tmp_path / "labels/train/train 0.txt", "\n")
    (tmp_path / "labels/val/val 0.txt").unlink()
    index = check_dataset(tmp_path, max_problem_share=0.5)
    assert [i.boxes for i in index.images if i.path.endswith("train 0.png")] == [()]
    assert [(p.path, p.kind) for p in index.problems] == [("images/val/val 0.png", ProblemKind.NO_LABEL)]
    assert index.left_out == 1
    assert "labels/val/val 0.txt" in index.problems[0].message


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ("1 0.5 0.5 0.1 0.1", ProblemKind.UNKNOWN_CLASS),
        ("-1 0.5 0.5 0.1 0.1", ProblemKind.UNKNOWN_CLASS),
        ("0 0.5 0.5 0 0.1", ProblemKind.DEGENERATE_BOX),
        ("0 0.5 0.5 -0.1 0.1", ProblemKind.DEGENERATE_BOX),
        ("0 0.5 0.5 0.0005 0.0005", ProblemKind.DEGENERATE_BOX),
        ("0 0.95 0.5 0.2 0.1", ProblemKind.OUT_OF_RANGE_BOX),
        ("0 20 10 8 8", ProblemKind.OUT_OF_RANGE_BOX),
        ("0 0.5 0.5 0.1", ProblemKind.MALFORMED_LABEL),
        ("0 0.5 0.5 0.1 0.1 0.98", ProblemKind.MALFORMED_LABEL),
        ("0 0.5 nan 0.1 0.1", ProblemKind.MALFORMED_LABEL),
        ("0.5 0.5 0.5 0.1 0.1", ProblemKind.MALFORMED_LABEL),
        ("cell 0.5 0.5 0.1 0.1", ProblemKind.MALFORMED_LABEL),
    ],
)
def test_yolo_broken_rows_are_left_out_and_named(tmp_path: Path, row: str, kind: ProblemKind) -> None:
    config(yolo(tmp_path, "images/{split}"), train="images/train", val="images/val", test="images/test")
    label(tmp_path / "labels/train/train 0.txt", ROW + row)
    index = check_dataset(tmp_path, max_problem_share=0.5)
    assert [(p.path, p.kind) for p in index.problems] == [("images/train/train 0.png", kind)]
    assert "labels/train/train 0.txt row 2" in index.problems[0].message
    assert counts(index) == [2, 2, 2]
    assert index.box_counts("train") == [2]
    assert index.left_out == 0


def test_yolo_small_overshoot_is_clipped(tmp_path: Path) -> None:
    yolo(tmp_path, "images/{split}")
    draw(tmp_path / "images/train/train 0.png", (1000, 1000))
    config(tmp_path, train="images/train", val="images/val", test="images/test")
    label(tmp_path / "labels/train/train 0.txt", "0 0.9 0.5 0.22 0.5\n")
    index = check_dataset(tmp_path)
    assert index.problems == ()
    assert [i.boxes for i in index.images if "train 0" in i.path] == [((0, 0.895, 0.5, 0.21, 0.5),)]
    label(tmp_path / "labels/train/train 0.txt", "0 0.9 0.5 0.24 0.5\n")
    assert kinds(check_dataset(tmp_path, max_problem_share=1)) == [ProblemKind.OUT_OF_RANGE_BOX]


def test_yolo_polygons_are_refused_with_the_task_that_fits(tmp_path: Path) -> None:
    config(yolo(tmp_path, "images/{split}"), train="images/train", val="images/val")
    label(tmp_path / "labels/train/train 1.txt", "0 0.1 0.1 0.5 0.1 0.5 0.5\n")
    error = refused(tmp_path, max_problem_share=1)
    assert "labels/train/train 1.txt row 1" in error.message
    assert "instance-segmentation" in error.hint
    assert error.code == ExitCode.DATA


def test_yolo_binary_label(tmp_path: Path) -> None:
    config(yolo(tmp_path, "images/{split}"), train="images/train", val="images/val", test="images/test")
    (tmp_path / "labels/test/test 0.txt").write_bytes(b"\xff\xfe\x00")
    index = check_dataset(tmp_path, max_problem_share=0.5)
    assert kinds(index) == [ProblemKind.MALFORMED_LABEL]
    assert counts(index) == [2, 2, 1]
