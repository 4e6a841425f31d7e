"""Whatever happens to a store in whatever order: what somebody needs can be fetched, and what nobody needs goes."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import obstore
import pytest
from hypothesis import HealthCheck, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from blocks.garbage import Policy, collect, open_marker, pin_version, unpin_version
from blocks.refs import delete_ref, read_refs
from blocks.staging import stage_folder
from trainer.contract import ExitCode, TrainerError
from trainer.fetching import fetch_version
from trainer.packs import manifest_key
from trainer.storage import list_paths, open_store
from trainer.verifying import verify_version

NAMES = ("cats", "dogs")
KEPT = 2
FILES = [f"{folder}{number}" for folder in ("", "a/", "b/c/") for number in range(4)]
CONTENTS = st.integers(0, 7).map(lambda number: bytes([number]) * (number * 97))  # few, so that they come back
CHANGES = st.dictionaries(st.sampled_from(FILES), st.none() | CONTENTS | CONTENTS, min_size=1, max_size=6)
MOMENTS = st.integers(0, 6)
GRACES = st.sampled_from([timedelta(0), timedelta(hours=3)])
NAME = st.sampled_from(NAMES)


class Killed(BaseException):
    """As SIGKILL: nothing of the process reaches the store any more."""


@contextmanager
def killed_after(count: int, call: str) -> Iterator[None]:
    """The process dies before the call after so many of its kind."""
    calls = {name: getattr(obstore, name) for name in ("put", "get", "delete", "head", "list", "get_range")}
    left = [count, 0]

    def wrap(name: str) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if left[1] or (name == call and left[0] == 0):
                left[1] = 1
                raise Killed
            left[0] -= name == call
            return calls[name](*arguments, **options)

        return wrapped

    try:
        for name in calls:
            setattr(obstore, name, wrap(name))
        yield
    except Killed:
        return
    finally:
        for name, original in calls.items():
            setattr(obstore, name, original)


class Store(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="trainyard-garbage-"))
        self.patch = pytest.MonkeyPatch()
        self.patch.setenv("TRAINYARD_HOME", str(self.folder / "home"))
        # Small files in small packs, and some of them objects of their own.
        self.patch.setattr("blocks.uploads.PACK_BYTES", 2000)
        self.patch.setattr("blocks.uploads.LARGE_BYTES", 400)
        self.patch.setattr("blocks.staging.READ_FILES", 3)
        self.patch.setattr("blocks.learning.LOOK_BYTES", 200)
        self.patch.setattr("blocks.learning.FILE_BYTES", 50)
        self.patch.setattr("blocks.leases.LOOK_SECONDS", 0.0)
        self.uri = (self.folder / "store").as_uri()
        self.store = open_store(self.uri)
        self.trees: dict[str, dict[str, bytes]] = {name: {} for name in NAMES}
        self.versions: dict[str, dict[str, bytes]] = {}  # what each version holds
        self.pins: dict[str, str] = {}
        self.ticks = 0

    def teardown(self) -> None:
        try:
            self.release_all()
        finally:
            self.patch.undo()
            shutil.rmtree(self.folder)

    # --- What happens ---

    def change(self, name: str, changes: dict[str, bytes | None]) -> bool:
        """Whether the dataset has files then."""
        for path, content in changes.items():
            file = self.folder / name / path
            if content is not None:
                self.ticks += 1
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                os.utime(file, (1e9, 1e9 + self.ticks))
                self.trees[name][path] = content
            elif self.trees[name].pop(path, None) is not None:
                file.unlink()
        return bool(self.trees[name])

    @initialize(changes=CHANGES)
    def begin(self, changes: dict[str, bytes | None]) -> None:
        for name in NAMES:
            self.stage(name, {"first": name.encode(), **changes}, False)

    @rule(name=NAME, changes=CHANGES, again=st.sampled_from([False, False, False, True]))
    def stage(self, name: str, changes: dict[str, bytes | None], again: bool) -> None:
        if self.change(name, changes):
            staged = stage_folder(self.folder / name, self.uri, again=again)
            self.versions[staged.version] = dict(self.trees[name])

    @rule(name=NAME, changes=CHANGES, at=MOMENTS, hours=st.sampled_from([0, 1]))
    def crash_a_stage(self, name: str, changes: dict[str, bytes | None], at: int, hours: float) -> None:
        with killed_after(at, "put"):
            self.stage(name, changes, False)
        # Its ref may have moved before it died.
        ref = read_refs(self.store, self.uri).whole.get(name)
        if ref is not None and ref.version not in self.versions:
            self.versions[ref.version] = dict(self.trees[name])
        self.pass_time(hours)

    @rule()
    def lose_the_cache(self) -> None:
        shutil.rmtree(self.folder / "home/staging", ignore_errors=True)

    @rule()
    def fill_anew_from_elsewhere(self) -> None:
        """Somebody empties the store, and another machine brings what the folders have now, packed otherwise."""
        for path in (self.folder / "store").iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.pins.clear()
        self.versions.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRAINYARD_HOME", str(self.folder / "elsewhere"))
            patch.setattr("blocks.uploads.PACK_BYTES", 700)
            for name in NAMES:
                self.stage(name, {}, False)

    @rule(name=NAME)
    def remove_a_ref(self, name: str) -> None:
        if name in read_refs(self.store, self.uri).whole:
            delete_ref(self.store, self.uri, name)

    @precondition(lambda self: self.versions)
    @rule(data=st.data(), run=st.sampled_from(["run1", "run2"]))
    def open_a_run(self, data: st.DataObject, run: str) -> None:
        version = data.draw(st.sampled_from(sorted(self.versions)))
        try:
            pin_version(self.store, self.uri, run, version, days=30)
        except TrainerError as refused:
            if refused.code is not ExitCode.NOT_FOUND or version in self.always_needed():
                raise
            self.pins.pop(run, None)
        else:
            self.pins[run] = version

    @rule(run=st.sampled_from(["run1", "run2"]))
    def close_a_run(self, run: str) -> None:
        unpin_version(self.store, self.uri, run)
        self.pins.pop(run, None)

    @rule(grace=GRACES)
    def collect_garbage(self, grace: timedelta) -> None:
        before = set(list_paths(self.store, ""))
        needed = {manifest_key(version) for version in self.needed()} & before
        try:
            collect(open_marker(self.uri), self.uri, Policy(grace=grace, keep_previous=KEPT), ())
        except TrainerError as refused:
            # A stage is under way, or a stage or a collection died within the last ten minutes.
            if refused.code is not ExitCode.OCCUPIED or before - set(list_paths(self.store, "")):
                raise
        finally:
            assert needed <= set(list_paths(self.store, "manifests"))

    @rule(grace=GRACES, at=MOMENTS)
    def crash_a_collection(self, grace: timedelta, at: int) -> None:
        # One object at a time, so that it may die between any two.
        with pytest.MonkeyPatch.context() as patch, killed_after(at, "delete"):
            patch.setattr("blocks.garbage.BATCH", 1)
            self.collect_garbage(grace)
        self.pass_time(1)  # else every stage that follows waits for it to be over

    @rule(name=NAME, changes=CHANGES, at=MOMENTS, asleep=st.booleans(), alone=st.booleans())
    def stage_beside_a_collection(self, name: str, changes: dict[str, bytes | None], at: int, asleep: bool, alone: bool) -> None:
        """Just before one of its writes; where the stage was `asleep`, its lease has ended; `alone`, the other dataset's ref is gone."""
        put, puts = obstore.put, [0]

        def meddling(store: Any, path: str, *arguments: Any, **options: Any) -> Any:
            puts[0] += not path.startswith("leases/")
            if puts[0] == at + 1:
                puts[0] += 1
                if asleep:
                    obstore.delete(store, list(list_paths(store, "leases")))
                if alone:
                    for other in set(NAMES) - {name}:
                        self.remove_a_ref(other)
                self.collect_garbage(timedelta(0))
            return put(store, path, *arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("blocks.uploads.SENDERS", 1)
            patch.setattr(obstore, "put", meddling)
            self.stage(name, changes, False)

    @rule(hours=st.sampled_from([0.05, 1, 5]))
    def pass_time(self, hours: float) -> None:
        """By the store's clock: all that it has is older."""
        for path in (self.folder / "store").rglob("*"):
            if path.is_file():
                then = path.stat().st_mtime - hours * 3600
                os.utime(path, (then, then))

    # --- What is always true ---

    def always_needed(self) -> set[str]:
        return {ref.version for ref in read_refs(self.store, self.uri).whole.values()} | set(self.pins.values())

    def needed(self) -> set[str]:
        """With those before them, of which some may be gone: they were too old once, and came up again since."""
        refs = read_refs(self.store, self.uri).whole.values()
        return self.always_needed() | {version for ref in refs for version in ref.previous[:KEPT]}

    @invariant()
    def what_is_needed_is_whole(self) -> None:
        there = set(list_paths(self.store, "manifests"))
        for version in self.needed():
            if version in self.always_needed() or manifest_key(version) in there:
                assert verify_version(self.uri, version).files == len(self.versions[version])

    def fetch_all(self) -> None:
        for version in self.always_needed():
            copy = self.folder / "copies" / version
            fetch_version(self.uri, version, copy)
            found = {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()}
            assert found == self.versions[version]

    def release_all(self) -> None:
        self.fetch_all()
        for run in list(self.pins):
            self.close_a_run(run)
        for name in read_refs(self.store, self.uri).whole:
            delete_ref(self.store, self.uri, name)
        self.pass_time(1)  # what is cut off is over
        collect(open_marker(self.uri), self.uri, Policy(grace=timedelta(0)), ())
        assert set(list_paths(self.store, "")) <= {"gc.json", "gc.json.lock", *(f"refs/{name}.json.lock" for name in NAMES)}


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        Store,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
        ),
    )


def test_nothing_needed_is_lost_and_nothing_else_stays() -> None:
    run_machine(examples=25, steps=25)


@pytest.mark.full
def test_nothing_needed_is_lost_and_nothing_else_stays_at_length() -> None:
    started = time.monotonic()
    while time.monotonic() - started < 600:
        run_machine(examples=100, steps=50)
