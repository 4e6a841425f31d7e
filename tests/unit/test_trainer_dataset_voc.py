"""Pascal VOC in the variations that real exports come in, and the ways in which it is broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.datasets import counts, draw, kinds, label, voc, voc_xml
from trainer.dataset import DatasetFormat, ProblemKind, check_dataset


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
