"""The demo set: complete, correct, the same each time, and never half-made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer import shapes
from trainer.contract import ExitCode, TrainerError
from trainer.dataset import check_dataset
from trainer.shapes import write_shapes


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_is_a_dataset(tmp_path: Path) -> None:
    index = check_dataset(write_shapes(tmp_path / "shapes", train=60, val=10, test=8))
    assert [index.count(split) for split in ("train", "val", "test")] == [60, 10, 8]
    assert index.classes == ("circle", "square", "triangle")
    assert index.problems == ()
    assert index.notes == ()
    assert min(index.box_counts("train")) > 10
    assert {(i.width, i.height) for i in index.images} == {(96, 96)}
    assert {len(image.boxes) for image in index.images} == {1, 2, 3}


def test_boxes_hold_the_shapes(tmp_path: Path) -> None:
    index = check_dataset(write_shapes(tmp_path / "shapes", train=10, val=1, test=0, size=64))
    for image in index.images:
        pixels = np.asarray(Image.open(tmp_path / "shapes" / image.path).convert("L"), dtype=float)
        background = np.ones(pixels.shape, dtype=bool)
        for _, x, y, width, height in image.boxes:
            left, top, right, bottom = (round(64 * v) for v in (x - width / 2, y - height / 2, x + width / 2, y + height / 2))
            background[top:bottom, left:right] = False
            middle = pixels[(top + bottom) // 2, (left + right) // 2]
            assert middle > 80, "a shape is at least as bright as its darkest colour"
        assert pixels[background].mean() < 75, "outside the boxes there is only noise"


def test_same_request_same_bytes(tmp_path: Path) -> None:
    first = digests(write_shapes(tmp_path / "a", train=8, val=2, test=2))
    assert digests(write_shapes(tmp_path / "b", train=8, val=2, test=2)) == first
    assert digests(write_shapes(tmp_path / "c", train=8, val=2, test=2, seed=1)) != first
    more = digests(write_shapes(tmp_path / "d", train=9, val=2, test=2))
    assert {k: v for k, v in first.items() if "test" in k}.items() <= more.items(), "each split has a seed of its own"


def test_second_call_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shapes(tmp_path / "shapes", train=2, val=1, test=1)

    def fail(*_: object) -> None:
        raise AssertionError("drew again")

    monkeypatch.setattr(shapes, "_draw_image", fail)
    assert write_shapes(folder, train=2, val=1, test=1) == folder


def test_a_cut_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "_label_row", fail)
        with pytest.raises(KeyboardInterrupt):
            write_shapes(tmp_path / "shapes", train=2, val=1, test=1)
    assert list(tmp_path.iterdir()) == []
    write_shapes(tmp_path / "shapes", train=2, val=1, test=1)


def test_other_content_is_left_alone(tmp_path: Path) -> None:
    folder = write_shapes(tmp_path / "shapes", train=2, val=1, test=1)
    before = digests(folder)
    with pytest.raises(TrainerError) as caught:
        write_shapes(folder, train=3, val=1, test=1)
    assert caught.value.code == ExitCode.CONFIG
    assert caught.value.hint
    assert digests(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["shapes"]


@pytest.mark.parametrize("request_", [{"train": 0}, {"val": 0}, {"test": -1}, {"size": 8}, {"seed": -1}])
def test_impossible_requests(tmp_path: Path, request_: dict[str, Any]) -> None:
    with pytest.raises(TrainerError) as caught:
        write_shapes(tmp_path / "shapes", **request_)
    assert caught.value.code == ExitCode.CONFIG
    assert not (tmp_path / "shapes").exists()
