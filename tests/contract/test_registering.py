"""Datasets whose images stay where they lie: one suite for the three kinds of stores."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from uuid import uuid4

import obstore
import pytest
from click.testing import CliRunner

from blocks.refs import read_ref
from blocks.registering import Registered, register_uri
from blocks.staging import stage_folder
from flows.cli_dataset import dataset
from tests.datasets import coco, config, label, voc, yolo
from tests.stores import StoreServer
from trainer.contract import ExitCode, TrainerError
from trainer.dataset import check_dataset
from trainer.fetching import fetch_version
from trainer.packs import manifest_key
from trainer.storage import list_paths, open_store, to_path
from trainer.verifying import verify_version


@pytest.fixture
def data_uri(store_uri: str, tmp_path: Path) -> str:
    """Where the images of somebody else lie: beside the store, in a prefix whose name has a space."""
    if store_uri.startswith("file:"):
        (tmp_path / "raw images/cells").mkdir(parents=True)
        return (tmp_path / "raw images/cells").as_uri()
    return store_uri.replace("/some/prefix", "/raw images/cells")


@pytest.fixture
def labels(data_uri: str, tmp_path: Path) -> Path:
    """The images of a YOLO dataset are in the bucket, the rest of it is here."""
    root = yolo(tmp_path / "source", "images/{split}", ("train", "val"), count=4)
    (root / "images/train/train 0.png").rename(root / "images/train/Zelle ü 0.png")
    (root / "labels/train/train 0.txt").rename(root / "labels/train/Zelle ü 0.txt")
    upload(root / "images", data_uri, "images")
    shutil.rmtree(root / "images")
    config(root, train="images/train", val="images/val")
    make_old(root)
    return root


def make_old(root: Path) -> None:
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))


def upload(folder: Path, data_uri: str, prefix: str = "") -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            put(data_uri, f"{prefix}/{path.relative_to(folder).as_posix()}".lstrip("/"), path.read_bytes())


def put(uri: str, key: str, content: bytes) -> None:
    obstore.put(open_store(uri), key, content)


def objects(uri: str) -> set[str]:
    return set(list_paths(open_store(uri), ""))


def stored_bytes(uri: str, kinds: tuple[str, ...] = ("packs/", "files/")) -> int:
    store = open_store(uri)
    return sum(obstore.head(store, key)["size"] for key in objects(uri) if key.startswith(kinds))


def fetched(store_uri: str, registered: Registered, to: Path, verified: Path | None = None) -> Path:
    fetch_version(store_uri, registered.version, to, verified=verified)
    return to


def usable_images(dataset: Path, problems: int = 0) -> int:
    """How many images a training would have."""
    index = check_dataset(dataset, max_problem_share=0.1)
    assert len(index.problems) == problems
    return len(index.images)


def refused(data_uri: str, store_uri: str, labels: Path | None = None) -> TrainerError:
    """The error of a registration that is refused before it writes anything."""
    with pytest.raises(TrainerError) as caught:
        register_uri(data_uri, store_uri, labels=labels)
    assert caught.value.hint, "every refusal says what to do next"
    assert objects(store_uri) == set()
    return caught.value


def test_images_stay_and_a_training_finds_them_with_their_labels(store_uri: str, data_uri: str, labels: Path, tmp_path: Path) -> None:
    registered = register_uri(data_uri, store_uri, labels=labels)
    assert (registered.name, registered.in_place_files, registered.images, registered.files) == ("cells", 8, 8, 8 + 8 + 1)
    assert registered.matched
    assert (registered.matched.images, registered.matched.unused, registered.matched.format) == (8, 0, "yolo")
    label_bytes = sum(path.stat().st_size for path in labels.rglob("*") if path.is_file())
    assert stored_bytes(store_uri) <= label_bytes + 9 * 1024 + 1024, "labels in their pack, and no image"
    verified = tmp_path / "verified"
    copy = fetched(store_uri, registered, tmp_path / "copy", verified)
    assert usable_images(copy) == 8
    for key in objects(data_uri):
        assert (copy / key).read_bytes() == bytes(obstore.get(open_store(data_uri), key).bytes())
    assert verify_version(store_uri, registered.version).files == 17
    assert fetch_version(store_uri, registered.version, copy, verified=verified).fetched_files == 0
    os.utime(copy / "images/val/val 0.png", (1e9, 1e9))
    with pytest.raises(TrainerError, match=r"images/.*nobody knows its content"):
        fetch_version(store_uri, registered.version, copy, verified=verified)
    assert fetch_version(store_uri, registered.version, copy, verified=verified, repair=lambda *_: None).fetched_files == 8


def test_nothing_changed_writes_nothing(store_uri: str, data_uri: str, labels: Path) -> None:
    first = register_uri(data_uri, store_uri, labels=labels)
    before = objects(store_uri)
    again = register_uri(data_uri, store_uri, labels=labels)
    assert (again.version, again.sent_bytes, again.changed_files) == (first.version, 0, 0)
    assert objects(store_uri) == before


@pytest.mark.parametrize("store_uri", ["file"], indirect=True)
@pytest.mark.parametrize("damage", [b"", None])
def test_registered_again_a_version_whose_manifest_is_damaged_or_gone_is_whole(
    store_uri: str, data_uri: str, labels: Path, damage: bytes | None
) -> None:
    first = register_uri(data_uri, store_uri, labels=labels)
    path = to_path(store_uri) / manifest_key(first.version)
    path.unlink() if damage is None else path.write_bytes(damage)
    again = register_uri(data_uri, store_uri, labels=labels)
    assert again.version == first.version
    assert again.sent_bytes > 0
    assert verify_version(store_uri, first.version).files == 17


def test_a_changed_label_sends_that_label_only(store_uri: str, data_uri: str, labels: Path, tmp_path: Path) -> None:
    first = register_uri(data_uri, store_uri, labels=labels)
    before = stored_bytes(store_uri)
    label(labels / "labels/val/val 1.txt", "0 0.4 0.4 0.2 0.2\n")
    second = register_uri(data_uri, store_uri, labels=labels)
    assert second.version != first.version
    assert second.changed_files == 1
    assert stored_bytes(store_uri) - before <= 512 + 512 + 1024, "one tar with one small label"
    copy = fetched(store_uri, second, tmp_path / "copy")
    assert (copy / "labels/val/val 1.txt").read_text() == "0 0.4 0.4 0.2 0.2\n"
    assert (fetched(store_uri, first, tmp_path / "old") / "labels/val/val 1.txt").read_text() != "0 0.4 0.4 0.2 0.2\n"


def test_a_new_image_is_a_new_version_that_says_what_differs(store_uri: str, data_uri: str, labels: Path, tmp_path: Path) -> None:
    first = register_uri(data_uri, store_uri, labels=labels)
    put(data_uri, "images/train/new.png", b"new")
    obstore.delete(open_store(data_uri), "images/val/val 3.png")
    second = register_uri(data_uri, store_uri, labels=labels)
    assert second.changed_files == 1
    assert second.sent_bytes == stored_bytes(store_uri, (manifest_key(second.version),)), "a manifest and nothing else"
    ref, _ = read_ref(open_store(store_uri), store_uri, "cells")
    assert ref is not None
    assert (ref.version, ref.depth, ref.previous) == (second.version, 1, (first.version,))
    copy = fetched(store_uri, second, tmp_path / "copy")
    assert (copy / "images/train/new.png").read_bytes() == b"new"
    assert not (copy / "images/val/val 3.png").exists()


def test_going_back_finds_the_version_that_was_there(store_uri: str, data_uri: str, labels: Path, tmp_path: Path) -> None:
    first = register_uri(data_uri, store_uri, labels=labels)
    put(data_uri, "images/train/new.png", b"new")
    register_uri(data_uri, store_uri, labels=labels)
    obstore.delete(open_store(data_uri), "images/train/new.png")
    again = register_uri(data_uri, store_uri, labels=labels)
    assert (again.version, again.sent_bytes) == (first.version, 0)
    fetched(store_uri, again, tmp_path / "copy")


@pytest.mark.parametrize("change", ["same size", "other size", "gone"])
def test_an_object_that_has_changed_is_refused_until_it_is_registered_again(
    store_uri: str, data_uri: str, labels: Path, tmp_path: Path, change: str
) -> None:
    first = register_uri(data_uri, store_uri, labels=labels)
    key = "images/train/Zelle ü 0.png"
    content = bytes(obstore.get(open_store(data_uri), key).bytes())
    if change == "gone":
        obstore.delete(open_store(data_uri), key)
    else:
        put(data_uri, key, content[::-1] if change == "same size" else content + b"x")
    for read in (lambda: fetch_version(store_uri, first.version, tmp_path / "copy"), lambda: verify_version(store_uri, first.version)):
        with pytest.raises(TrainerError, match=r"Zelle ü 0\.png.*(has changed|is gone)") as caught:
            read()
        assert caught.value.code is ExitCode.DATA
        assert "register it again as before" in caught.value.hint
    assert not (tmp_path / "copy").exists()
    second = register_uri(data_uri, store_uri, labels=labels)
    assert second.version != first.version
    fetched(store_uri, second, tmp_path / "copy")


def test_a_fetch_that_was_cut_goes_on(store_uri: str, data_uri: str, labels: Path, tmp_path: Path) -> None:
    registered = register_uri(data_uri, store_uri, labels=labels)
    whole = fetched(store_uri, registered, tmp_path / "whole")
    partial = shutil.copytree(whole, tmp_path / f"copy.partial-{registered.version[:12]}")
    (partial / "images/val/val 0.png").write_bytes(b"half")
    (partial / "images/val/val 1.png").unlink()
    assert fetch_version(store_uri, registered.version, tmp_path / "copy").fetched_files == 2
    assert (tmp_path / "copy/images/val/val 0.png").read_bytes() == (whole / "images/val/val 0.png").read_bytes()


def test_a_coco_file_describes_images_at_the_root(store_uri: str, data_uri: str, tmp_path: Path) -> None:
    source = yolo(tmp_path / "source", "images/{split}", ("train",), count=10)
    upload(source / "images/train", data_uri)
    file = coco(tmp_path / "boxes.json", [*(f"train {number}.png" for number in range(10)), "not there.png"])
    registered = register_uri(data_uri, store_uri, labels=file)
    assert registered.matched
    assert (registered.matched.images, registered.matched.unused, registered.matched.unused_example) == (10, 1, "not there.png")
    assert registered.matched.format == "coco"
    copy = fetched(store_uri, registered, tmp_path / "copy")
    assert usable_images(copy, problems=1) == 10
    assert register_uri(data_uri, store_uri, labels=file).sent_bytes == 0


def test_voc_files_describe_images_beside_their_folder(store_uri: str, data_uri: str, tmp_path: Path) -> None:
    root = voc(tmp_path / "source", [f"{number}" for number in range(10)], train=map(str, range(7)), val=map(str, range(7, 10)))
    upload(root / "JPEGImages", data_uri, "JPEGImages")
    shutil.rmtree(root / "JPEGImages")
    registered = register_uri(data_uri, store_uri, labels=root)
    assert registered.matched
    assert (registered.matched.images, registered.matched.unused, registered.matched.format) == (10, 0, "pascal-voc")
    assert usable_images(fetched(store_uri, registered, tmp_path / "copy")) == 10


def test_a_folder_that_is_the_labels_of_a_dataset_is_laid_down_as_that(store_uri: str, data_uri: str, labels: Path, tmp_path: Path) -> None:
    put(data_uri, "data.yaml", (labels / "data.yaml").read_bytes())
    put(data_uri, "labels/val/val 0.txt", b"0 0.1 0.1 0.1 0.1\n")
    registered = register_uri(data_uri, store_uri, labels=labels / "labels")
    assert registered.matched
    assert registered.matched.images == 8
    copy = fetched(store_uri, registered, tmp_path / "copy")
    assert usable_images(copy) == 8
    assert (copy / "labels/val/val 0.txt").read_text() == (labels / "labels/val/val 0.txt").read_text(), "the given one wins"


def test_what_is_no_data_is_left_out(store_uri: str, data_uri: str, labels: Path) -> None:
    for key in (".git/HEAD", "labels.cache", "images/.DS_Store", ".trainyard/packs/ab/abc.tar", "drafts/x.jpg"):
        put(data_uri, key, b"x")
    put(data_uri, ".trainyardignore", b"drafts/\n.trainyardignore\n")
    registered = register_uri(data_uri, store_uri, labels=labels)
    assert registered.in_place_files == 8
    if not data_uri.startswith("file:"):  # there it is left out without a word, as a stage does
        assert registered.left_out["version control, caches and the like"][0] == 4


def test_a_store_may_lie_among_the_images_but_not_be_their_place(store_uri: str, data_uri: str, labels: Path) -> None:
    inner = f"{data_uri}/our store"
    first = register_uri(data_uri, inner, labels=labels)
    again = register_uri(data_uri, inner, labels=labels)
    assert (again.version, again.in_place_files, again.sent_bytes) == (first.version, 8, 0)
    if data_uri.startswith("file:"):
        assert again.left_out["the store itself"] == (1, "our store/")
    else:
        assert again.left_out["objects of the store itself"][0] == len(objects(inner))
    for place in (data_uri, f"{store_uri}/files/x"):
        if place.startswith("file:"):
            to_path(place).mkdir(parents=True, exist_ok=True)
        with pytest.raises(TrainerError, match="keeps its own objects") as caught:
            register_uri(place, data_uri if place == data_uri else store_uri)
        assert caught.value.code is ExitCode.CONFIG


def test_labels_that_fit_no_image_are_refused(store_uri: str, data_uri: str, labels: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(labels / "labels", tmp_path / "moved/train/labels")
    error = refused(data_uri, store_uri, labels=moved.parent.parent)
    assert "none of the 8 images" in error.message
    assert "images/train/Zelle ü 0.png" in error.message
    assert "train/labels/train/" in error.message
    assert "a training looks for labels/train/Zelle ü 0.txt" in error.hint
    file = coco(tmp_path / "boxes.json", ["other/a.png", "b.png"])
    assert "b.png" in refused(data_uri, store_uri, labels=file).message
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/readme.txt").touch()
    assert "has no labels" in refused(data_uri, store_uri, labels=tmp_path / "nothing").message
    assert refused(data_uri, store_uri, labels=tmp_path / "none").code is ExitCode.NOT_FOUND


def test_an_image_on_both_sides_is_refused(store_uri: str, data_uri: str, labels: Path) -> None:
    (labels / "images/val").mkdir(parents=True)
    (labels / "images/val/val 0.png").write_bytes(b"x")
    assert "images/val/val 0.png is an image both in" in refused(data_uri, store_uri, labels=labels).message


def test_a_place_without_images_is_refused(store_uri: str, data_uri: str) -> None:
    assert refused(data_uri, store_uri).code is ExitCode.NOT_FOUND
    put(data_uri, "notes.txt", b"x")
    assert refused(data_uri, store_uri).code is ExitCode.DATA
    assert refused(f"{data_uri}/none", store_uri).code is ExitCode.NOT_FOUND


def test_objects_that_nobody_may_read_are_told_as_such(s3: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store may be read, the bucket of the images may not; moto knows this of S3 only."""
    import boto3

    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    for name, value in s3.settings().items():
        monkeypatch.setenv(name, value)
    ours, theirs = (f"{kind}-{uuid4().hex[:12]}" for kind in ("ours", "theirs"))
    client = boto3.client("s3")
    for bucket in (ours, theirs):
        client.create_bucket(Bucket=bucket)
    put(f"s3://{theirs}/images", "a.png", b"x")
    registered = register_uri(f"s3://{theirs}/images", f"s3://{ours}/store")
    everything = [f"arn:aws:s3:::{theirs}/*", f"arn:aws:s3:::{theirs}"]
    denied = {"Effect": "Deny", "Principal": "*", "Action": ["s3:GetObject"], "Resource": everything}
    client.put_bucket_policy(Bucket=theirs, Policy=json.dumps({"Version": "2012-10-17", "Statement": [denied]}))
    with pytest.raises(TrainerError, match=rf"s3://{theirs}/images/a\.png: access denied") as refused:
        fetch_version(f"s3://{ours}/store", registered.version, tmp_path / "copy")
    assert refused.value.code is ExitCode.PERMISSION
    with pytest.raises(TrainerError, match="no such bucket"):
        register_uri("s3://not-there-at-all/images", f"s3://{ours}/store")


def test_a_uri_with_a_signature_is_not_taken_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="more than bucket and prefix") as refused:
        register_uri("az://container/images?sig=secret", tmp_path.as_uri())
    assert "secret" not in str(refused.value)
    assert refused.value.code is ExitCode.CONFIG


@pytest.mark.parametrize("store_uri", ["file", "s3"], indirect=True)
def test_a_name_that_no_folder_can_hold_is_refused(store_uri: str, data_uri: str) -> None:
    put(data_uri, "a.png", b"x")
    if data_uri.startswith("file:"):
        (to_path(data_uri) / "new\nline.png").write_bytes(b"x")
    else:
        import boto3

        bucket, _, prefix = data_uri.removeprefix("s3://").partition("/")
        boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/a//b.png", Body=b"x")
    error = refused(data_uri, store_uri)
    assert error.code is ExitCode.DATA
    assert "rename or delete that object" in error.hint


def test_a_folder_can_be_staged_under_the_name_afterwards(store_uri: str, data_uri: str, labels: Path, tmp_path: Path) -> None:
    registered = register_uri(data_uri, store_uri, labels=labels)
    copy = fetched(store_uri, registered, tmp_path / "copy")
    staged = stage_folder(copy, store_uri, "cells")
    assert staged.version != registered.version
    obstore.delete(open_store(data_uri), sorted(objects(data_uri)))
    fetch_version(store_uri, staged.version, tmp_path / "again")
    assert usable_images(tmp_path / "again") == 8


def test_the_command_tells_what_lies_where(store_uri: str, data_uri: str, labels: Path) -> None:
    label(labels / "labels/val/other.txt")
    told = CliRunner().invoke(dataset, ["register", data_uri, "--store", store_uri, "--labels", str(labels)], catch_exceptions=False)
    assert f"8 of them, {obstore_size(data_uri)} B, in place at {data_uri}" in told.output
    assert "8 of 8 images have one" in told.output
    assert "labels without an image: 1, such as labels/val/other.txt" in told.output
    shown = CliRunner().invoke(dataset, ["show", "cells", "--store", store_uri, "--json"], catch_exceptions=False)
    assert json.loads(shown.output)["in_place"] == {data_uri: 8}
    again = ["register", data_uri, "--store", store_uri, "--labels", str(labels), "--json"]
    assert json.loads(CliRunner().invoke(dataset, again, catch_exceptions=False).output)["sent_bytes"] == 0


def obstore_size(uri: str) -> int:
    return sum(obstore.head(open_store(uri), key)["size"] for key in objects(uri))
