"""The staged-dataset format: immutable packs of files, and a manifest that says what is where.

Below one prefix of a store::

    packs/<2 hex>/<pack id>.tar      files side by side, each named by its sha256: a plain tar, so `tar -x` recovers the data
    files/<2 hex>/<sha256>           a large file, an object of its own
    manifests/<version>.jsonl.gz     path, sha256, size, pack and offset of every file, or what differs from another version
    refs/<name>.json                 the newest version of a dataset, moved last

A version is the sha256 over the sorted paths and contents of its files, wherever they are packed: the same
files are the same version in every store, and packing anew changes nothing. A pack's id is the sha256 over the
digests and sizes in it, so the same id means the same bytes. Nothing in a pack is believed: files are cut out
by the manifest's offsets and compared with its digests, so links, devices and names in a hostile pack do nothing.

A file may also lie elsewhere, in place, as an object that its owner keeps (`trainer.in_place`). Its ``sha256`` is then
an identity: a hash over what the store says of the content, since nobody has read it.
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import io
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import IO, Any, NamedTuple

import msgspec

from trainer.errors import ExitCode, TrainerError
from trainer.store_records import StoreRecord

BLOCK = 512
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_PATH_BYTES = 4096  # PATH_MAX of Linux
MAX_NAME_BYTES = 255  # NAME_MAX of Linux
MAX_PATH_PARTS = 128  # nobody's data has so many; and no path has more that is no longer than one name, so that a scan need not count them
MAX_LINE_BYTES = 4 * MAX_PATH_BYTES + 512
MAX_HEADER_BYTES = 64 * 2**20  # a header names its packs, some 70 bytes each; in all those of a version, as they stay in memory
MAX_MANIFEST_BYTES = 512 * 2**20  # as stored, those below included; a million files are some 45 MiB
MAX_NUMBER = 2**63
LINES_AT_ONCE = 1024
END = bytes(2 * BLOCK)
# What gzip and JSON raise for bytes that are none: zlib.error within the stream, RecursionError for lists in lists in lists.
UNREADABLE = (OSError, EOFError, ValueError, zlib.error, RecursionError)
READABLE_SCHEMA = 2  # 2: has files in place
STAGE_AGAIN = "send it anew from its folder: trainyard dataset stage PATH --name NAME --store STORE --again"


class DamagedManifest(TrainerError):
    """Nobody can read its version, or those that say what differs from it."""


class InPlace(NamedTuple):
    """An object that is used where it lies: the URI of its prefix, and its key below that."""

    source: str
    key: str


class StagedFile(NamedTuple):
    """One file of a version. ``pack`` is empty for a large file, which is an object of its own; ``offset`` is that of its first byte.

    With ``in_place`` it is no object of the store, and ``sha256`` is its identity.
    """

    path: str
    sha256: bytes
    size: int
    pack: str
    offset: int
    in_place: InPlace | None = None


class ManifestHeader(StoreRecord, frozen=True, kw_only=True):
    """First line of a manifest. ``files`` and ``bytes`` are those of the whole version, its base included.

    ``base`` is the version that the lines are the difference to, ``depth`` how many manifests are to be read below this one.
    Lines name packs, and the prefixes of files in place (URIs), by their number in ``packs`` and ``sources``.
    """

    version: str
    base: str | None = None
    depth: int = 0
    files: int
    bytes: int
    packs: tuple[str, ...]
    sources: tuple[str, ...] = ()


def count_names(header: ManifestHeader) -> int:
    """Bytes that its packs and sources take as they are written, about."""
    return sum(len(name) + 3 for name in (*header.packs, *header.sources))


def pack_key(pack: str) -> str:
    return f"packs/{pack[:2]}/{pack}.tar"


def file_key(digest: bytes) -> str:
    return f"files/{digest.hex()[:2]}/{digest.hex()}"


def object_key(file: StagedFile) -> str:
    """Where its bytes lie: the object's name in the store, or the whole URI of one in place."""
    if file.in_place:
        return f"{file.in_place.source}/{file.in_place.key}"
    return pack_key(file.pack) if file.pack else file_key(file.sha256)


def manifest_key(version: str) -> str:
    return f"manifests/{version}.jsonl.gz"


# --- Packs -------------------------------------------------------------------------------------------


def _build_template() -> tuple[bytes, bytes, int]:
    """A ustar header (POSIX.1-1988) before and after its variable fields, and the checksum of what is fixed."""
    # mode, uid, gid
    before = b"0000644\0" + b"0000000\0" + b"0000000\0"
    # mtime, checksum as spaces, type, link name, magic
    after = b"00000000000\0" + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000"
    rest = after + bytes(BLOCK - 100 - len(before) - 12 - len(after))
    return before, rest, sum(before) + sum(rest)


_BEFORE, _REST, _FIXED_SUM = _build_template()
_CHECKSUM_AT = 12  # after the mtime


def tar_header(digest: bytes, size: int) -> bytes:
    """The 512 bytes before a file in a pack. Raises ValueError from 8 GiB on, which ustar cannot say."""
    if size >= 8**11:
        raise ValueError(f"{size} bytes do not fit into a tar header")
    name = digest.hex().encode()
    octal = b"%011o\0" % size
    checksum = b"%06o\0 " % (_FIXED_SUM + sum(name) + sum(octal))
    return b"".join((name, bytes(100 - len(name)), _BEFORE, octal, _REST[:_CHECKSUM_AT], checksum, _REST[_CHECKSUM_AT + 8 :]))


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def pack_id(files: Iterable[tuple[bytes, int]]) -> str:
    """The id of a pack that holds files of these digests and sizes in this order."""
    total = hashlib.sha256(b"trainyard-pack-1\0")
    for digest, size in files:
        total.update(digest + size.to_bytes(8, "big"))
    return total.hexdigest()


# --- Versions ----------------------------------------------------------------------------------------


class VersionHash:
    """The version of files that are added in the order of their paths. The formula is that of `trainer.dataset.dataset_version`."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.files = 0
        self.bytes = 0

    def add(self, path: str, digest: bytes, size: int) -> None:
        self._hash.update(f"{path}\0{digest.hex()}\n".encode())
        self.files += 1
        self.bytes += size

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def check_path(path: str) -> str:
    """The path itself. Raises ValueError for one that could lead out of the folder it is written to, or that no folder can hold."""
    encoded = path.encode()  # lone surrogates raise UnicodeEncodeError, a ValueError
    parts = path.split("/")
    if not path or "\0" in path or path.startswith("/") or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"unsafe path {path[:200]!r}")
    if len(encoded) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        raise ValueError(f"path too long: {path[:200]!r}")
    if len(parts) > MAX_PATH_PARTS:
        raise ValueError(f"path of more than {MAX_PATH_PARTS} parts: {path[:200]!r}")
    return path


# --- Manifests ---------------------------------------------------------------------------------------


def write_manifest(out: IO[bytes], header: ManifestHeader, files: Iterable[StagedFile | str]) -> None:
    """Writes a manifest: files in the order of their paths; a bare path says that the base's file is gone."""
    numbers = {pack: number for number, pack in enumerate(header.packs)}
    sources = {source: number for number, source in enumerate(header.sources)}
    if sources:
        header = msgspec.structs.replace(header, schema_version=READABLE_SCHEMA)
    # Without time and name, the same lines are the same bytes.
    with gzip.GzipFile(filename="", mode="wb", fileobj=out, compresslevel=1, mtime=0) as packed:
        packed.write(msgspec.json.encode(header) + b"\n")
        encoder = msgspec.json.Encoder()
        lines = (_line(file, numbers, sources) for file in files)
        while some := list(islice(lines, LINES_AT_ONCE)):
            packed.write(encoder.encode_lines(some))


def _line(file: StagedFile | str, packs: dict[str, int], sources: dict[str, int]) -> tuple[Any, ...]:
    if isinstance(file, str):
        return (file,)
    path, sha256, size, pack, offset, place = file
    if place:
        return path, sha256.hex(), size, -2 - sources[place.source], 0, place.key
    return path, sha256.hex(), size, packs[pack] if pack else -1, offset


def open_manifest(data: bytes | IO[bytes], version: str) -> tuple[ManifestHeader, Iterator[StagedFile | str]]:
    """Header and lines of a manifest. Raises TrainerError (DATA) for one that is damaged, of another version, or hostile.

    Lines are checked while they are read: unsafe paths, wrong order (hence duplicates), impossible numbers.
    """
    stream = gzip.GzipFile(fileobj=io.BytesIO(data) if isinstance(data, bytes) else data)
    try:
        header = ManifestHeader.from_json(_read_line(stream, MAX_HEADER_BYTES))
    except UNREADABLE as exc:
        raise _damaged(version, str(exc)) from exc
    if not all(SHA256.fullmatch(name) for name in (*header.packs, header.base or version)):
        raise _damaged(version, "it names a pack or base by what is no sha256")
    if header.version != version:
        raise _damaged(version, f"it is that of version {header.version[:12]}")
    if header.schema_version > READABLE_SCHEMA:
        raise TrainerError(
            f"the manifest of dataset version {version[:12]} was written by a newer Trainyard",
            hint="update Trainyard here, also in the image that trains",
            code=ExitCode.DATA,
        )
    return header, _read_files(stream, header)


def _read_files(stream: gzip.GzipFile, header: ManifestHeader) -> Iterator[StagedFile | str]:
    last = ""
    decode = msgspec.json.Decoder().decode
    try:
        while line := _read_line(stream, MAX_LINE_BYTES):
            fields = decode(line)
            path = check_path(fields[0])
            if path <= last:
                raise ValueError(f"{path[:200]!r} is out of order")
            last = path
            if len(fields) == 1:
                yield path
                continue
            _, digest, size, pack, offset, *place = fields
            whole = all(isinstance(number, int) for number in (size, pack, offset))
            if not whole or min(size, offset) < 0 or size + offset >= MAX_NUMBER or (pack < -1) != bool(place):
                raise ValueError(f"impossible numbers for {path[:200]!r}")
            sha256 = bytes.fromhex(digest)
            if len(sha256) != hashlib.sha256().digest_size:
                raise ValueError(f"no sha256 for {path[:200]!r}")
            in_place = InPlace(header.sources[-2 - pack], *map(check_path, place)) if place else None
            yield StagedFile(path, sha256, size, header.packs[pack] if pack >= 0 else "", offset, in_place)
    except (*UNREADABLE, TypeError, AttributeError, LookupError) as exc:
        raise _damaged(header.version, str(exc)) from exc


def _read_line(stream: gzip.GzipFile, most: int) -> bytes:
    line = stream.readline(most + 1)
    if len(line) > most:
        raise ValueError(f"a line has more than {most} bytes")
    return line


def _damaged(version: str, why: str) -> DamagedManifest:
    return DamagedManifest(
        f"the manifest of dataset version {version[:12]} is damaged: {why}",
        hint=STAGE_AGAIN,
        code=ExitCode.DATA,
    )


def merge_manifests(parts: list[Iterator[StagedFile | str]]) -> Iterator[StagedFile]:
    """The files of a version from its manifest and those below it, newest first. Needs no more memory than a line of each."""

    def keyed(lines: Iterator[StagedFile | str], depth: int) -> Iterator[tuple[str, int, StagedFile | str]]:
        return ((line if isinstance(line, str) else line.path, depth, line) for line in lines)

    merged = heapq.merge(*(keyed(part, depth) for depth, part in enumerate(parts)), key=lambda item: item[:2])
    for _, same in groupby(merged, key=lambda item: item[0]):
        newest = next(same)[2]
        if not isinstance(newest, str):
            yield newest


def check_version(header: ManifestHeader, files: Iterable[StagedFile]) -> Iterator[StagedFile]:
    """Passes the files on and, at their end, raises TrainerError (DATA) where they are not what the header promises.

    Raises at once where there are more files or bytes than promised, so that a hostile manifest cannot fill a disk.
    """
    seen = VersionHash()
    for file in files:
        seen.add(file.path, file.sha256, file.size)
        if seen.files > header.files or seen.bytes > header.bytes:
            raise _damaged(header.version, f"it lists more than its {header.files} files and {header.bytes} bytes")
        yield file
    if (seen.hexdigest(), seen.files, seen.bytes) != (header.version, header.files, header.bytes):
        raise _damaged(header.version, "its files are not those of the version")
