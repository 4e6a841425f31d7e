from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from blocks.dataset_sources import StoreChoice, choose_store, dataset_name, find_staged, register, split_staged, stage_index
from blocks.job import TrainRequest
from blocks.refs import read_refs
from blocks.staging import stage_folder
from tests.datasets import yolo
from trainer.contract import DatasetCheck, ExitCode, TrainerError
from trainer.dataset import check_dataset
from trainer.fetching import fetch_version
from trainer.storage import open_store


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TRAINYARD_STORE", raising=False)


def make_cells(folder: Path) -> Path:
    root = yolo(folder / "cells", "images/{split}")
    (root / "data.yaml").write_text("names: [cell]\ntrain: images/train\nval: images/val\ntest: images/test\n")
    return root


@pytest.mark.parametrize(
    ("dataset", "staged"),
    [
        ("s3://bucket/store#cells", ("s3://bucket/store", "cells")),
        ("s3://bucket/store/#cells%20new", ("s3://bucket/store", "cells new")),
        ("s3://bucket/images", None),
        ("s3://bucket/images#", None),
        ("/data/set#1", None),
    ],
)
def test_a_staged_dataset_is_named_behind_the_hash(dataset: str, staged: tuple[str, str] | None) -> None:
    assert split_staged(dataset) == staged


@pytest.mark.parametrize(
    ("dataset", "name"),
    [("/data/cells", "cells"), ("/data/cells/data.yaml", "data"), ("s3://b/a/cells/", "cells"), ("s3://b", "b"), ("az://b/s#red", "red")],
)
def test_a_dataset_has_a_name_for_people(dataset: str, name: str) -> None:
    assert dataset_name(dataset) == name


def test_the_nearest_choice_of_a_store_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = TrainRequest(dataset="/d")
    assert choose_store(request, None) == (tmp_path / "home/store").as_uri()
    monkeypatch.setenv("TRAINYARD_STORE", "s3://of-the-environment")
    assert choose_store(request, None) == "s3://of-the-environment"
    assert choose_store(request, "s3://of-the-profile/") == "s3://of-the-profile"
    assert choose_store(request.model_copy(update={"store": "s3://asked/for"}), "s3://of-the-profile") == "s3://asked/for"


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my images", "my images"),
        ("date=2024-01-01", "date-2024-01-01"),
        ("images(1)", "images-1-"),
        (".hidden", "hidden"),
        ("a\u0308pfel 100%", "äpfel 100-"),
        ("???", "dataset"),
        ("n" * 200, "n" * 93),
    ],
)
def test_any_folder_can_be_registered_without_a_name_of_its_own(tmp_path: Path, folder: str, name: str) -> None:
    """As a training does, whose ``--name`` is the run's. Staged, the same folder gets the same name."""
    root, store = make_cells(tmp_path).rename(tmp_path / folder), (tmp_path / "store").as_uri()
    _, registered = register(TrainRequest(dataset=root.as_uri(), store=store), StoreChoice(store), "", DatasetCheck())
    assert registered.name == name
    assert stage_folder(root, store).name == (name if len(folder) < 100 else "n" * 100)
    assert stage_index(check_dataset(root), StoreChoice(store), "")[1].name == f"{name[:80]}.used"


@pytest.mark.parametrize("dataset", ["/data/cells", "s3://bucket/store#cells"])
def test_labels_of_their_own_are_for_buckets(dataset: str) -> None:
    with pytest.raises(ValidationError, match="labels are for images in a bucket"):
        TrainRequest(dataset=dataset, labels="/labels")


def test_only_what_a_training_uses_is_staged_under_the_version_of_the_check(tmp_path: Path) -> None:
    root = make_cells(tmp_path)
    (root / "notes.txt").write_text("nobody trains on this")
    index = check_dataset(root)
    store = StoreChoice((tmp_path / "store").as_uri())
    ref, staged = stage_index(index, store, "file:///runs/r/dataset.json")
    assert (ref.version, ref.store_uri, ref.check) == (index.version, store.uri, None)
    assert staged.files == len(index.images) + len(index.label_files)
    assert list(read_refs(open_store(store.uri), store.uri).whole) == ["cells.used"]
    fetch_version(store.uri, ref.version, tmp_path / "copy")
    assert not (tmp_path / "copy/notes.txt").exists()
    assert check_dataset(tmp_path / "copy").version == index.version
    _, again = stage_index(index, store, "file:///runs/r/dataset.json")
    assert again.sent_bytes == 0


def test_a_dataset_that_changed_since_its_check_is_not_staged_as_if_it_had_not(tmp_path: Path) -> None:
    root = make_cells(tmp_path)
    index = check_dataset(root)
    label = next((root / "labels").rglob("*.txt"))
    label.write_text("0 0.4 0.4 0.2 0.2\n")
    with pytest.raises(TrainerError, match="changed between its check and its staging") as refused:
        stage_index(index, StoreChoice((tmp_path / "store").as_uri()), "")
    assert refused.value.code is ExitCode.DATA


def test_a_link_out_of_the_folder_is_refused_and_not_followed(tmp_path: Path) -> None:
    root = make_cells(tmp_path)
    image = next((root / "images").rglob("*.png"))
    image.rename(tmp_path / "elsewhere.png")
    image.symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(TrainerError, match="link that leads out of the folder"):
        stage_index(check_dataset(root), StoreChoice((tmp_path / "store").as_uri()), "")


@pytest.mark.parametrize("elsewhere", ["elsewhere", "cells/within"])
def test_a_link_to_a_folder_is_followed_within_the_root_only(tmp_path: Path, elsewhere: str) -> None:
    root = make_cells(tmp_path)
    (root / "images").rename(tmp_path / elsewhere)
    (root / "images").symlink_to(tmp_path / elsewhere)
    index, store = check_dataset(root), StoreChoice((tmp_path / "store").as_uri())
    if elsewhere == "cells/within":
        assert stage_index(index, store, "")[1].version == index.version
        return
    with pytest.raises(TrainerError, match="lies behind a link that leads out of the folder") as refused:
        stage_index(index, store, "")
    assert refused.value.code is ExitCode.DATA


def test_images_of_a_set_that_nobody_has_checked_are_counted_without_labels(tmp_path: Path) -> None:
    """``image_count`` of what lies staged, and of what is registered."""
    root, store = make_cells(tmp_path), (tmp_path / "store").as_uri()
    images = len(list((root / "images").rglob("*.png")))
    stage_folder(root, store)
    assert find_staged(f"{store}#cells", lambda _: None, "", DatasetCheck()).image_count == images
    request = TrainRequest(dataset=root.as_uri(), store=store)
    assert register(request, StoreChoice(store), "", DatasetCheck())[0].image_count == images
