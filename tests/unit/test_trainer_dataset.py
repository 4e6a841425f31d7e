"""Checks, splits, version, change detection and Ultralytics' layout, on small sets drawn here and on a real one."""

from __future__ import annotations

import io
import os
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.datasets import BCCD, needs_bccd
from trainer.contract import ExitCode, SplitConfig, Task, TrainerError
from trainer.dataset import DatasetIndex, ProblemKind, changed_files, check_dataset, write_yolo_layout

ROW = "0 0.5 0.5 0.5 0.5\n"


def split_config(**fields: Any) -> SplitConfig:
    return SplitConfig.model_validate(fields)


def picture(key: str, size: tuple[int, int] = (40, 20), suffix: str = "JPEG", **options: Any) -> bytes:
    """The bytes of an image unlike any of another key."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", size, random.Random(zlib.crc32(key.encode())).randbytes(size[0] * size[1] * 3)).save(buffer, suffix, **options)
    return buffer.getvalue()


def add(root: Path, name: str, split: str = "train", content: bytes | None = None, row: str = ROW) -> Path:
    image = root / "images" / split / name
    label = (root / "labels" / split / name).with_suffix(".txt")
    for path in (image, label):
        path.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(picture(f"{split}/{name}") if content is None else content)
    label.write_text(row)
    return image


def make(root: Path, **counts: int) -> Path:
    for split, count in counts.items():
        for number in range(count):
            add(root, f"{number:03}.jpg", split)
    (root / "data.yaml").write_text(yaml.safe_dump({"names": ["cell"], **{split: f"images/{split}" for split in counts}}))
    return root


def splits(index: DatasetIndex) -> dict[str, str]:
    return {image.path: image.split for image in index.images}


def refused(path: Path, **options: Any) -> TrainerError:
    with pytest.raises(TrainerError) as caught:
        check_dataset(path, **options)
    assert caught.value.hint
    return caught.value


# --- Images ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("cut.jpg", picture("x")[:-20], "truncated"),
        ("empty.jpg", b"", "empty"),
        ("text.png", b"hello", "not an image"),
        ("small.png", picture("x", (9, 30), "PNG"), "9 x 30"),
        ("vector.eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 30 30\n", "not an image"),
        ("bitmap.png", picture("x", suffix="GIF"), "not an image"),
    ],
)
def test_unusable_images_are_left_out(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    add(make(tmp_path, train=4, val=1, test=1), name, content=content)
    index = check_dataset(tmp_path, max_problem_share=0.2)
    assert [(p.path, p.kind) for p in index.problems] == [(f"images/train/{name}", ProblemKind.UNREADABLE_IMAGE)]
    assert said in index.problems[0].message
    assert index.left_out == 1
    assert index.count("train") == 4


def test_a_broken_link_and_a_pipe_are_named(tmp_path: Path) -> None:
    make(tmp_path, train=4, val=1, test=1)
    for name in ("link.jpg", "pipe.jpg"):
        add(tmp_path, name).unlink()
    (tmp_path / "images/train/link.jpg").symlink_to(tmp_path / "gone.jpg")
    os.mkfifo(tmp_path / "images/train/pipe.jpg")
    index = check_dataset(tmp_path, max_problem_share=0.5)
    assert [p.kind for p in index.problems] == [ProblemKind.UNREADABLE_IMAGE] * 2
    assert index.left_out == 2


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "bmp", "tif", "TIFF", "webp"])
def test_suffixes_in_any_case(tmp_path: Path, suffix: str) -> None:
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    add(make(tmp_path, train=1, val=1, test=1), f"a.{suffix}", content=picture("x", suffix=kind))
    assert check_dataset(tmp_path).count("train") == 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_size_is_as_displayed(tmp_path: Path, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(kind, kind.lower())
    add(make(tmp_path, train=1, val=1, test=1), f"turned.{suffix}", content=picture("x", suffix=kind, exif=exif))
    assert [(i.width, i.height) for i in check_dataset(tmp_path).images if "turned" in i.path] == [(20, 40)]


def test_an_image_link_is_used_by_content(tmp_path: Path) -> None:
    make(tmp_path / "set", train=2, val=1, test=1)
    (tmp_path / "elsewhere.jpg").write_bytes(picture("elsewhere"))
    add(tmp_path / "set", "link.jpg").unlink()
    (tmp_path / "set/images/train/link.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    index = check_dataset(tmp_path / "set")
    assert index.count("train") == 3
    assert index.root == str(tmp_path / "set")


# --- What is refused -------------------------------------------------------------------------------


def test_too_many_problems(tmp_path: Path) -> None:
    make(tmp_path, train=18, val=1, test=1)
    add(tmp_path, "000.jpg", content=b"")
    assert check_dataset(tmp_path).left_out == 1, "5 % of 20 are allowed"
    add(tmp_path, "001.jpg", row="0 0.5 0.5 0 0\n0 0.5 0.5 0 0\n")
    error = refused(tmp_path)
    assert "2 of 20 images (10.0%)" in error.message
    assert "2 degenerate-box, 1 unreadable-image" in error.message
    assert "images/train/001.jpg" in error.message
    assert "--max-problem-share" in error.hint
    assert error.code == ExitCode.DATA
    assert check_dataset(tmp_path, max_problem_share=0.1).left_out == 1


def test_no_boxes_at_all(tmp_path: Path) -> None:
    make(tmp_path, train=2, val=1, test=1)
    for number in range(2):
        add(tmp_path, f"{number:03}.jpg", row="")
    assert "has a box" in refused(tmp_path).message


def test_no_images(tmp_path: Path) -> None:
    make(tmp_path, train=1, val=1)
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images/train").mkdir(parents=True)
    (tmp_path / "images/val").mkdir()
    assert "no images" in refused(tmp_path).message


def test_no_usable_val_image(tmp_path: Path) -> None:
    add(make(tmp_path, train=3, val=1, test=1), "000.jpg", "val", b"")
    assert "val split" in refused(tmp_path, max_problem_share=1).message


@pytest.mark.parametrize("task", [task for task in Task if task is not Task.OBJECT_DETECTION])
def test_other_tasks(tmp_path: Path, task: Task) -> None:
    error = refused(tmp_path, task=task)
    assert "not supported yet" in error.message
    assert error.code == ExitCode.CONFIG


# --- Splits ----------------------------------------------------------------------------------------


def test_test_is_made_from_train_never_from_val(tmp_path: Path) -> None:
    index = check_dataset(make(tmp_path, train=30, val=10))
    assert (index.count("train"), index.count("val"), index.count("test")) == (27, 10, 3)
    assert index.split_sources == {"train": "given", "val": "given", "test": "made"}
    assert all(path.startswith("images/train/") for path, split in splits(index).items() if split == "test")
    assert any("3 of the 30" in note and "split.test = 0" in note for note in index.notes)


def test_no_test_split_where_none_is_wanted(tmp_path: Path) -> None:
    index = check_dataset(make(tmp_path, train=30, val=10), split=split_config(test=0))
    assert index.count("test") == 0
    assert set(index.split_sources) == {"train", "val"}
    assert index.notes == ()


def test_val_and_test_are_made_from_train(tmp_path: Path) -> None:
    index = check_dataset(make(tmp_path, train=30), split=split_config(val=0.2))
    assert (index.count("train"), index.count("val"), index.count("test")) == (21, 6, 3)


def test_shares_give_at_least_one_image(tmp_path: Path) -> None:
    index = check_dataset(make(tmp_path, train=3), split=split_config(val=0.01, test=0.01))
    assert (index.count("train"), index.count("val"), index.count("test")) == (1, 1, 1)


def test_two_images_make_no_test_split(tmp_path: Path) -> None:
    index = check_dataset(make(tmp_path, train=2))
    assert (index.count("train"), index.count("val")) == (1, 1)
    assert any("no test split" in note for note in index.notes)


def test_no_split_can_be_made(tmp_path: Path) -> None:
    make(tmp_path / "one", train=1)
    assert refused(tmp_path / "one").code == ExitCode.DATA
    make(tmp_path / "many", train=9)
    assert refused(tmp_path / "many", split=split_config(val=0)).code == ExitCode.CONFIG
    assert "one group" in refused(tmp_path / "many", split=split_config(by="jpg")).message
    make(tmp_path / "only_val", val=4)
    assert "no train split" in refused(tmp_path / "only_val").message


@pytest.mark.parametrize("seed", range(4))
def test_groups_stay_together(tmp_path: Path, seed: int) -> None:
    for camera in range(10):
        for shot in range(4):
            add(tmp_path, f"cam{camera}_{shot}.jpg")
    add(tmp_path, "other.jpg")
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [cell]\n")
    index = check_dataset(tmp_path, split=split_config(by=r"^(cam\d+)_", seed=seed))
    places: dict[str, set[str]] = {}
    for path, split in splits(index).items():
        places.setdefault(Path(path).name.partition("_")[0], set()).add(split)
    assert len(places) == 11
    assert all(len(found) == 1 for found in places.values())
    assert 4 <= index.count("val") <= 8
    assert 4 <= index.count("test") <= 8
    assert any("1 images do not match" in note for note in index.notes)


def test_a_huge_group_stays_in_train(tmp_path: Path) -> None:
    for name in [f"a_{n}.jpg" for n in range(30)] + ["b_1.jpg", "c_1.jpg"]:
        add(tmp_path, name)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [cell]\n")
    for seed in range(6):
        index = check_dataset(tmp_path, split=split_config(by="^([a-z])_", seed=seed))
        assert (index.count("train"), index.count("val"), index.count("test")) == (30, 1, 1)


def test_by_is_not_used_where_all_splits_are_given(tmp_path: Path) -> None:
    index = check_dataset(make(tmp_path, train=2, val=1, test=1), split=split_config(by="x"))
    assert any("split.by was not used" in note for note in index.notes)


def test_seed_and_stability(tmp_path: Path) -> None:
    make(tmp_path, train=60)
    before = splits(check_dataset(tmp_path))
    assert splits(check_dataset(tmp_path, split=split_config(seed=1))) != before
    add(tmp_path, "new.jpg")
    after = splits(check_dataset(tmp_path))
    assert sum(after[path] != split for path, split in before.items()) <= 2, "one more image leaves the others where they are"


def test_equal_images_are_kept_together_and_told_where_given_apart(tmp_path: Path) -> None:
    for number in range(40):
        add(tmp_path / "made", f"{number}.jpg", content=picture(f"{number // 4}"))
    (tmp_path / "made/data.yaml").write_text("train: images/train\nnames: [cell]\n")
    made = check_dataset(tmp_path / "made")
    assert made.problems == ()
    assert made.count("test") == 4
    make(tmp_path / "given", train=3, val=1, test=1)
    add(tmp_path / "given", "leak.jpg", "val", picture("train/001.jpg"))
    given = check_dataset(tmp_path / "given")
    assert [(p.path, p.kind) for p in given.problems] == [("images/val/leak.jpg", ProblemKind.DUPLICATE_IMAGE)]
    assert "images/train/001.jpg" in given.problems[0].message
    assert given.count("val") == 2
    assert given.left_out == 0
    assert any("same bytes" in note for note in given.notes)


# --- Index, version, changes -----------------------------------------------------------------------


def test_index_is_the_same_wherever_and_in_whatever_order(tmp_path: Path) -> None:
    make(tmp_path / "a" / "set", train=12)
    names = sorted(p for p in (tmp_path / "a/set").rglob("*") if p.is_file())
    for path in reversed(names):  # other creation order, other place
        copy = tmp_path / "b/set" / path.relative_to(tmp_path / "a/set")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    seen: list[tuple[int, int]] = []
    first = check_dataset(tmp_path / "a/set", on_progress=lambda done, total: seen.append((done, total)))
    second = check_dataset(tmp_path / "b/set")
    assert second.model_copy(update={"root": first.root}) == first
    assert len(first.version) == 64
    assert seen == [(n, 12) for n in range(1, 13)]
    assert DatasetIndex.model_validate_json(first.model_dump_json()) == first
    assert first.box_counts("train") == [first.count("train")] == [10]
    make(tmp_path / "b/set", train=13)
    assert check_dataset(tmp_path / "b/set").version != first.version


def test_changed_files(tmp_path: Path) -> None:
    index = check_dataset(make(tmp_path, train=6, val=1, test=1))
    assert changed_files(index, tmp_path) == []
    os.utime(tmp_path / "images/train/000.jpg")
    os.utime(tmp_path / "labels/train/000.txt")
    assert changed_files(index, tmp_path) == [], "a touch is no change"
    same_size = tmp_path / "labels/train/001.txt"
    same_size.write_text(ROW.replace("0.5", "0.4"))
    (tmp_path / "images/train/002.jpg").unlink()
    (tmp_path / "data.yaml").write_text("names: [other]")
    os.truncate(tmp_path / "images/train/003.jpg", 50)
    expected = {"labels/train/001.txt", "images/train/002.jpg", "data.yaml", "images/train/003.jpg"}
    assert set(changed_files(index, tmp_path)) == expected
    assert len(changed_files(index, tmp_path / "gone")) == len(index.images) + len(index.label_files)


# --- Ultralytics' layout ---------------------------------------------------------------------------


def test_layout(tmp_path: Path) -> None:
    root = make(tmp_path / "images" / "set ü", train=3, val=1, test=1)
    add(root, "sub/000.jpg")
    add(root, "sub/Blut Körper.v2.JPG", row="0 0.25 0.5 0.123456789 1\n")
    add(root, "nothing.jpg", row="")
    index = check_dataset(root)
    config = write_yolo_layout(index, root, tmp_path / "images" / "layout")
    assert write_yolo_layout(index, root, tmp_path / "images" / "layout") == config, "an earlier layout is replaced"
    document = yaml.safe_load(config.read_text())
    assert document == {
        "path": str(config.parent),
        "train": "images/train",
        "val": "images/val",
        "test": "images/test",
        "names": {0: "cell"},
    }
    images = sorted((config.parent / "images/train").iterdir())
    assert len(images) == 6
    assert all(i.is_symlink() and i.name.isascii() and " " not in i.name for i in images)
    assert {str(i.readlink()) for i in images} == {str(root / i.path) for i in index.images if i.split == "train"}
    labels = {str(i.readlink()): (config.parent / "labels/train" / f"{i.stem}.txt").read_text() for i in images}
    assert labels[str(root / "images/train/sub/Blut Körper.v2.JPG")] == "0 0.25 0.5 0.123456789 1\n"
    assert labels[str(root / "images/train/nothing.jpg")] == ""


def test_layout_leaves_other_folders_alone(tmp_path: Path) -> None:
    index = check_dataset(make(tmp_path / "set", train=2, val=1, test=1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    for folder in (tmp_path / "mine", tmp_path / "set"):
        with pytest.raises(TrainerError) as caught:
            write_yolo_layout(index, tmp_path / "set", folder)
        assert caught.value.code == ExitCode.CONFIG
    assert (tmp_path / "mine/notes.txt").exists()
    assert changed_files(index, tmp_path / "set") == []


def test_layout_of_a_set_that_changed_leaves_nothing_half_made(tmp_path: Path) -> None:
    root = make(tmp_path / "set", train=2, val=1, test=1)
    index = check_dataset(root)
    (root / "images/train/001.jpg").unlink()
    with pytest.raises(TrainerError, match=r"001\.jpg") as caught:
        write_yolo_layout(index, root, tmp_path / "layout")
    assert caught.value.code == ExitCode.DATA
    assert not (tmp_path / "layout").exists()


def test_jpeg_with_trailing_bytes_is_copied(tmp_path: Path) -> None:
    root = make(tmp_path / "set", train=2, val=1, test=1)
    odd = add(root, "odd.png", content=picture("odd") + b"\0\0")
    layout = write_yolo_layout(check_dataset(root), root, tmp_path / "layout").parent
    copies = [p for p in (layout / "images").rglob("*.*") if not p.is_symlink()]
    assert len(copies) == 1
    assert copies[0].read_bytes() == odd.read_bytes()


def test_ultralytics_reads_the_layout_and_changes_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOLO_OFFLINE", "true")
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))
    dataset_module = pytest.importorskip("ultralytics.data.dataset", reason="needs the train extra")
    root = make(tmp_path / "images" / "set", train=3, val=1, test=1)
    add(root, "odd.jpg", content=picture("odd") + b"\0\0", row="0 0.25 0.5 0.1 0.2\n")
    index = check_dataset(root)
    config = write_yolo_layout(index, root, tmp_path / "images/layout")
    data = {"names": {0: "cell"}, "nc": 1, "channels": 3}
    dataset = dataset_module.YOLODataset(str(config.parent / "images/train"), data=data, task="detect", augment=False, imgsz=64)
    assert len(dataset) == index.count("train") == 4
    read = sorted(tuple(round(float(v), 6) for v in row) for label in dataset.labels for row in label["bboxes"])
    assert read == sorted(tuple(round(v, 6) for v in box[1:]) for i in index.images if i.split == "train" for box in i.boxes)
    dataset[0]
    assert changed_files(index, root) == []
    assert not [p for p in (config.parent / "images").rglob("*.*") if not p.is_symlink() and not p.read_bytes().endswith(b"\xff\xd9")]


# --- A real set ------------------------------------------------------------------------------------


@needs_bccd
def test_bccd() -> None:
    index = check_dataset(BCCD)
    assert [index.count(split) for split in ("train", "val", "test")] == [205, 87, 72]
    assert index.classes == ("Platelets", "RBC", "WBC")
    assert index.left_out == 0
    assert set(index.split_sources.values()) == {"given"}
    assert [(Path(p.path).stem, p.kind) for p in index.problems] == [
        ("BloodImage_00338", ProblemKind.DEGENERATE_BOX),
        ("BloodImage_00343", ProblemKind.DEGENERATE_BOX),
    ]
    assert [sum(index.box_counts(split)) for split in ("train", "val", "test")] == [2804, 1137, 945]
