"""Garbage collection beside stages, pins and crashes, on every store: a folder and S3 (moto's server)."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from blocks.garbage import Freed, Policy, Reason, collect, open_marker, pin_version, plan_collection, unpin_version
from blocks.leases import MARK_KEY, Lease
from blocks.refs import delete_ref, read_ref
from blocks.staging import Staged, stage_folder
from blocks.uploads import LARGE_BYTES
from trainer.contract import ExitCode, TrainerError, utc_now
from trainer.storage import list_paths, open_store
from trainer.verifying import verify_version

AT_ONCE = Policy(grace=timedelta(0))
NEWEST_ONLY = Policy(grace=timedelta(0), keep_previous=0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Small files and a large one, none of them fresh from the clock's view."""
    root = tmp_path / "source"
    rng = random.Random(1)
    for number in range(20):
        write(root / f"d{number % 3}/{number}.jpg", rng.randbytes(500))
    write(root / "large.bin", rng.randbytes(LARGE_BYTES + 1))
    return root


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (1e9, 1e9 + len(content) + content[0]))


def objects(store_uri: str, *kinds: str) -> set[str]:
    return {path for path in list_paths(open_store(store_uri), "") if path.startswith(kinds or ("packs/", "files/", "manifests/"))}


def free(store_uri: str, policy: Policy = AT_ONCE, runs: tuple[str, ...] = ()) -> Freed:
    return collect(open_marker(store_uri), store_uri, policy, runs)


def assert_whole(store_uri: str, *stages: Staged) -> None:
    for staged in stages:
        assert verify_version(store_uri, staged.version).files == staged.files


def stage_many(source: Path, store_uri: str, count: int) -> list[Staged]:
    stages: list[Staged] = []
    for number in range(count):
        write(source / "d0/changing.jpg", b"%d" % number * 2000)
        stages.append(stage_folder(source, store_uri))
    return stages


def test_nothing_that_a_ref_or_its_previous_versions_need_is_freed(store_uri: str, source: Path) -> None:
    stages = stage_many(source, store_uri, 13)
    before = objects(store_uri)
    assert free(store_uri, Policy()) == Freed(0, 0, 0), "all is younger than a day"
    assert objects(store_uri) == before
    free(store_uri)
    # The oldest two are below the others, or below nothing: of a difference the manifests below stay, with all that they name.
    assert_whole(store_uri, *stages[2:])
    freed = free(store_uri, NEWEST_ONLY)
    assert freed.objects > 0
    assert_whole(store_uri, stages[-1])
    [_] = [key for key in objects(store_uri) if key.startswith("files/")]


def test_previous_versions_can_be_kept_for_a_time_only(store_uri: str, source: Path) -> None:
    stages = stage_many(source, store_uri, 12)
    free(store_uri, Policy(grace=timedelta(0), previous_for=timedelta(hours=1)))
    assert_whole(store_uri, *stages[2:])
    free(store_uri, Policy(grace=timedelta(0), previous_for=timedelta(0)))
    assert free(store_uri, NEWEST_ONLY) == Freed(0, 0, 0), "the limit of zero has freed all that no limit of none would"


def test_after_the_name_is_gone_all_is_freed_and_what_is_foreign_stays(store_uri: str, source: Path) -> None:
    import obstore

    staged = stage_folder(source, store_uri)
    store = open_store(store_uri)
    foreign = {"packs/readme.txt", "files/ab/image.jpg", "manifests/old.jsonl.gz", "data/1.jpg", f"elsewhere/packs/ab/{'a' * 64}.tar"}
    for key in foreign:
        obstore.put(store, key, b"mine")
    delete_ref(store, store_uri, "source")
    freed = free(store_uri)
    assert freed.objects == 3
    assert freed.bytes > staged.bytes
    assert set(list_paths(store, "")) - {"refs/source.json.lock", f"{MARK_KEY}.lock"} == {*foreign, MARK_KEY}


def test_pins_and_open_runs_keep_a_version(store_uri: str, source: Path) -> None:
    first, second = stage_many(source, store_uri, 2)
    store = open_store(store_uri)
    pin_version(store, store_uri, "run1", first.version, days=7)
    delete_ref(store, store_uri, "source")
    free(store_uri, runs=(second.version,))
    assert_whole(store_uri, first, second)
    free(store_uri)
    assert_whole(store_uri, first)
    unpin_version(store, store_uri, "run1")
    unpin_version(store, store_uri, "run1")
    free(store_uri)
    assert not objects(store_uri)
    with pytest.raises(TrainerError, match="has no dataset version") as refused:
        pin_version(store, store_uri, "run1", first.version, days=7)
    assert refused.value.code is ExitCode.NOT_FOUND
    assert not objects(store_uri, "pins/")


def test_a_pin_ends(store_uri: str, source: Path) -> None:
    staged = stage_folder(source, store_uri)
    store = open_store(store_uri)
    pin_version(store, store_uri, "run1", staged.version, days=1)
    delete_ref(store, store_uri, "source")
    marker = open_marker(store_uri)
    plan = plan_collection(marker, store_uri, AT_ONCE, (), utc_now() + timedelta(hours=23))
    assert set(plan.kept) == {Reason.PIN}
    plan = plan_collection(marker, store_uri, AT_ONCE, (), utc_now() + timedelta(hours=25))
    assert {kind: count for kind, (count, _) in plan.by_kind().items()} == {"manifests": 1, "packs": 1, "files": 1, "pins": 1}


def test_a_damaged_manifest_that_is_needed_frees_nothing(store_uri: str, source: Path) -> None:
    import obstore

    stages = stage_many(source, store_uri, 2)
    before = objects(store_uri)
    store = open_store(store_uri)
    obstore.put(store, f"manifests/{stages[0].version}.jsonl.gz", b"harm")
    with pytest.raises(TrainerError, match="damaged"):
        free(store_uri)
    obstore.delete(store, f"manifests/{stages[1].version}.jsonl.gz")
    with pytest.raises(TrainerError, match=r"lacks the manifest of version .*; a ref needs it"):
        free(store_uri)
    assert objects(store_uri) == before - {f"manifests/{stages[1].version}.jsonl.gz"}
    stage_folder(source, store_uri, again=True)
    assert_whole(store_uri, stages[1])


# --- Beside others ---------------------------------------------------------------------------------------


def test_a_cache_that_believes_in_what_was_freed_is_found_out(store_uri: str, source: Path, tmp_path: Path) -> None:
    """The content of a freed version comes back into the folder, whose cache knows where it was."""
    old = (source / "d1/1.jpg").read_bytes()
    stage_folder(source, store_uri)
    write(source / "large.bin", b"short now")
    for number in range(20):
        write(source / f"d{number % 3}/{number}.jpg", b"%d" % number * 500)
    stage_folder(source, store_uri)
    free(store_uri, NEWEST_ONLY)
    assert not objects(store_uri, "files/")
    write(source / "d1/1.jpg", old)
    third = stage_folder(source, store_uri)
    assert_whole(store_uri, third)
    assert third.sent_bytes < 10_000, "only what was gone, and a manifest"
    assert stage_folder(source, store_uri).changed_files == 0
    assert not objects(store_uri, "leases/")


def meddle(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], bool], action: Callable[[], None]) -> list[str]:
    """Does `action` once, just before the first write to a key for which `before` is true. Returns the keys written."""
    import obstore

    put, written, done = obstore.put, list[str](), list[bool]()

    def meddling(store: Any, path: str, *arguments: Any, **options: Any) -> Any:
        if not done and before(path):
            done.append(True)
            action()
        written.append(path)
        return put(store, path, *arguments, **options)

    monkeypatch.setattr(obstore, "put", meddling)
    return written


def expire_leases(store_uri: str) -> None:
    """As ten minutes of a suspended machine do."""
    open_store(store_uri).delete(sorted(objects(store_uri, "leases/")))


@pytest.mark.parametrize("moment", ["manifests/", "refs/"])
def test_a_collection_beside_a_live_stage_frees_nothing(store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    refused: list[TrainerError] = []

    def work() -> None:
        with pytest.raises(TrainerError, match="under way") as raised:
            free(store_uri)
        refused.append(raised.value)

    meddle(monkeypatch, lambda key: key.startswith(moment), work)
    staged = stage_folder(source, store_uri)
    assert [error.code for error in refused] == [ExitCode.OCCUPIED]
    assert_whole(store_uri, staged)
    assert not objects(store_uri, "leases/")


@pytest.mark.parametrize("moment", ["manifests/", "refs/"])
def test_a_stage_that_slept_through_a_collection_sends_again_what_was_freed(
    store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Its lease has ended, its packs are gone: just before the manifest, or between the last look and the ref."""

    def work() -> None:
        expire_leases(store_uri)
        assert free(store_uri).objects >= 2

    meddle(monkeypatch, lambda key: key.startswith(moment), work)
    staged = stage_folder(source, store_uri)
    assert_whole(store_uri, staged)
    free(store_uri)
    assert_whole(store_uri, staged)


def test_a_stage_killed_after_it_slept_is_mended_by_the_next(store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:

        def work() -> None:
            expire_leases(store_uri)
            free(store_uri)

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        meddle(patched, lambda key: key.startswith("refs/"), work)
        patched.setattr("blocks.staging.StatCache.commit", killed)
        patched.setattr("blocks.staging.check_generation", lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            stage_folder(source, store_uri)
    ref, _ = read_ref(open_store(store_uri), store_uri, "source")
    assert ref is not None
    assert not objects(store_uri, "files/"), "the ref names what is gone"
    assert_whole(store_uri, stage_folder(source, store_uri))


# --- One at a time, and cut off ----------------------------------------------------------------------------


def test_of_two_collections_one_is_refused(store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    stage_folder(source, store_uri)
    delete_ref(open_store(store_uri), store_uri, "source")
    delete, codes = obstore.delete, list[ExitCode]()

    def meddling(store: Any, paths: Any) -> Any:
        if not codes and any(path.startswith("packs/") for path in paths):
            with pytest.raises(TrainerError, match="another garbage collection") as refused:
                free(store_uri)
            codes.append(refused.value.code)
        return delete(store, paths)

    monkeypatch.setattr(obstore, "delete", meddling)
    assert free(store_uri).objects == 3
    assert codes == [ExitCode.OCCUPIED]
    assert not objects(store_uri)
    assert free(store_uri) == Freed(0, 0, 0)


def test_a_collection_that_was_cut_off_harms_no_stage_and_is_finished_by_the_next(
    store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    first = stage_folder(source, store_uri)
    delete_ref(open_store(store_uri), store_uri, "source")
    with monkeypatch.context() as patched:
        delete = obstore.delete

        def dying(store: Any, paths: Any) -> Any:
            if any(path.startswith("files/") for path in paths):
                raise KeyboardInterrupt
            return delete(store, paths)

        patched.setattr(obstore, "delete", dying)
        with pytest.raises(KeyboardInterrupt):
            free(store_uri)
    assert {key.partition("/")[0] for key in objects(store_uri)} == {"files"}
    with pytest.raises(TrainerError, match="cut off less than ten minutes ago"):
        free(store_uri)
    monkeypatch.setattr("blocks.leases.DEAD_AFTER", timedelta(seconds=-5))  # ten minutes later
    second = stage_folder(source, store_uri)
    assert (second.version, second.files) == (first.version, first.files)
    assert second.sent_bytes < LARGE_BYTES, "the large file was still there"
    monkeypatch.setattr("blocks.garbage.DEAD_AFTER", timedelta(seconds=-5))
    free(store_uri)
    assert_whole(store_uri, second)


@pytest.mark.parametrize("spent", ["time", "taken over"])
def test_a_collection_that_slept_deletes_nothing_more(store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch, spent: str) -> None:
    import obstore

    staged = stage_folder(source, store_uri)
    delete_ref(open_store(store_uri), store_uri, "source")
    before = objects(store_uri)
    if spent == "time":
        monkeypatch.setattr("blocks.leases.DELETE_SECONDS", 0.0)
        freed = free(store_uri)
        assert (freed.objects, freed.bytes, freed.left) == (0, 0, 3)
    else:
        plan = plan_collection

        def slow(*arguments: Any) -> Any:
            found = plan(*arguments)
            obstore.put(open_store(store_uri), MARK_KEY, b'{"generation": "of another", "deleting": true}')
            return found

        monkeypatch.setattr("blocks.garbage.plan_collection", slow)
        assert free(store_uri).objects == 0
    assert objects(store_uri) == before
    assert_whole(store_uri, staged)


def test_a_lease_is_renewed_while_work_goes_on(store_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blocks.leases.RENEW_SECONDS", 0.02)
    written = meddle(monkeypatch, lambda _: False, lambda: None)
    store = open_store(store_uri)
    with Lease(store, "d") as lease:
        assert written == []
        lease.confirm()
        [key] = objects(store_uri, "leases/")
        while len(written) < 4:
            assert abs(utc_now() - lease.store_time()) < timedelta(minutes=1)
    assert set(written) == {key}
    assert not objects(store_uri, "leases/")


def test_nothing_changed_costs_one_request(store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore

    stage_folder(source, store_uri)
    calls: list[str] = []
    for name in ("get", "put", "head", "list", "delete"):
        monkeypatch.setattr(obstore, name, _noting(getattr(obstore, name), calls))
    stage_folder(source, store_uri)
    assert calls == ["get"]


def _noting(call: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    def noting(*arguments: Any, **options: Any) -> Any:
        calls.append(call.__name__)
        return call(*arguments, **options)

    return noting
