"""Stage and fetch over a bad network: S3 and Azure behind a proxy that loses answers, cuts, refuses and is slow."""

from __future__ import annotations

import random
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from blocks.staging import stage_folder
from blocks.uploads import LARGE_BYTES
from tests.contract.staged import assert_no_duplicates, assert_same, contents, objects, sizes, touch_old
from tests.faults import ALWAYS, Action, Fault, FaultProxy
from tests.stores import StoreServer, new_store
from trainer import storage
from trainer.contract import ExitCode, TrainerError
from trainer.fetching import fetch_version

if TYPE_CHECKING:
    from obstore.store import BackoffConfig

PACK_BYTES = 200_000  # five packs of the source
KINDS = ("packs/", "files/", "manifests/", "refs/")


@pytest.fixture
def uri(server: StoreServer, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store behind the proxy; between two tries of a request lie at most 0.3 s."""
    backoff: BackoffConfig = {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=0.3), "base": 2}
    for purpose, retries in storage.RETRIES.items():
        monkeypatch.setitem(storage.RETRIES, purpose, {**retries, "backoff": backoff})
    monkeypatch.setattr("blocks.uploads.PACK_BYTES", PACK_BYTES)
    return new_store(server, monkeypatch, proxy.address)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of patience as seconds."""
    for purpose, retries in storage.RETRIES.items():
        monkeypatch.setitem(storage.RETRIES, purpose, {**retries, "max_retries": 3, "retry_timeout": timedelta(seconds=3)})


@pytest.mark.parametrize("action", ["lose", "cut_up", "drop"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_to_a_write_is_lost(uri: str, proxy: FaultProxy, source: Path, tmp_path: Path, kind: str, action: Action) -> None:
    """Lost: the store has the object and we do not know. Cut and dropped: it has not."""
    proxy.add(Fault(action, "PUT|POST", kind, times=2))
    version = stage_folder(source, uri).version
    assert proxy.met(action) == 2
    fetch_version(uri, version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")
    assert_no_duplicates(uri, contents(source), beyond=0)


@pytest.mark.parametrize("action", ["lose", "cut_up", "drop"])
@pytest.mark.parametrize("step", ["begin", "part", "end"])
def test_an_answer_about_a_file_in_parts_is_lost(
    uri: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, action: Action
) -> None:
    """Files too large to hold go in parts of 5 MiB: on S3 between a beginning and an end, on Azure the first part begins."""
    monkeypatch.setattr("blocks.staging.MEMORY_BYTES", LARGE_BYTES)
    root = tmp_path / "source"
    root.mkdir()
    (root / "large.bin").write_bytes(random.Random(2).randbytes(11 * 2**20))
    requests = {
        "s3": {"begin": ("POST", r"uploads"), "part": ("PUT", r"partNumber=2"), "end": ("POST", r"uploadId=")},
        "az": {"begin": ("PUT", r"comp=block(&|$)"), "part": ("PUT", r"comp=block(&|$)"), "end": ("PUT", r"comp=blocklist")},
    }[uri[:2]]
    proxy.add(Fault(action, *requests[step]))
    version = stage_folder(root, uri).version
    assert proxy.met(action) == 1
    fetch_version(uri, version, tmp_path / "copy")
    assert_same(root, tmp_path / "copy")


@pytest.mark.parametrize("action", ["lose", "drop"])
def test_an_answer_to_a_later_move_of_the_ref_is_lost(uri: str, proxy: FaultProxy, source: Path, tmp_path: Path, action: Action) -> None:
    """The second version moves the ref by compare-and-swap; the one before it is remembered once."""
    from blocks.refs import read_ref

    first = stage_folder(source, uri)
    touch_old(source / "d0-1", b"changed")
    proxy.add(Fault(action, "PUT", "refs/"))
    second = stage_folder(source, uri)
    ref, _ = read_ref(storage.open_store(uri), uri, "source")
    assert ref is not None
    assert (ref.version, ref.previous) == (second.version, (first.version,))
    assert proxy.met(action) == 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_burst_of_refusals_is_sat_out(uri: str, proxy: FaultProxy, source: Path, tmp_path: Path, status: int) -> None:
    for kind in KINDS:
        proxy.add(Fault("refuse", path=kind, times=3, status=status))
    version = stage_folder(source, uri).version
    proxy.heal()
    for kind in KINDS[:3]:
        proxy.add(Fault("refuse", "GET", path=kind, times=3, status=status))
    fetch_version(uri, version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")
    assert proxy.met("refuse") >= 15, "in the lists, too"
    assert_no_duplicates(uri, contents(source), beyond=0)


@pytest.mark.parametrize(
    ("action", "kind"),
    [
        (action, kind) if kind in ("packs/", "refs/") or action == "drop" else pytest.param(action, kind, marks=pytest.mark.full)
        for action in ("refuse", "drop")
        for kind in KINDS
    ],
)
def test_an_outage_is_one_error_and_the_next_stage_completes(
    uri: str, proxy: FaultProxy, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, action: Action
) -> None:
    hurry(monkeypatch)
    proxy.add(Fault(action, "PUT|POST", kind, times=ALWAYS))
    began = time.monotonic()
    with pytest.raises(TrainerError) as told:
        stage_folder(source, uri)
    assert told.value.code is ExitCode.UNAVAILABLE
    assert str(told.value).startswith(f"{uri}: ")
    assert time.monotonic() - began < 40
    proxy.heal()
    assert not [key for key in objects(uri) if key.startswith("refs/")], "the ref moves last"
    version = stage_folder(source, uri).version
    fetch_version(uri, version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")
    assert_no_duplicates(uri, contents(source), beyond=PACK_BYTES)


@pytest.mark.parametrize("action", ["refuse", "drop", "stall"])
def test_a_store_that_cannot_be_reached_is_told_within_half_a_minute(
    server: StoreServer, proxy: FaultProxy, source: Path, monkeypatch: pytest.MonkeyPatch, action: Action
) -> None:
    """With the settings that users have."""
    uri = new_store(server, monkeypatch, proxy.address)
    proxy.add(Fault(action, times=ALWAYS))
    began = time.monotonic()
    with pytest.raises(TrainerError) as told:
        stage_folder(source, uri)
    assert told.value.code is ExitCode.UNAVAILABLE
    assert time.monotonic() - began < 35


@pytest.mark.parametrize("kind", ["packs/", "files/", "manifests/"])
def test_a_fetch_that_is_cut_in_the_middle_goes_on(uri: str, proxy: FaultProxy, source: Path, tmp_path: Path, kind: str) -> None:
    version = stage_folder(source, uri).version
    proxy.add(Fault("cut_down", "GET", kind, times=2))
    fetch_version(uri, version, tmp_path / "copy")
    assert proxy.met("cut_down") == 2
    assert_same(source, tmp_path / "copy")


def test_a_fetch_without_a_network_takes_up_again_what_it_has(
    uri: str, proxy: FaultProxy, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hurry(monkeypatch)
    version = stage_folder(source, uri).version
    large = next(key for key in objects(uri) if key.startswith("files/"))
    proxy.add(Fault("cut_down", "GET", large, times=ALWAYS))
    with pytest.raises(TrainerError) as told:
        fetch_version(uri, version, tmp_path / "copy")
    assert told.value.code is ExitCode.UNAVAILABLE
    assert not (tmp_path / "copy").exists()
    proxy.heal()
    fetched = fetch_version(uri, version, tmp_path / "copy")
    assert fetched.fetched_files < fetched.files / 2, "the packs were there"
    assert_same(source, tmp_path / "copy")


def test_a_slow_link_is_no_fault(uri: str, proxy: FaultProxy, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each transfer takes longer than a connection may be silent, in a tenth of the real proportions."""
    monkeypatch.setattr("blocks.uploads.PACK_BYTES", 16 * 2**20)
    for purpose in ("ask", "fetch"):
        monkeypatch.setitem(storage.TIMEOUTS, purpose, {**storage.TIMEOUTS[purpose], "read_timeout": timedelta(seconds=1)})
    proxy.bytes_per_second = 600_000
    began = time.monotonic()
    version = stage_folder(source, uri).version
    fetch_version(uri, version, tmp_path / "copy")
    assert time.monotonic() - began > 4
    assert_same(source, tmp_path / "copy")
    assert_no_duplicates(uri, contents(source), beyond=0)
    assert len([request for request in proxy.requests if "/packs/" in request.path and request.method == "PUT"]) == 1, "sent once"


@pytest.mark.full
def test_a_link_slower_than_any_timeout_of_the_library(uri: str, proxy: FaultProxy, source: Path, tmp_path: Path) -> None:
    """One request of 40 s; obstore's own limit is 30 s for a request."""
    proxy.bytes_per_second = (storage_bytes := 1_100_000) / 40
    version = stage_folder(source, uri).version
    fetch_version(uri, version, tmp_path / "copy")
    assert_same(source, tmp_path / "copy")
    assert sum(sizes(uri).values()) > storage_bytes
