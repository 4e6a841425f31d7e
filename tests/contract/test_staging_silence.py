"""A store that takes a connection and does not answer: told soon, told again, told when it goes on, and given up in the end."""

from __future__ import annotations

import random
import time
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from blocks.staging import stage_folder
from blocks.uploads import LARGE_BYTES
from flows.cli_dataset import dataset
from tests.contract.staged import assert_same
from tests.faults import ALWAYS, Fault, FaultProxy
from tests.stores import StoreServer, new_store
from trainer import storage
from trainer.contract import ExitCode, TrainerError
from trainer.dataset_cache import dataset_folder
from trainer.fetching import fetch_version
from trainer.transfer import fetch_weights, pull_files, push_files
from trainer.verifying import verify_version

FIRST_SECONDS = 0.5
STALL_SECONDS = 2.0


@pytest.fixture
def uri(server: StoreServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("trainer.silence.FIRST_SECONDS", FIRST_SECONDS)
    return new_store(server, monkeypatch, proxy.address)


def assert_told(lines: list[str], limit: str) -> None:
    *silent, again = lines
    assert silent
    assert all(line.startswith("the store has not answered for") and f"gives up after {limit}" in line for line in silent)
    assert len(silent) <= 3, "at growing distance"
    assert again.startswith("the store answers again")


@pytest.mark.parametrize("kind", ["packs/", "files/", "manifests/", "refs/"])
def test_a_stage_that_the_store_lets_wait_is_told_and_goes_on(uri: str, proxy: FaultProxy, source: Path, tmp_path: Path, kind: str) -> None:
    lines: list[str] = []
    proxy.add(Fault("stall", "PUT|POST", kind, seconds=STALL_SECONDS))
    version = stage_folder(source, uri, on_silence=lines.append).version
    assert proxy.met("stall") == 1
    assert_told(lines, "10 min")
    fetch_version(uri, version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")


def test_a_stage_that_is_never_answered_is_told_and_given_up(
    uri: str, proxy: FaultProxy, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes as seconds."""
    monkeypatch.setitem(storage.TIMEOUTS, "send", {"timeout": timedelta(seconds=3)})
    monkeypatch.setitem(storage.RETRIES, "send", {**storage.RETRIES["send"], "retry_timeout": timedelta(seconds=1)})
    monkeypatch.setattr("blocks.staging.SEND_SECONDS", 3.0)
    lines: list[str] = []
    proxy.add(Fault("stall", "PUT", "packs/", times=ALWAYS))
    began = time.monotonic()
    with pytest.raises(TrainerError) as told:
        stage_folder(source, uri, on_silence=lines.append)
    assert told.value.code is ExitCode.UNAVAILABLE
    assert 2.5 < time.monotonic() - began < 20
    assert "gives up after 3 s" in lines[0]
    assert not [line for line in lines if "again" in line]


def test_the_commands_tell_it(uri: str, proxy: FaultProxy, source: Path, tmp_path: Path) -> None:
    proxy.add(Fault("stall", "PUT", "packs/", seconds=STALL_SECONDS))
    staged = CliRunner().invoke(dataset, ["stage", str(source), "--store", uri], catch_exceptions=False)
    proxy.add(Fault("stall", "GET", "packs/", seconds=STALL_SECONDS))
    fetched = CliRunner().invoke(dataset, ["fetch", "source", "--store", uri, "--to", str(tmp_path / "copy")], catch_exceptions=False)
    for done, limit in ((staged, "10 min"), (fetched, "3 min")):
        assert_told([line for line in done.stderr.splitlines() if line.startswith("the store")], limit)


def test_a_fetch_that_the_store_lets_wait_is_told_and_goes_on(uri: str, proxy: FaultProxy, source: Path, tmp_path: Path) -> None:
    version = stage_folder(source, uri).version
    told: list[list[str]] = [[], [], []]
    for cache, lines in ((None, told[0]), (tmp_path / "cache", told[1])):
        proxy.add(Fault("stall", "GET", "packs/", seconds=STALL_SECONDS))
        with dataset_folder(uri, version, cache=cache, limit_bytes=None, scratch=tmp_path / "scratch", on_message=lines.append) as fetched:
            assert_same(source, fetched.folder)
    proxy.add(Fault("stall", "GET", "files/", seconds=STALL_SECONDS))
    verify_version(uri, version, on_silence=told[2].append)
    for lines in told:
        assert_told(lines, "3 min")


def test_a_fetch_that_is_never_answered_is_told_and_given_up(
    uri: str, proxy: FaultProxy, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = stage_folder(source, uri).version
    patience = timedelta(seconds=2)
    monkeypatch.setitem(storage.TIMEOUTS, "fetch", {**storage.TIMEOUTS["fetch"], "read_timeout": timedelta(seconds=1)})
    monkeypatch.setitem(storage.RETRIES, "fetch", {**storage.RETRIES["fetch"], "retry_timeout": patience})
    for module in ("ranges", "fetching"):
        monkeypatch.setattr(f"trainer.{module}.PATIENCE", patience)
    lines: list[str] = []
    proxy.add(Fault("stall", "GET|HEAD", "packs/|files/", times=ALWAYS))
    began = time.monotonic()
    with pytest.raises(TrainerError) as told:
        fetch_version(uri, version, tmp_path / "copy", on_silence=lines.append)
    assert told.value.code is ExitCode.UNAVAILABLE
    assert time.monotonic() - began < 10, "nobody asks again what is not answered"
    assert "gives up after 2 s" in lines[0]
    assert not [line for line in lines if "again" in line]


def test_files_of_a_run_that_the_store_lets_wait_are_told(uri: str, proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"weights")
    told: list[list[str]] = [[], [], []]
    proxy.add(Fault("stall", "PUT", "model.pt", seconds=STALL_SECONDS))
    sent = push_files(tmp_path, uri, ["model.pt"], on_silence=told[0].append)
    proxy.add(Fault("stall", "GET", "model.pt", seconds=STALL_SECONDS))
    pull_files(uri, tmp_path / "copy", sent, on_silence=told[1].append)
    proxy.add(Fault("stall", "GET", "model.pt", seconds=STALL_SECONDS))
    fetch_weights(f"{uri}/model.pt", tmp_path / "cache", told[2].append)
    for lines, limit in zip(told, ("10 min", "3 min", "3 min"), strict=True):
        assert_told(lines, limit)


def test_a_large_file_on_a_slow_link_is_not_called_silent(
    uri: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part that the store takes is a sign of life: a part takes a second, and all of them longer than a silence may."""
    monkeypatch.setattr("trainer.silence.FIRST_SECONDS", 4.5)
    monkeypatch.setattr("blocks.staging.MEMORY_BYTES", LARGE_BYTES)
    monkeypatch.setattr("blocks.sending.PART_BYTES", 5 * 2**20)
    monkeypatch.setattr("blocks.sending.PARTS_AT_ONCE", 1)
    root = tmp_path / "source"
    root.mkdir()
    (root / "large.bin").write_bytes(random.Random(3).randbytes(25 * 2**20))
    proxy.bytes_per_second = 5 * 2**20
    lines: list[str] = []
    began = time.monotonic()
    version = stage_folder(root, uri, on_silence=lines.append).version
    assert time.monotonic() - began > 4.9
    assert lines == []
    proxy.bytes_per_second = None
    fetch_version(uri, version, tmp_path / "copy")
    assert_same(root, tmp_path / "copy")
