"""Of several containers one has an attempt, on every kind of store; others learn it before they write."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.stores import az, no_cloud, s3, store_uri
from trainer import fencing
from trainer.contract import AttemptLayout, ExitCode, TrainerError
from trainer.fencing import Claim, Fenced, Owner, refuse_newer_attempt
from trainer.mirror import Mirror
from trainer.storage import ObjectFolder
from trainer.supervisor import StopNote
from trainer.transfer import PART_BYTES, open_for_files, push_file
from trainer.watching import RecordWatch

__all__ = ["az", "no_cloud", "s3", "store_uri"]


@pytest.fixture
def uri(store_uri: str) -> str:
    return f"{store_uri}/run/attempts/1"


def stored(uri: str) -> Owner:
    return Owner.from_json(ObjectFolder(uri).get(AttemptLayout.OWNER) or b"")


def test_the_one_that_takes_it_last_has_it(uri: str) -> None:
    first = Claim.take(uri, pod="a", node="n")
    first.check(afresh=True)
    second = Claim.take(uri, pod="b", node="m")
    assert (first.owner.generation, second.owner.generation) == (1, 2)
    assert stored(uri) == second.owner
    second.check(afresh=True)
    for _ in range(2):
        with pytest.raises(Fenced, match=r"another container \(b on m\) has had this attempt since") as refused:
            first.check(afresh=True)
        assert refused.value.code is ExitCode.SUPERSEDED
        assert refused.value.hint


def test_of_many_at_once_each_has_a_number_of_its_own(uri: str) -> None:
    claims: list[Claim] = []
    threads = [threading.Thread(target=lambda: claims.append(Claim.take(uri))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claim.owner.generation for claim in claims) == list(range(1, 7))
    lost: list[int] = []
    for claim in claims:
        try:
            claim.check(afresh=True)
        except Fenced:
            lost.append(claim.owner.generation)
    assert sorted(lost) == list(range(1, 6))


def test_an_answer_counts_for_a_second(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fencing, "TRUST_SECONDS", 60.0)
    first = Claim.take(uri)
    first.check(afresh=True)
    Claim.take(uri)
    first.check()
    monkeypatch.setattr(fencing, "TRUST_SECONDS", 0.0)
    with pytest.raises(Fenced):
        first.check()


def test_a_swap_whose_answer_was_lost_has_taken_it(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    swap = fencing.swap

    def losing(*arguments: Any) -> bool:
        swap(*arguments)
        return False

    monkeypatch.setattr(fencing, "swap", losing)
    claim = Claim.take(uri)
    assert stored(uri) == claim.owner
    assert claim.owner.generation == 1


def test_a_volume_without_locks_is_the_last_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(*_: Any) -> bool:
        raise OSError(fencing.NO_LOCKS[0], "No locks available")

    monkeypatch.setattr(fencing, "swap", refusing)
    first, second = Claim.take(str(tmp_path)), Claim.take(str(tmp_path))
    second.check(afresh=True)
    with pytest.raises(Fenced):
        first.check(afresh=True)


def test_a_damaged_owner_is_told_with_its_name(tmp_path: Path) -> None:
    (tmp_path / AttemptLayout.OWNER).write_text("{}")
    with pytest.raises(TrainerError, match=r"owner\.json is damaged") as refused:
        Claim.take(str(tmp_path))
    assert refused.value.code is ExitCode.DATA


def test_a_mirror_that_lost_its_attempt_writes_nothing_more(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fencing, "TRUST_SECONDS", 0.0)
    layout = AttemptLayout(tmp_path / "run/attempts/1")
    log = layout / AttemptLayout.LOG
    log.parent.mkdir(parents=True)
    log.write_text("of the first")
    mirror = Mirror(layout.folder, uri, Claim.take(uri))
    mirror.sync()
    Claim.take(uri)
    log.write_text("of the first, later")
    (layout / AttemptLayout.EXIT).write_text("{}")
    with pytest.raises(Fenced):
        mirror.sync()
    objects = ObjectFolder(uri)
    assert objects.get(AttemptLayout.LOG) == b"of the first"
    assert objects.get(AttemptLayout.EXIT) is None


@pytest.mark.parametrize("store_uri", ["s3", "az"], indirect=True)
def test_a_large_upload_is_abandoned_when_the_attempt_is_lost(uri: str, tmp_path: Path) -> None:
    claim = Claim.take(uri)
    (tmp_path / "model.pt").write_bytes(os.urandom(3 * PART_BYTES))
    pieces = 0

    def lose() -> None:
        nonlocal pieces
        pieces += 1
        if pieces == 20:
            claim.give_up(Fenced("lost", code=ExitCode.SUPERSEDED))
        claim.refuse_lost()

    with pytest.raises(Fenced, match="lost"):
        push_file(open_for_files(uri), "model.pt", tmp_path / "model.pt", while_written=lose)
    assert pieces == 20
    assert ObjectFolder(uri).get("model.pt") is None


# --- What the record says ----------------------------------------------------------------------------------


@pytest.fixture
def watch(store_uri: str, uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordWatch:
    monkeypatch.setattr(fencing, "TRUST_SECONDS", 0.0)
    return RecordWatch(f"{store_uri}/run", AttemptLayout(tmp_path / "run/attempts/1"), Claim.take(uri), StopNote())


def outcome(watch: RecordWatch, tmp_path: Path) -> tuple[bool, int | None]:
    watch.look()
    fenced = watch.stop.fenced
    return (tmp_path / "run/attempts/1" / AttemptLayout.STOP).exists(), fenced.code if fenced else None


@pytest.mark.parametrize("store_uri", ["s3"], indirect=True)
@pytest.mark.parametrize(
    ("name", "text", "stopped", "code"),
    [
        ("cancel.json", json.dumps({"attempt": 1}), True, None),
        ("cancel.json", json.dumps({"attempt": 2}), False, None),
        ("cancel.json", "not JSON", False, None),
        ("attempts/1/stop.json", "anything", True, None),
        ("attempts/2/stop.json", "{}", False, None),
        ("attempts/2/plan.json", "{}", False, ExitCode.OCCUPIED),
        ("attempts/2/config.json", "{}", False, ExitCode.OCCUPIED),
        ("attempts/1/owner.json", Owner(token="other", generation=2).to_json().decode(), False, ExitCode.SUPERSEDED),
    ],
)
def test_each_word_of_the_record_is_passed_on(
    watch: RecordWatch, store_uri: str, tmp_path: Path, name: str, text: str, stopped: bool, code: int | None
) -> None:
    assert outcome(watch, tmp_path) == (False, None)
    ObjectFolder(f"{store_uri}/run").put(name, text.encode())
    assert outcome(watch, tmp_path) == (stopped, code)


def test_a_record_that_cannot_be_read_says_nothing_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch = RecordWatch(str(tmp_path), AttemptLayout(tmp_path / "run/attempts/1"), Claim.take(str(tmp_path / "attempts/1")), StopNote())

    def failing(*_: Any) -> bytes:
        raise TrainerError("not reached", hint="wait", code=ExitCode.UNAVAILABLE)

    monkeypatch.setattr(ObjectFolder, "get", failing)
    for _ in range(3):
        assert outcome(watch, tmp_path) == (False, None)
    assert caplog.text.count("not reached") == 1


def test_a_later_attempt_is_found_however_far_it_is(store_uri: str) -> None:
    attempts = ObjectFolder(f"{store_uri}/run/attempts")
    attempts.put("1/plan.json", b"{}")
    refuse_newer_attempt(attempts, 1)
    attempts.put("5/plan.json", b"{}")
    with pytest.raises(Fenced, match=r"newer attempt exists \(5\)"):
        refuse_newer_attempt(attempts, 1)
