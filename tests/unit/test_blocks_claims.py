from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from blocks import claims
from blocks.claims import Claimed, claim_run, new_run_id, release
from blocks.errors import ServiceUnavailable
from blocks.record import RunRecord, check_run_id
from tests.unit.test_blocks_record import run_file
from trainer.locks import try_lock

OTHER = """
import sys
from blocks.claims import claim_run
print(claim_run("wish", lambda: None).run_id, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    return tmp_path


def nothing_open() -> None:
    return None


def start_other() -> tuple[subprocess.Popen[str], str]:
    other = subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    return other, other.stdout.readline().strip()


def end(other: subprocess.Popen[str]) -> None:
    other.communicate("")


def test_a_new_run_id_is_a_run_id() -> None:
    assert re.fullmatch(r"[a-z2-7]{12}", check_run_id(new_run_id()))
    assert new_run_id() != new_run_id()


def test_an_open_run_is_found_before_any_claim() -> None:
    assert claim_run("wish", lambda: "opened123456") == Claimed("opened123456", is_new=False)


def test_processes_of_the_same_second_agree_on_one_run() -> None:
    others = [subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    chosen = {other.stdout.readline().strip() for other in others if other.stdout}
    mine = claim_run("wish", nothing_open)
    for other in others:
        end(other)
    assert chosen == {mine.run_id}
    assert not mine.is_new
    assert claim_run("another wish", nothing_open).run_id != mine.run_id


def test_a_claim_ends_with_its_last_process() -> None:
    other, run_id = start_other()
    assert claim_run("wish", nothing_open) == Claimed(run_id, is_new=False)
    end(other)
    # This process adopted the run id, and is still there.
    assert claim_run("wish", nothing_open).run_id == run_id
    release("wish")
    assert claim_run("wish", nothing_open).run_id != run_id


def test_a_killed_process_leaves_no_claim() -> None:
    other, run_id = start_other()
    other.kill()
    end(other)
    fresh = claim_run("wish", nothing_open)
    assert fresh.is_new
    assert fresh.run_id != run_id


def test_a_claim_whose_run_has_a_record_is_over(tmp_path: Path) -> None:
    """`find_open` saw that record and did not want it: the run is over, or its dataset changed."""
    other, run_id = start_other()
    RunRecord(str(tmp_path / "runs"), run_id).open(run_file(run_id))
    assert claim_run("wish", nothing_open).run_id != run_id
    end(other)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"run_id": 3}'])
def test_a_damaged_claim_is_replaced(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "wish.json").write_bytes(damage)
    assert claim_run("wish", nothing_open).is_new
    release("wish")
    assert not (tmp_path / "claims" / "wish.json").exists()
    release("wish")


def test_a_claim_that_stays_locked_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "LOCK_SECONDS", 0.1)
    assert try_lock(tmp_path / "claims" / "wish.lock") is not None
    with pytest.raises(ServiceUnavailable, match="same request"):
        claim_run("wish", nothing_open)


def test_a_refusal_while_looking_frees_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str | None:
        raise ValueError("no dataset")

    monkeypatch.setattr(claims, "LOCK_SECONDS", 0.1)
    looks: list[Callable[[], str | None]] = [refuse, refuse]
    for look in looks:
        with pytest.raises(ValueError, match="no dataset"):
            claim_run("wish", look)
