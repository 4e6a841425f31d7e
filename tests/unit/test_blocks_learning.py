"""What a stage asks of other datasets, and when, on a folder. Whole stories are in tests/contract."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest

from blocks.garbage import Policy, collect, open_marker
from blocks.learning import LOOK_BYTES, price
from blocks.refs import Ref, delete_ref
from blocks.staging import stage_folder
from trainer.errors import ExitCode, TrainerError
from trainer.storage import list_paths, open_store
from trainer.verifying import verify_version

KIB = 1024


@pytest.fixture
def store_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store with two datasets that have a version each."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("blocks.leases.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("blocks.staging.READ_FILES", 1)
    monkeypatch.setattr("blocks.reading.TAKE_BYTES", 1)
    uri = (tmp_path / "store").as_uri()
    for name in ("one", "other"):
        stage(tmp_path, uri, name, [0])
    return uri


def stage(folder: Path, uri: str, name: str, numbers: Iterable[int]) -> int:
    """Adds files of 300 KiB, and stages. Returns the bytes that were sent, once the version is whole."""
    (folder / name).mkdir(exist_ok=True)
    for number in numbers:
        (folder / name / f"{number}.bin").write_bytes(b"%03d" % number * 100 * KIB)
        os.utime(folder / name / f"{number}.bin", (1e9, 1e9))
    staged = stage_folder(folder / name, uri)
    assert verify_version(uri, staged.version).files == staged.files
    return staged.sent_bytes


def note_lists(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    listing, asked = obstore.list, list[str]()

    def noting(store: Any, prefix: str, **options: Any) -> Any:
        asked.append(prefix)
        return listing(store, prefix, **options)

    monkeypatch.setattr(obstore, "list", noting)
    return asked


def test_little_new_content_asks_for_nothing(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = note_lists(monkeypatch)
    stage(tmp_path, store_uri, "one", [1, 2])
    assert asked == []


def test_the_state_of_another_dataset_is_asked_for_once(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = note_lists(monkeypatch)
    reads: list[str] = []
    monkeypatch.setattr("blocks.learning.Learner.files_of", lambda _, version: reads.append(version) or iter(()))  # pyright: ignore
    stage(tmp_path, store_uri, "one", range(1, 5))
    assert asked == ["refs", "packs", "files"]
    asked.clear()
    stage(tmp_path, store_uri, "one", range(5, 9))
    assert asked == ["refs"]
    assert len(reads) == 1
    stage(tmp_path, store_uri, "other", [101])
    stage(tmp_path, store_uri, "one", range(9, 13))
    assert len(reads) == 2


def test_a_dataset_of_many_files_is_asked_for_when_that_is_worth_it() -> None:
    assert price(Ref(version="v", files=1, bytes=1)) == LOOK_BYTES
    assert price(Ref(version="v", files=10**6, bytes=1)) == 10**8


def test_what_is_too_dear_at_first_is_asked_for_later(store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage(tmp_path, store_uri, "other", range(1, 13))
    monkeypatch.setattr("blocks.learning.FILE_BYTES", 2 * LOOK_BYTES // 13)
    sent = stage(tmp_path, store_uri, "one", range(1, 13))
    assert 6 * 300 * KIB < sent < 7 * 300 * KIB, "with the seventh file there are two MiB"


def test_a_pack_of_another_dataset_that_the_store_lacks_is_not_relied_on(store_uri: str, tmp_path: Path) -> None:
    before = set((tmp_path / "store").rglob("*.tar"))
    stage(tmp_path, store_uri, "other", range(1, 9))
    for pack in set((tmp_path / "store").rglob("*.tar")) - before:
        pack.unlink()
    assert stage(tmp_path, store_uri, "one", range(1, 9)) > 8 * 300 * KIB


@pytest.mark.parametrize("moment", ["before it asks", "after it has asked"])
@pytest.mark.parametrize("asleep", [False, True])
def test_what_another_dataset_had_is_collected_beside_the_stage(
    store_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, asleep: bool
) -> None:
    """Its ref is taken away at the worst moment, and garbage is collected. A stage that was asleep has lost its lease."""
    stage(tmp_path, store_uri, "other", range(1, 9))
    from blocks.learning import Learner

    learn_others, refused = Learner.learn_others, list[ExitCode]()

    def meddle() -> None:
        store = open_store(store_uri)
        delete_ref(store, store_uri, "other")
        if asleep:
            store.delete(sorted(list_paths(store, "leases")))
        try:
            collect(open_marker(store_uri), store_uri, Policy(grace=timedelta(0), keep_previous=0), ())
        except TrainerError as exc:
            refused.append(exc.code)

    def meddling(self: Learner, new_bytes: float) -> dict[str, int]:
        monkeypatch.setattr(Learner, "learn_others", learn_others)
        if moment == "before it asks":
            meddle()
            return learn_others(self, new_bytes)
        found = learn_others(self, new_bytes)
        meddle()
        return found

    monkeypatch.setattr(Learner, "learn_others", meddling)
    sent = stage(tmp_path, store_uri, "one", range(1, 9))
    assert refused == ([] if asleep else [ExitCode.OCCUPIED])
    assert (sent > 8 * 300 * KIB) is (asleep or moment == "before it asks")
