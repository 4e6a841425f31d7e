"""Which images of a registered dataset have a label, where none were given, or some: told before anybody pays for a training."""

from __future__ import annotations

import json
from pathlib import Path

import obstore
import pytest
from click.testing import CliRunner, Result

from blocks.registering import register_uri
from flows.cli_dataset import dataset
from trainer.storage import open_store

IMAGES = [f"images/train/{number}.png" for number in range(10)]


@pytest.fixture
def data_uri(store_uri: str, tmp_path: Path) -> str:
    """Ten images, and no label."""
    uri = (tmp_path / "raw").as_uri() if store_uri.startswith("file:") else store_uri.replace("/some/prefix", "/raw")
    put(uri, *IMAGES)
    return uri


def put(uri: str, *keys: str) -> None:
    for key in keys:
        obstore.put(open_store(uri), key, b"0 0.5 0.5 0.1 0.1\n")


def registered(data_uri: str, store_uri: str, *more: str) -> Result:
    return CliRunner().invoke(dataset, ["register", data_uri, "--store", store_uri, *more], catch_exceptions=False)


def test_no_label_at_all_is_a_warning_with_a_next_step(store_uri: str, data_uri: str) -> None:
    told = registered(data_uri, store_uri)
    assert told.exit_code == 0, "labels may come later"
    assert "labels: 0 of 10 images have one" in told.stdout
    assert "warning: none of the 10 images has a label" in told.stderr
    assert "labels/train/0.txt for images/train/0.png" in told.stderr
    as_json = registered(data_uri, store_uri, "--json")
    assert json.loads(as_json.stdout)["labelled"] == 0
    assert "warning: none of the 10 images" in as_json.stderr


@pytest.mark.parametrize(
    "labels",
    [
        [f"labels/train/{number}.txt" for number in range(10)],
        [f"images/train/{number}.txt" for number in range(10)],
        [f"Annotations/train/{number}.xml" for number in range(10)],
    ],
    ids=["yolo", "beside", "voc"],
)
def test_labels_among_the_objects_are_found(store_uri: str, data_uri: str, labels: list[str]) -> None:
    put(data_uri, "data.yaml", "images/train/classes.txt", *labels)
    told = registered(data_uri, store_uri)
    assert "labels: 10 of 10 images have one" in told.stdout
    assert "warning" not in told.stderr


def test_few_labels_are_a_warning(store_uri: str, data_uri: str) -> None:
    put(data_uri, *(f"labels/train/{number}.txt" for number in range(6)))
    told = registered(data_uri, store_uri)
    assert "labels: 6 of 10 images have one" in told.stdout
    assert "warning: 4 of the 10 images, such as images/train/6.png, have no label" in told.stderr


def test_given_labels_and_those_among_the_objects_count_together(store_uri: str, data_uri: str, tmp_path: Path) -> None:
    put(data_uri, *(f"labels/train/{number}.txt" for number in range(6)))
    (tmp_path / "today/labels/train").mkdir(parents=True)
    for number in range(4, 10):
        (tmp_path / f"today/labels/train/{number}.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    result = register_uri(data_uri, store_uri, labels=tmp_path / "today")
    assert result.matched
    assert (result.matched.images, result.matched.unused, result.labelled, result.unlabelled) == (6, 0, 10, ("", ""))


def test_a_json_among_the_objects_is_told_as_not_read(store_uri: str, data_uri: str) -> None:
    put(data_uri, "annotations/boxes.json")
    assert "annotations/boxes.json was not read" in registered(data_uri, store_uri).stderr
