"""The three layouts in the variations that real exports come in, and the ways in which they are broken."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from trainer.contract import ExitCode, TrainerError
from trainer.dataset import DatasetFormat, DatasetIndex, ProblemKind, check_dataset

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


# --- YOLO ------------------------------------------------------------------------------------------


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


# --- COCO ------------------------------------------------------------------------------------------


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


# --- Pascal VOC ------------------------------------------------------------------------------------


def test_voc_with_lists(tmp_path: Path) -> None:
    stems = [f"Bild {n} ü" for n in range(9)]
    voc(tmp_path, stems, train=stems[:4], val=stems[4:6], trainval=stems[:6], test=[f"{s}.png" for s in stems[6:8]])
    label(tmp_path / f"Annotations/{stems[0]}.xml", voc_xml(("zebra", 0, 0, 40, 20), ("ant", 41, 21, 41, 21), ("ant", 1, 1, 41, 21)))
    index = check_dataset(tmp_path, max_problem_share=0.5)
    assert (index.format, index.classes, counts(index)) == (DatasetFormat.VOC, ("ant", "dog", "zebra"), [4, 2, 2])
    assert [p.kind for p in index.problems] == [ProblemKind.DEGENERATE_BOX]
    assert "object 2" in index.problems[0].message
    assert any("1 images are in no list" in note for note in index.notes)
    assert index.images[0].boxes == ((2, 0.5, 0.5, 1.0, 1.0), (0, 0.5125, 0.525, 0.975, 0.95)), "one pixel too many is clipped"


def test_voc_without_lists(tmp_path: Path) -> None:
    index = check_dataset(voc(tmp_path, [f"i.{n}" for n in range(10)]))
    assert counts(index) == [8, 1, 1]
    assert set(index.split_sources.values()) == {"made"}


def test_voc_trainval_without_train(tmp_path: Path) -> None:
    stems = [str(n) for n in range(20)]
    index = check_dataset(voc(tmp_path, stems, trainval=stems[:15], test=stems[15:]))
    assert counts(index) == [13, 2, 5]
    assert index.split_sources == {"train": "given", "val": "made", "test": "given"}
    assert {i.path for i in index.images if i.split == "test"} == {f"JPEGImages/{s}.png" for s in stems[15:]}


def test_voc_val_is_the_rest_of_trainval(tmp_path: Path) -> None:
    stems = [str(n) for n in range(20)]
    assert counts(check_dataset(voc(tmp_path, stems, train=stems[:9], trainval=stems[:15], test=stems[15:]))) == [9, 6, 5]


def test_voc_entries_without_files(tmp_path: Path) -> None:
    voc(tmp_path, "abcde", train=["a", "b", "gone"], val=["c", "d"], test=["e"])
    (tmp_path / "Annotations/b.xml").unlink()
    (tmp_path / "JPEGImages/d.png").unlink()
    index = check_dataset(tmp_path, max_problem_share=0.9)
    assert sorted(kinds(index)) == ["missing-image", "missing-image", "no-label"]
    assert index.left_out == 3
    assert counts(index) == [1, 1, 1]


def test_voc_beside_images_in_split_folders(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        draw(tmp_path / split / "a.jpg")
        label(tmp_path / split / "a.xml", voc_xml(("dog", 10, 5, 30, 15), size=(0, 0)))
    assert counts(check_dataset(tmp_path)) == [1, 1, 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<annotation>",
        '<!DOCTYPE a [<!ENTITY x "y">]><annotation>&x;</annotation>',
        '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
        voc_xml(("", 1, 1, 9, 9)),
        voc_xml(("dog", 1, 1, 9, 9)).replace("<xmin>1</xmin>", ""),
        voc_xml(("dog", 1, 1, 9, 9)).replace("<xmin>1<", "<xmin>one<"),
    ],
)
def test_voc_broken_xml(tmp_path: Path, text: str) -> None:
    label(voc(tmp_path, "abcde", train="ab", val="cd", test="e") / "Annotations/a.xml", text)
    index = check_dataset(tmp_path, max_problem_share=0.5)
    assert [(p.path, p.kind) for p in index.problems] == [("JPEGImages/a.png", ProblemKind.MALFORMED_LABEL)]
    assert "Annotations/a.xml" in index.problems[0].message


# --- Which format ----------------------------------------------------------------------------------


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
