from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from trainer.contract import TrainerError
from trainer.packs import (
    END,
    DamagedManifest,
    ManifestHeader,
    StagedFile,
    VersionHash,
    check_path,
    check_version,
    merge_manifests,
    open_manifest,
    pack_id,
    padding,
    tar_header,
    write_manifest,
)

PACK = "ab" * 32
VERSION = "cd" * 32


def digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def staged(path: str, size: int = 3, pack: str = PACK) -> StagedFile:
    return StagedFile(path, digest(path), size, pack, 512)


def header(**values: Any) -> ManifestHeader:
    return ManifestHeader(**{"version": VERSION, "files": 10, "bytes": 1000, "packs": (PACK,), **values})


def manifest(lines: list[Any], **values: Any) -> bytes:
    """A manifest as an attacker writes it, who is not bound to our writer."""
    return gzip.compress("\n".join([msgspec.json.encode(header(**values)).decode(), *map(json.dumps, lines), ""]).encode())


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 8192])
def test_a_pack_is_a_plain_tar(size: int) -> None:
    content = bytes(range(256)) * 40
    content = content[:size]
    name = hashlib.sha256(content).digest()
    data = tar_header(name, size) + content + padding(size) + END
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        [member] = archive.getmembers()
        assert (member.name, member.size, member.isreg(), member.mode) == (name.hex(), size, True, 0o644)
        opened = archive.extractfile(member)
        assert opened is not None
        assert opened.read() == content


def test_the_id_of_a_pack_is_that_of_its_contents_in_their_order() -> None:
    one, two = (digest("a"), 1), (digest("b"), 2)
    assert pack_id([one, two]) == pack_id(iter([one, two]))
    assert len({pack_id([one, two]), pack_id([two, one]), pack_id([one]), pack_id([])}) == 4


def test_a_manifest_comes_back_as_it_was_written() -> None:
    files = [staged("a/x.jpg"), StagedFile("b/ünï 日本.jpg", digest("b"), 2**40, "", 0), "gone.txt", staged("z")]
    out = io.BytesIO()
    write_manifest(out, header(base="ef" * 32, depth=1), files)
    read, lines = open_manifest(out.getvalue(), VERSION)
    assert (read.base, read.files, list(lines)) == ("ef" * 32, 10, files)
    again = io.BytesIO()
    write_manifest(again, header(base="ef" * 32, depth=1), files)
    assert again.getvalue() == out.getvalue(), "the same lines are the same bytes"


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/.", "", "a\0b", "x" * 256, "a/" * 2048 + "b", "a/" * 128 + "b", "\ud800"]
)
def test_paths_that_lead_out_are_refused(path: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - any
        check_path(path)


HEX = "00" * 32


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([["../../etc/cron.d/x", HEX, 1, 0, 512]], "unsafe path"),
        ([["/abs", HEX, 1, 0, 512]], "unsafe path"),
        ([["a", HEX, 1, 0, 512], ["a", HEX, 1, 0, 512]], "out of order"),
        ([["b", HEX, 1, 0, 512], ["a", HEX, 1, 0, 512]], "out of order"),
        ([["a", HEX, -1, 0, 512]], "impossible"),
        ([["a", HEX, 1, -2, 512]], "impossible"),
        ([["a", HEX, 1, 0, -512]], "impossible"),
        ([["a", HEX, 1, 7, 512]], "damaged"),
        ([["a", "00", 1, 0, 512]], "no sha256"),
        ([["a", HEX, 1.5, 0, 512]], "impossible"),
        ([["a", HEX, 1]], "damaged"),
        ([[5, HEX, 1, 0, 512]], "damaged"),
        ([{}], "damaged"),
        ([["a" * 20_000, HEX, 1, 0, 512]], "more than"),
    ],
)
def test_hostile_lines_are_refused(lines: list[Any], why: str) -> None:
    _, files = open_manifest(manifest(lines), VERSION)
    with pytest.raises(TrainerError, match=why):
        list(files)


@pytest.mark.parametrize(
    "data",
    [b"", b"no gzip", gzip.compress(b""), gzip.compress(b"{}\n"), manifest([])[:-20], manifest([], version="00")],
    ids=["empty", "no gzip", "nothing in it", "no header", "cut short", "another version"],  # gzip writes the time: no name for a test
)
def test_what_is_no_manifest_of_the_version_is_refused(data: bytes) -> None:
    with pytest.raises(TrainerError, match="damaged"):
        list(open_manifest(data, VERSION)[1])


def test_a_byte_that_rotted_anywhere_in_a_manifest_is_told_as_damage() -> None:
    """Most lie within what is compressed, where gzip passes on what zlib raises."""
    out = io.BytesIO()
    write_manifest(out, header(), [staged(f"{number:03d}.jpg") for number in range(20)])
    whole = out.getvalue()
    for place in range(10, len(whole)):  # behind gzip's header, which says nothing of the content
        with pytest.raises(DamagedManifest):
            list(open_manifest(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :], VERSION)[1])


NESTED = "[" * 16_000


@pytest.mark.parametrize(
    "lines", [f'{{"unknown": {NESTED}', msgspec.json.encode(header()).decode() + "\n" + NESTED], ids=["header", "line"]
)
def test_lists_in_lists_without_end_are_told_as_damage(lines: str) -> None:
    with pytest.raises(DamagedManifest):
        list(open_manifest(gzip.compress(lines.encode()), VERSION)[1])


def test_a_manifest_that_lists_more_than_it_promises_is_refused_before_it_is_through() -> None:
    files = iter([staged("a", 600), staged("b", 600), staged("c", 600)])
    seen: list[str] = []
    with pytest.raises(TrainerError, match="more than"):
        seen.extend(file.path for file in check_version(header(), files))
    assert seen == ["a"]


def test_files_of_another_version_are_refused() -> None:
    with pytest.raises(TrainerError, match="not those of the version"):
        list(check_version(header(), iter([staged("a")])))


PATHS = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=5).filter(lambda text: text not in (".", ".."))


@given(st.lists(st.dictionaries(PATHS, st.integers(0, 9)), min_size=1, max_size=5))
def test_a_chain_of_differences_is_the_newest_version(versions: list[dict[str, int]]) -> None:
    """Each version as the difference to the one before; read together they are the last one."""
    parts: list[list[StagedFile | str]] = []
    before: dict[str, int] = {}
    for version in versions:
        changed: list[StagedFile | str] = [staged(path, size) for path, size in version.items() if before.get(path) != size]
        changed += [path for path in before if path not in version]
        parts.append(sorted(changed, key=lambda line: line if isinstance(line, str) else line.path))
        before = version
    merged = list(merge_manifests([iter(part) for part in reversed(parts)]))
    assert {file.path: file.size for file in merged} == versions[-1]
    assert [file.path for file in merged] == sorted(versions[-1])


def test_the_version_is_the_one_of_the_dataset_index() -> None:
    from trainer.dataset import dataset_version

    total = VersionHash()
    for path in ("a", "a-b", "a/b"):
        total.add(path, digest(path), 1)
    assert total.hexdigest() == dataset_version((path, digest(path).hex()) for path in ("a/b", "a", "a-b"))
