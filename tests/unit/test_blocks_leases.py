"""What a stage does about a collection that it finds, step by step, on a folder. Whole stories are in tests/contract."""

from __future__ import annotations

import os
import random
import shutil
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest

from blocks.garbage import Policy, collect, open_marker
from blocks.leases import DEAD_AFTER, MARK_KEY, Collection, StoreChanged, check_generation, read_mark, settled_generation, until_unchanged
from blocks.refs import delete_ref
from blocks.staging import Staged, stage_folder
from trainer.contract import ExitCode, TrainerError
from trainer.storage import list_paths, open_store
from trainer.verifying import verify_version

AT_ONCE = Policy(grace=timedelta(0), keep_previous=0)


@pytest.fixture
def store_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("blocks.leases.LOOK_SECONDS", 0.01)
    return (tmp_path / "store").as_uri()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    root.mkdir()
    for number in range(20):
        write(root / f"{number}.jpg", random.Random(number).randbytes(500))
    return root


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9 + content[0]))


def keys(store_uri: str, kind: str) -> set[str]:
    return set(list_paths(open_store(store_uri), kind))


def free(store_uri: str) -> None:
    collect(open_marker(store_uri), store_uri, AT_ONCE, ())


def test_what_is_gone_is_sent_again_before_a_manifest_names_it(store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that believes in a pack that was freed: at no moment is there a manifest without its packs."""
    old = (source / "1.jpg").read_bytes()
    stage_folder(source, store_uri)
    for number in range(20):
        write(source / f"{number}.jpg", b"%d" % number * 500)
    stage_folder(source, store_uri)
    free(store_uri)
    write(source / "1.jpg", old)
    put, packs = obstore.put, list[set[str]]()

    def looking(store: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if path.startswith("manifests/"):
            packs.append(keys(store_uri, "packs"))
        return put(store, path, *arguments, **options)

    monkeypatch.setattr(obstore, "put", looking)
    staged = stage_folder(source, store_uri)
    assert packs == [keys(store_uri, "packs")]
    assert verify_version(store_uri, staged.version).files == 20


def test_a_manifest_without_its_packs_is_not_taken_over(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stager that died after it slept has left it; the same files come from elsewhere, packed otherwise."""
    stage_folder(source, store_uri)
    store = open_store(store_uri)
    delete_ref(store, store_uri, "source")
    store.delete(sorted(keys(store_uri, "packs")))
    shutil.rmtree(tmp_path / "home/staging")
    monkeypatch.setattr("blocks.uploads.PACK_BYTES", 2000)
    staged = stage_folder(source, store_uri)
    assert verify_version(store_uri, staged.version).files == 20


def test_a_stage_waits_for_a_collection_that_deletes(store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache is lost, and it would find packs in the store that are about to go."""
    stage_folder(source, store_uri)
    delete_ref(open_store(store_uri), store_uri, "source")
    shutil.rmtree(tmp_path / "home/staging")
    delete, results = obstore.delete, list[Staged]()
    thread = threading.Thread(target=lambda: results.append(stage_folder(source, store_uri)))

    def meddling(store: Any, paths: Any) -> Any:
        if any(path.startswith("packs/") for path in paths):
            thread.start()
            while not keys(store_uri, "leases"):
                time.sleep(0.01)
            time.sleep(0.3)  # it has asked several times
            assert not keys(store_uri, "manifests")
        return delete(store, paths)

    monkeypatch.setattr(obstore, "delete", meddling)
    free(store_uri)
    thread.join()
    [staged] = results
    assert verify_version(store_uri, staged.version).files == 20


def test_a_generation_is_told_from_the_next(store_uri: str) -> None:
    store = open_store(store_uri)
    assert settled_generation(store, store_uri) == ""
    check_generation(store, store_uri, "")
    collection = Collection(store, store_uri)
    with pytest.raises(StoreChanged):
        check_generation(store, store_uri, "")
    collection.end()
    collection.end()
    known = settled_generation(store, store_uri)
    check_generation(store, store_uri, known)
    Collection(store, store_uri).end()
    with pytest.raises(StoreChanged):
        check_generation(store, store_uri, known)
    assert keys(store_uri, "") == {MARK_KEY, f"{MARK_KEY}.lock"}


def test_who_waits_for_a_dead_collection_says_so_once_and_asks_less_and_less(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store, pauses, told = open_store(store_uri), list[float](), list[str]()
    Collection(store, store_uri)  # and its process is killed
    _, _, written = read_mark(store, store_uri)
    assert written is not None
    monkeypatch.setattr("blocks.leases.LOOK_SECONDS", 1.0)
    monkeypatch.setattr("blocks.leases.time.sleep", pauses.append)
    settled_generation(store, store_uri, lambda: written + timedelta(seconds=sum(pauses)), told.append)
    assert DEAD_AFTER.total_seconds() < sum(pauses) < DEAD_AFTER.total_seconds() + 5
    assert len(pauses) < 60
    [line] = told
    assert f"garbage collection of {socket.gethostname()}, begun at " in line
    assert 580 < int(line.partition(" s if")[0].rpartition(" ")[2]) <= 595


def test_a_swap_whose_answer_was_lost_has_begun_the_collection(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from blocks import leases

    swap = leases.swap

    def losing(*arguments: Any) -> bool:
        swap(*arguments)
        return False

    monkeypatch.setattr("blocks.leases.swap", losing)
    assert Collection(open_store(store_uri), store_uri).may_delete()


def test_collections_without_end_are_one_error(store_uri: str) -> None:
    def work() -> None:
        raise StoreChanged

    with pytest.raises(TrainerError, match="collected from it all the time") as refused:
        until_unchanged(work, store_uri)
    assert refused.value.code is ExitCode.UNAVAILABLE


def test_a_damaged_mark_is_one_error(store_uri: str, source: Path) -> None:
    store = open_store(store_uri)
    store.put(MARK_KEY, b"{")
    for call in (lambda: read_mark(store, store_uri), lambda: stage_folder(source, store_uri), lambda: free(store_uri)):
        with pytest.raises(TrainerError, match=r"gc\.json is damaged") as refused:
            call()
        assert refused.value.code is ExitCode.DATA


def test_a_lease_that_cannot_be_written_is_the_stages_error(store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.exceptions import PermissionDeniedError

    put = obstore.put

    def refusing(store: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if path.startswith("leases/"):
            raise PermissionDeniedError("refused")
        return put(store, path, *arguments, **options)

    monkeypatch.setattr(obstore, "put", refusing)
    with pytest.raises(TrainerError, match="access denied"):
        stage_folder(source, store_uri)
