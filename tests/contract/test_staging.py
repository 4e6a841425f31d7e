"""One suite for every store: a folder, S3 (moto's server) and Azure (Azurite)."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from blocks.garbage import Policy, collect, open_marker
from blocks.refs import read_ref, read_refs, resolve_version
from blocks.staging import stage_folder
from blocks.uploads import LARGE_BYTES
from tests.contract.staged import assert_same, get, objects, put, record_puts, touch_old
from trainer.contract import ExitCode, TrainerError
from trainer.fetching import fetch_version
from trainer.packs import manifest_key
from trainer.storage import open_store
from trainer.store_records import swap
from trainer.verifying import verify_version


def test_round_trip_is_bit_exact(store_uri: str, source: Path, tmp_path: Path) -> None:
    staged = stage_folder(source, store_uri)
    assert staged.files == sum(path.is_file() for path in source.rglob("*"))
    fetched = fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert (fetched.files, fetched.bytes) == (staged.files, staged.bytes)
    assert_same(source, tmp_path / "copy")
    assert verify_version(store_uri, staged.version).files == staged.files
    assert fetch_version(store_uri, staged.version, tmp_path / "copy").fetched_files == 0


def test_nothing_changed_sends_nothing(store_uri: str, source: Path) -> None:
    first = stage_folder(source, store_uri)
    before = objects(store_uri)
    again = stage_folder(source, store_uri)
    assert (again.version, again.sent_bytes, again.changed_files) == (first.version, 0, 0)
    assert objects(store_uri) == before


def test_a_lost_cache_reads_again_and_sends_no_content(store_uri: str, source: Path, tmp_path: Path) -> None:
    first = stage_folder(source, store_uri)
    before = objects(store_uri)
    shutil.rmtree(tmp_path / "home/staging")
    again = stage_folder(source, store_uri)
    assert (again.version, again.changed_files) == (first.version, first.files)
    assert objects(store_uri) == before


def test_only_what_changed_travels(store_uri: str, source: Path, tmp_path: Path) -> None:
    first = stage_folder(source, store_uri)
    touch_old(source / "d1/img 0001 ü.jpg", b"x" * 8192)
    (source / "d2/img 0002 ü.jpg").rename(source / "renamed.jpg")
    (source / "d3/img 0003 ü.jpg").unlink()
    (source / "large.bin").unlink()
    second = stage_folder(source, store_uri)
    assert second.sent_bytes < 8192 + 512 + 1024 + 2_000, "the changed file, its tar header, and a manifest that says what differs"
    for version, name in ((first.version, "old"), (second.version, "new")):
        fetch_version(store_uri, version, tmp_path / name)
    assert_same(source, tmp_path / "new")
    assert (tmp_path / "old/d2/img 0002 ü.jpg").exists()


def test_a_long_chain_of_small_changes_stays_readable(store_uri: str, source: Path, tmp_path: Path) -> None:
    for number in range(12):
        touch_old(source / f"d1/new {number}", f"{number}".encode())
        staged = stage_folder(source, store_uri)
    fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")


def test_a_file_touched_without_change_makes_no_version(store_uri: str, source: Path) -> None:
    first = stage_folder(source, store_uri)
    os.utime(source / "d0-1")
    again = stage_folder(source, store_uri)
    assert (again.version, again.changed_files, again.sent_bytes) == (first.version, 1, 0)


def test_a_change_back_finds_what_is_there(store_uri: str, source: Path, tmp_path: Path) -> None:
    content = (source / "large.bin").read_bytes()
    first = stage_folder(source, store_uri)
    touch_old(source / "large.bin", b"other")
    stage_folder(source, store_uri)
    touch_old(source / "large.bin", content)
    third = stage_folder(source, store_uri)
    assert third.version == first.version
    assert third.sent_bytes < 20_000
    fetch_version(store_uri, third.version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")


def test_a_store_that_was_emptied_is_filled_again(store_uri: str, source: Path, tmp_path: Path) -> None:
    import obstore

    first = stage_folder(source, store_uri)
    obstore.delete(open_store(store_uri), sorted(objects(store_uri)))
    again = stage_folder(source, store_uri)
    assert again.version == first.version
    fetch_version(store_uri, first.version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")


def test_a_store_that_was_emptied_and_filled_from_another_home_is_asked_what_it_has(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has the version that this home knows, in other packs. Only what is gone is sent, and the version before is whole, too."""
    import obstore

    images = sorted(source.rglob("img *.jpg"))
    old = {path: path.read_bytes() for path in images}
    for path in images[:4]:
        touch_old(path, old[path] + b"first")
    stage_folder(source, store_uri)
    for path in images[:4]:
        touch_old(path, old[path])
    first = stage_folder(source, store_uri)
    obstore.delete(open_store(store_uri), sorted(objects(store_uri)))
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TRAINYARD_HOME", str(tmp_path / "other home"))
        elsewhere.setattr("blocks.uploads.PACK_BYTES", 60_000)
        assert stage_folder(source, store_uri).version == first.version
    for path in images[:4]:
        touch_old(path, old[path] + b"first")
    touch_old(source / "d0-1", b"new")
    second = stage_folder(source, store_uri)
    assert second.sent_bytes < 60_000
    for staged in (first, second):
        assert verify_version(store_uri, staged.version).files == staged.files


def test_two_homes_that_move_one_ref_at_once_lose_nothing(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two folders under one name, and each has seen no ref when it writes its own: one has to go on from the other's."""
    other = shutil.copytree(source, tmp_path / "other")
    touch_old(other / "d1/img 0001 ü.jpg", b"of the other")
    both, answers = threading.Barrier(2), list[bool]()

    def meeting(*arguments: Any) -> bool:
        if not answers:
            both.wait(60)
        answers.append(swap(*arguments))
        return answers[-1]

    monkeypatch.setattr("blocks.refs.swap", meeting)
    monkeypatch.setattr("blocks.stat_cache.home", lambda: tmp_path / threading.current_thread().name)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda root: stage_folder(root, store_uri, "shared"), (source, other)))
    assert sorted(answers)[-2:] == [True, True]
    assert False in answers
    assert len({staged.version for staged in results}) == 2
    ref, _ = read_ref(open_store(store_uri), store_uri, "shared")
    assert ref is not None
    assert {ref.version, *ref.previous} == {staged.version for staged in results}
    for staged in results:
        assert verify_version(store_uri, staged.version).files == staged.files


@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
@pytest.mark.parametrize("kind", ["packs/", "files/", "manifests/"])
def test_damage_is_refused_and_nothing_half_is_left(store_uri: str, source: Path, tmp_path: Path, kind: str, damage: str) -> None:
    import obstore

    staged = stage_folder(source, store_uri)
    [key] = [key for key in objects(store_uri) if key.startswith(kind)]
    data = get(store_uri, key)
    if damage == "gone":
        obstore.delete(open_store(store_uri), key)
    else:
        put(store_uri, key, bytes(byte ^ 255 for byte in data) if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(TrainerError) as refused:
        fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert refused.value.code in (ExitCode.DATA, ExitCode.NOT_FOUND, ExitCode.UNAVAILABLE)
    assert not (tmp_path / "copy").exists()
    again = stage_folder(source, store_uri, again=True)
    assert again.version == staged.version
    fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")
    assert sorted(path.name for path in tmp_path.glob("copy*")) == ["copy"]


@pytest.mark.parametrize("cache", ["kept", "lost"])
def test_staging_again_sends_what_is_missing_or_wrong_and_mends_older_versions(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    import obstore

    monkeypatch.setattr("blocks.uploads.PACK_BYTES", 60_000)
    first = stage_folder(source, store_uri)
    touch_old(source / "d1/img 0001 ü.jpg", b"changed")
    second = stage_folder(source, store_uri)
    flipped, gone, *rest = sorted(key for key in objects(store_uri) if key.startswith("packs/") and len(get(store_uri, key)) > 50_000)
    assert len(rest) >= 2
    [large] = [key for key in objects(store_uri) if key.startswith("files/")]
    put(store_uri, flipped, bytes(byte ^ 255 for byte in get(store_uri, flipped)))
    put(store_uri, large, get(store_uri, large)[:-1])
    obstore.delete(open_store(store_uri), gone)
    if cache == "lost":
        shutil.rmtree(tmp_path / "home/staging")
    with monkeypatch.context() as patched:
        sent = record_puts(patched)
        assert stage_folder(source, store_uri, again=True).version == second.version
    assert {key for key in sent if key.startswith(("packs/", "files/"))} == {flipped, gone, large}
    for staged in (first, second):
        assert verify_version(store_uri, staged.version).files == staged.files


def test_staging_again_where_only_the_manifest_is_gone_sends_only_that(
    store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    staged = stage_folder(source, store_uri)
    obstore.delete(open_store(store_uri), manifest_key(staged.version))
    sent = record_puts(monkeypatch)
    assert stage_folder(source, store_uri, again=True).version == staged.version
    assert [key for key in sent if key.startswith(("packs/", "files/", "manifests/"))] == [manifest_key(staged.version)]
    assert verify_version(store_uri, staged.version).files == staged.files


def test_a_fetch_that_was_cut_goes_on(store_uri: str, source: Path, tmp_path: Path) -> None:
    staged = stage_folder(source, store_uri)
    partial = tmp_path / f"copy.partial-{staged.version[:12]}"
    shutil.copytree(source, partial)
    (partial / "d0-1").write_bytes(b"sorts between d0 and X0/")
    (partial / "large.bin").write_bytes(b"half")
    fetched = fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert fetched.fetched_files == 2
    assert_same(source, tmp_path / "copy")


def test_a_folder_with_other_files_is_left_alone(store_uri: str, source: Path, tmp_path: Path) -> None:
    staged = stage_folder(source, store_uri)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/note.txt").write_text("keep")
    with pytest.raises(TrainerError, match="holds other files"):
        fetch_version(store_uri, staged.version, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["note.txt"]


@pytest.mark.parametrize("to", ["/proc/none", "/proc/none/below", "a file", "a file/below"])
def test_a_place_that_cannot_be_written_is_one_error(store_uri: str, source: Path, tmp_path: Path, to: str) -> None:
    staged = stage_folder(source, store_uri)
    (tmp_path / "a file").touch()
    with pytest.raises(TrainerError) as refused:
        fetch_version(store_uri, staged.version, tmp_path / to)
    assert refused.value.code in (ExitCode.OCCUPIED, ExitCode.PERMISSION)
    assert "folder" in refused.value.hint
    assert "vanished" not in refused.value.hint
    assert not (tmp_path / "a file.lock").exists()


def test_a_large_file_that_changes_while_it_is_sent_is_not_kept(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    monkeypatch.setattr("blocks.staging.MEMORY_BYTES", LARGE_BYTES)
    put = obstore.put

    def meddling(store: Any, path: str, data: Any, **options: Any) -> Any:
        if isinstance(data, Iterator):  # a file too large to hold
            (source / "copy of large.bin").write_bytes(b"other" * 300_000)  # the first of that content
        return put(store, path, data, **options)

    monkeypatch.setattr(obstore, "put", meddling)
    with pytest.raises(TrainerError, match="changed while it was staged"):
        stage_folder(source, store_uri)
    monkeypatch.setattr(obstore, "put", put)
    assert not [key for key in objects(store_uri) if key.startswith("files/")]
    staged = stage_folder(source, store_uri)
    fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")


def test_names_and_versions_are_found(store_uri: str, source: Path) -> None:
    staged = stage_folder(source, store_uri, "cells")
    store = open_store(store_uri)
    assert list(read_refs(store, store_uri).whole) == ["cells"]
    assert {resolve_version(store, store_uri, text) for text in ("cells", staged.version, staged.version[:8])} == {staged.version}
    with pytest.raises(TrainerError, match="no dataset or version"):
        resolve_version(store, store_uri, "none")
    assert manifest_key(staged.version) in objects(store_uri)


@pytest.mark.parametrize("name", ["../x", "no text \udce9"])
def test_an_unwritable_name_is_refused(store_uri: str, source: Path, name: str) -> None:
    with pytest.raises(TrainerError, match="no name of a dataset"):
        stage_folder(source, store_uri, name)


def test_what_another_dataset_has_brought_meanwhile_is_not_sent_again(store_uri: str, source: Path, tmp_path: Path) -> None:
    """Both have a version, and the same new files."""
    import obstore

    other = shutil.copytree(source, tmp_path / "other")
    stage_folder(source, store_uri)
    stage_folder(other, store_uri)
    for root in (source, other):
        for number in range(20):
            touch_old(root / f"new {number}.jpg", b"%d" % number * 70_000)
        touch_old(root / "new large.bin", b"large" * LARGE_BYTES)
    first = stage_folder(other, store_uri)
    assert first.sent_bytes > 6 * LARGE_BYTES
    second = stage_folder(source, store_uri)
    assert second.sent_bytes < LARGE_BYTES, "what was found before that was worth to ask"
    assert stage_folder(source, store_uri).changed_files == 0
    obstore.delete(open_store(store_uri), "refs/other.json")
    collect(open_marker(store_uri), store_uri, Policy(grace=timedelta(0), keep_previous=0), ())
    assert verify_version(store_uri, second.version).files == second.files


def test_another_name_for_what_the_store_has_sends_no_content(store_uri: str, source: Path, tmp_path: Path) -> None:
    first = stage_folder(source, store_uri, "one")
    shutil.rmtree(tmp_path / "home/staging")
    before = objects(store_uri)
    touch_old(source / "d0-1", b"changed")
    second = stage_folder(source, store_uri, "two")
    assert second.sent_bytes < 50_000 < first.sent_bytes, "the changed file and a manifest"
    assert len([key for key in objects(store_uri) - before if key.startswith(("packs/", "files/"))]) == 1
    assert verify_version(store_uri, second.version).files == second.files
