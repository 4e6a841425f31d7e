"""Files of any size go to every store and come back: verified, sent once, taken up again."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from obstore.exceptions import GenericError

from trainer import transfer
from trainer.contract import ExitCode, ManifestFile, TrainerError
from trainer.storage import ObjectFolder
from trainer.transfer import fetch_weights, pull_files, push_files

NAMES = ["empty", "a/small ü #1%20?*.json", "model/large.pt", "b.bin"]
LARGE = "model/large.pt"
PART_BYTES = 5 * 2**20  # S3 takes no smaller ones


@pytest.fixture(autouse=True)
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", PART_BYTES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rng = random.Random(1)
    for name, size in zip(NAMES, (0, 10, PART_BYTES + 7, 1000), strict=True):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(size))
    return tmp_path / "source"


def count(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """The keys of the calls of this function of obstore."""
    call, keys = getattr(obstore, name), list[str]()

    def counting(store: Any, key: str, *rest: Any, **options: Any) -> Any:
        keys.append(key)
        return call(store, key, *rest, **options)

    monkeypatch.setattr(obstore, name, counting)
    return keys


def test_files_go_and_come_back_bit_by_bit(store_uri: str, source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    sent = push_files(source, store_uri, NAMES, lambda done, total: seen.append((done, total)))
    assert list(sent) == NAMES
    assert seen[-1][0] == seen[-1][1] == sum(file.bytes for file in sent.values())
    folder = ObjectFolder(store_uri)
    assert {name: folder.sha256(name) for name in NAMES} == {name: file.sha256 for name, file in sent.items()}
    pull_files(store_uri, tmp_path / "copy", sent, lambda done, total: seen.append((done, total)))
    for name in NAMES:
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()) == sorted(Path(name).name for name in NAMES)


def test_what_is_there_is_neither_sent_nor_fetched_again(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = push_files(source, store_uri, NAMES)
    pull_files(store_uri, tmp_path / "copy", sent)
    (source / "b.bin").write_bytes(b"new")
    puts, heads = count(monkeypatch, "put"), count(monkeypatch, "head")
    again = push_files(source, store_uri, NAMES)
    assert puts == ["b.bin"]
    assert {name for name in NAMES if again[name] != sent[name]} == {"b.bin"}
    heads.clear()
    pull_files(store_uri, tmp_path / "copy", again)
    assert heads == ["b.bin"]


CRASH = """
import os, sys
import obstore
from pathlib import Path
put, left = obstore.put, int(sys.argv[1])
def dying(store, path, data, **options):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), 9)
    return put(store, path, data, **options)
obstore.put = dying
import trainer.transfer
trainer.transfer.WORKERS = 1
trainer.transfer.push_files(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
"""


def test_a_push_that_was_killed_goes_on_file_by_file(store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run([sys.executable, "-c", CRASH, "3", str(source), store_uri, *NAMES], check=False, capture_output=True, timeout=120)
    assert done.returncode == -9, done.stderr.decode()
    puts = count(monkeypatch, "put")
    push_files(source, store_uri, NAMES)
    assert puts == [NAMES[3]]


@pytest.mark.parametrize("name", [LARGE, "b.bin"])
def test_content_that_changes_while_it_is_sent_is_refused(store_uri: str, source: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Also with the size and the time of before. What the object was, it stays."""
    before = push_files(source, store_uri, [name])[name]
    (source / name).write_bytes(bytes(before.bytes))
    put = obstore.put

    def meddling(store: Any, key: str, data: Any, **options: Any) -> Any:
        (source / name).write_bytes(b"x" * before.bytes)
        return put(store, key, data, **options)

    monkeypatch.setattr(obstore, "put", meddling)
    if name == LARGE:
        with pytest.raises(TrainerError, match="not what it was") as refused:
            push_files(source, store_uri, [name])
        assert refused.value.code is ExitCode.DATA
        assert ObjectFolder(store_uri).sha256(name) == before.sha256
    else:  # read in one piece, so what is sent is what was hashed
        sent = push_files(source, store_uri, [name])[name]
        assert ObjectFolder(store_uri).sha256(name) == sent.sha256


def test_a_file_that_is_not_as_expected_is_not_sent(store_uri: str, source: Path) -> None:
    expected = push_files(source, store_uri, NAMES)
    for name in (LARGE, "b.bin"):
        (source / name).write_bytes(bytes(expected[name].bytes))
        with pytest.raises(TrainerError, match="not what it was"):
            push_files(source, store_uri, [name], expected=expected)
        assert ObjectFolder(store_uri).sha256(name) == expected[name].sha256


def test_a_file_that_is_missing_is_one_error(store_uri: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="does not exist") as refused:
        push_files(source, store_uri, ["none"])
    assert refused.value.code is ExitCode.NOT_FOUND
    with pytest.raises(TrainerError, match="the store has no none") as refused:
        pull_files(store_uri, tmp_path / "copy", {"none": ManifestFile(sha256="0" * 64, bytes=1)})
    assert refused.value.code is ExitCode.NOT_FOUND


@pytest.mark.parametrize("name", ["../x", "/x", "a/../x", "", "a//b", "a\nb"])
def test_an_unsafe_name_is_refused(store_uri: str, source: Path, tmp_path: Path, name: str) -> None:
    for refusing in (
        lambda: push_files(source, store_uri, [name]),
        lambda: pull_files(store_uri, tmp_path / "copy", {name: ManifestFile(sha256="0" * 64, bytes=1)}),
    ):
        with pytest.raises(TrainerError, match=r"unsafe path|stores refuse") as refused:
            refusing()
        assert refused.value.code is ExitCode.DATA


@pytest.mark.parametrize("left", ["beginning", "all", "another", "longer"])
def test_a_pull_that_was_cut_goes_on(store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str) -> None:
    sent = push_files(source, store_uri, [LARGE])
    content = (source / LARGE).read_bytes()
    partial = tmp_path / "copy/model/.large.pt.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes({"beginning": content[:PART_BYTES], "all": content, "another": b"x" * PART_BYTES, "longer": content + b"x"}[left])
    ranges: list[tuple[int, int]] = []
    get = obstore.get

    def counting(store: Any, key: str, *, options: Any) -> Any:
        ranges.append(options["range"])
        return get(store, key, options=options)

    monkeypatch.setattr(obstore, "get", counting)
    pull_files(store_uri, tmp_path / "copy", sent)
    assert (tmp_path / "copy" / LARGE).read_bytes() == content
    assert not partial.exists()
    rest, whole = (PART_BYTES, len(content)), (0, len(content))
    assert ranges == {"beginning": [rest], "all": [], "another": [rest, whole], "longer": [whole]}[left]


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer"])
def test_a_damaged_object_is_refused_and_nothing_is_left(store_uri: str, source: Path, tmp_path: Path, damage: str) -> None:
    sent = push_files(source, store_uri, [LARGE])
    content = (source / LARGE).read_bytes()
    damaged = {"flipped": content[:-1] + bytes([content[-1] ^ 1]), "cut": content[:-1], "longer": content + b"x"}[damage]
    ObjectFolder(store_uri).put(LARGE, damaged)
    with pytest.raises(TrainerError, match="not the file that is wanted") as refused:
        pull_files(store_uri, tmp_path / "copy", sent)
    assert refused.value.code is ExitCode.DATA
    assert not [path for path in (tmp_path / "copy").rglob("*") if path.is_file()]
    push_files(source, store_uri, [LARGE])
    pull_files(store_uri, tmp_path / "copy", sent)
    assert (tmp_path / "copy" / LARGE).read_bytes() == content


# --- Weights -------------------------------------------------------------------------------------------


def test_weights_are_fetched_once_for_each_state_of_the_object(
    store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_files(source, store_uri, [LARGE])
    gets = count(monkeypatch, "get")
    uri = f"{store_uri}/{LARGE}"
    path = fetch_weights(uri, tmp_path / "cache")
    assert path.name == "large.pt"
    assert path.read_bytes() == (source / LARGE).read_bytes()
    assert fetch_weights(uri, tmp_path / "cache") == path
    assert len(gets) == (0 if uri.startswith("file") else 1), "a file of this machine is used where it lies"
    ObjectFolder(store_uri).put(LARGE, b"others")
    assert fetch_weights(uri, tmp_path / "cache").read_bytes() == b"others"


@pytest.mark.parametrize("store_uri", ["s3", "az"], indirect=True)
def test_weights_that_were_cut_go_on(store_uri: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (source / LARGE).read_bytes()
    push_files(source, store_uri, [LARGE])
    ranges: list[tuple[int, int]] = []
    get = obstore.get

    class Cut:
        def __init__(self, found: Any) -> None:
            self.found = found

        def stream(self, **options: Any) -> Iterator[Any]:
            yield next(iter(self.found.stream(**options)))
            raise GenericError("connection reset")

    def cutting(store: Any, key: str, *, options: Any) -> Any:
        ranges.append(options["range"])
        found = get(store, key, options=options)
        return Cut(found) if len(ranges) == 1 else found

    monkeypatch.setattr(obstore, "get", cutting)
    with pytest.raises(TrainerError, match="connection reset") as refused:
        fetch_weights(f"{store_uri}/{LARGE}", tmp_path / "cache")
    assert refused.value.code is ExitCode.UNAVAILABLE
    assert fetch_weights(f"{store_uri}/{LARGE}", tmp_path / "cache").read_bytes() == content
    assert ranges[0] == (0, len(content))
    assert 0 < ranges[1][0] < len(content)


@pytest.mark.parametrize("name", ["none.pt", ""])
def test_weights_that_are_not_there_are_one_error(store_uri: str, tmp_path: Path, name: str) -> None:
    with pytest.raises(TrainerError) as refused:
        fetch_weights(f"{store_uri}/{name}", tmp_path / "cache")
    assert refused.value.code in (ExitCode.NOT_FOUND, ExitCode.CONFIG)
    assert refused.value.hint
