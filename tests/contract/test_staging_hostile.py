"""Manifests and packs that an attacker wrote, fetched from a real store: refused, and nothing is written outside the target."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import resource
import tarfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blocks.staging import stage_folder
from tests.contract.staged import contents, objects, put
from trainer.contract import ExitCode, TrainerError
from trainer.fetching import fetch_version
from trainer.packs import ManifestHeader, VersionHash, manifest_key, pack_key

PACK = "ab" * 32
CONTENT = b"of the attacker"
DIGEST = hashlib.sha256(CONTENT)
REFUSED = (ExitCode.DATA, ExitCode.DISK_FULL, ExitCode.UNAVAILABLE)


def line(path: str, size: int = len(CONTENT), offset: int = 512, pack: int = 0, digest: str = DIGEST.hexdigest()) -> list[Any]:
    return [path, digest, size, pack, offset]


def version_of(lines: list[list[Any]]) -> str:
    """As an attacker computes it, who wants the check at the end to pass."""
    total = VersionHash()
    for path, digest, size, *_ in lines:
        total.add(path, bytes.fromhex(digest), size)
    return total.hexdigest()


def plant(store_uri: str, lines: list[list[Any]], **values: Any) -> str:
    """Puts a manifest of those lines there, by its own word whole and right. Returns its version."""
    version = version_of(lines)
    promised = {"version": version, "files": len(lines), "bytes": sum(max(0, size) for _, _, size, *_ in lines), "packs": (PACK,)}
    header = ManifestHeader(**{**promised, **values})
    put(
        store_uri,
        manifest_key(version),
        gzip.compress("\n".join([msgspec.json.encode(header).decode(), *map(json.dumps, lines), ""]).encode()),
    )
    return version


def plant_pack(store_uri: str, *members: tarfile.TarInfo) -> None:
    """A tar of a file with the content and of other members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        file = tarfile.TarInfo("../../outside")
        file.size = len(CONTENT)
        archive.addfile(file, io.BytesIO(CONTENT))
        for member in members:
            archive.addfile(member)
    put(store_uri, pack_key(PACK), out.getvalue())


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.fixture
def room(tmp_path: Path, store_uri: str) -> Path:
    """A folder whose only content is the one that a fetch may write into; a file beside it is the attacker's aim."""
    plant_pack(store_uri)
    made = tmp_path / "room"
    (made / "into").mkdir(parents=True)
    (made / "aim").write_text("untouched")
    return made


def assert_refused(store_uri: str, version: str, room: Path) -> TrainerError:
    with pytest.raises(TrainerError) as told:
        fetch_version(store_uri, version, room / "into/copy")
    assert told.value.code in REFUSED
    assert sorted(path.name for path in room.iterdir()) == ["aim", "into"]
    assert (room / "aim").read_text() == "untouched"
    left = {path.name for path in (room / "into").iterdir()}
    assert left <= {f"copy.partial-{version[:12]}"}
    assert not [path for path in room.rglob("*") if path.is_symlink()]
    assert not (room.parent / "outside").exists()
    return told.value


HOSTILE_LINES = {
    "above": [line("../aim")],
    "far above": [line("a/../../../aim")],
    "absolute": [line("/aim")],
    "current": [line("./aim")],
    "no name": [line("")],
    "null": [line("aim\0.txt")],
    "file and folder": [line("a"), line("a/b")],
    "file and deep folder": [line("a/b"), line("a/b/c/d")],
    "twice": [line("a"), line("a")],
    "out of order": [line("b"), line("a")],
    "beyond its pack": [line("a", size=10**6)],
    "beyond any disk": [line("a", size=2**60)],
    "far into its pack": [line("a", offset=2**50)],
    "beyond 64 bits": [line("a", offset=2**70)],
    "larger than 64 bits": [line("a", size=2**70)],
    "other content": [line("a", digest=hashlib.sha256(b"other").hexdigest())],
    "no such pack": [line("a", pack=9)],
    "no such object": [line("a", pack=-1)],
}


@pytest.mark.parametrize("lines", HOSTILE_LINES.values(), ids=HOSTILE_LINES)
def test_a_hostile_manifest_is_refused(store_uri: str, room: Path, lines: list[list[Any]]) -> None:
    version = plant(store_uri, lines)
    assert_refused(store_uri, version, room)


@pytest.mark.parametrize("pack", ["../../aim", "x/../../../aim", "/aim", "aim\0"])
def test_a_pack_of_a_hostile_name_leads_nowhere(store_uri: str, room: Path, pack: str) -> None:
    assert_refused(store_uri, plant(store_uri, [line("a")], packs=(pack,)), room)


@pytest.mark.parametrize("values", [{"files": 1, "bytes": 1}, {"files": 0}, {"files": -1}, {"bytes": -1}, {"base": PACK}])
def test_a_manifest_that_promises_otherwise_is_refused(store_uri: str, room: Path, values: dict[str, Any]) -> None:
    with pytest.raises(TrainerError) as told:
        fetch_version(store_uri, plant(store_uri, [line("a"), line("b")], **values), room / "into/copy")
    assert told.value.code in (ExitCode.DATA, ExitCode.NOT_FOUND)


def test_manifests_that_name_each_other_are_refused(store_uri: str, room: Path) -> None:
    version = version_of([line("a")])
    plant(store_uri, [line("a")], base=version)
    assert "without end" in str(assert_refused(store_uri, version, room))


@pytest.mark.parametrize("unit", [b" ", b"[\n"])
def test_a_manifest_that_blows_up_is_refused_early(store_uri: str, room: Path, unit: bytes) -> None:
    """Of 256 MiB, as one line or as many, next to nothing is read."""
    version = version_of([line("a")])
    header = msgspec.json.encode(ManifestHeader(version=version, files=1, bytes=1, packs=())) + b"\n"
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9) as packed:
        packed.write(b"" if unit == b" " else header)
        for _ in range(256):
            packed.write(unit * (2**20 // len(unit)))
    put(store_uri, manifest_key(version), out.getvalue())
    assert len(out.getvalue()) < 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert assert_refused(store_uri, version, room).code is ExitCode.DATA
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 * 2**10, "in KiB"


@pytest.mark.parametrize(
    "members",
    [
        (member("link", tarfile.SYMTYPE, "/"),),
        (member("up", tarfile.SYMTYPE, "../../aim"), member("up/file", tarfile.REGTYPE)),
        (member("hard", tarfile.LNKTYPE, "../../aim"),),
        (member("pipe", tarfile.FIFOTYPE), member("device", tarfile.CHRTYPE)),
        (member("/absolute", tarfile.REGTYPE), member("../above", tarfile.DIRTYPE)),
    ],
    ids=["link", "link and through it", "hard link", "pipe and device", "names"],
)
def test_what_a_pack_says_of_itself_does_nothing(store_uri: str, room: Path, members: tuple[tarfile.TarInfo, ...]) -> None:
    """Only the manifest's cuts are written, so links, devices and names in the tar are as if they were not there."""
    plant_pack(store_uri, *members)
    version = plant(store_uri, [line("a"), line("b/c")])
    fetch_version(store_uri, version, room / "into/copy")
    assert contents(room) == {"aim": b"untouched", "into/copy/a": CONTENT, "into/copy/b/c": CONTENT}
    assert not [path for path in room.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]


def test_a_link_as_a_cut_is_not_the_promised_content(store_uri: str, room: Path) -> None:
    """A manifest that points at the header of a link gets bytes with another digest, never the link."""
    plant_pack(store_uri, member("link", tarfile.SYMTYPE, "../aim"))
    assert_refused(store_uri, plant(store_uri, [line("a", offset=1024, size=512)]), room)


@pytest.mark.parametrize("link", ["d1", "d0-1"])
def test_a_link_that_waits_in_the_folder_is_not_followed(store_uri: str, source: Path, tmp_path: Path, link: str) -> None:
    """Whoever can write beside the target may leave a link where a folder or a file of the version goes."""
    staged = stage_folder(source, store_uri)
    outside = tmp_path / "outside"
    outside.mkdir()
    partial = tmp_path / f"copy.partial-{staged.version[:12]}"
    partial.mkdir()
    (partial / link).symlink_to(outside if link == "d1" else outside / "file")
    with suppress(TrainerError):  # to go on without the link is right, too
        fetch_version(store_uri, staged.version, tmp_path / "copy")
    assert list(outside.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 511])
def test_a_truncated_pack_is_refused(store_uri: str, room: Path, size: int) -> None:
    version = plant(store_uri, [line("a")])
    put(store_uri, pack_key(PACK), bytes(size))
    assert_refused(store_uri, version, room)
    assert pack_key(PACK) in objects(store_uri)
