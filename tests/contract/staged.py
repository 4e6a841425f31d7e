"""What the staging suites share: a folder to stage, and how copy and store are looked at."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from blocks.uploads import LARGE_BYTES
from trainer.packs import BLOCK
from trainer.storage import list_paths, open_store

if TYPE_CHECKING:
    from obstore.store import ObjectStore


def write_source(root: Path) -> Path:
    """Small files, one large, one empty, a copy, and names that tools trip over; none of them fresh from the clock's view."""
    rng = random.Random(1)
    for number in range(300):
        path = root / f"d{number % 7}" / f"img {number:04d} ü.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(rng.randbytes(rng.choice([0, 1, 511, 512, 513, 8192])))
    (root / "large.bin").write_bytes(rng.randbytes(LARGE_BYTES + 1))
    (root / "copy of large.bin").write_bytes((root / "large.bin").read_bytes())
    (root / "d0-1").write_bytes(b"sorts between d0 and d0/")
    (root / ("n" * 200)).write_bytes(b"long name")
    for path in root.rglob("*"):
        os.utime(path, (1e9, 1e9))
    return root


def touch_old(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, (1.1e9, 1.1e9))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def assert_same(source: Path, copy: Path) -> None:
    assert contents(source) == contents(copy)


def objects(store_uri: str) -> set[str]:
    return set(list_paths(open_store(store_uri), ""))


def sizes(store_uri: str) -> dict[str, int]:
    import obstore

    return {meta["path"]: meta["size"] for page in obstore.list(open_store(store_uri), "") for meta in page}


def get(store_uri: str, key: str) -> bytes:
    import obstore

    return bytes(obstore.get(open_store(store_uri), key).bytes())


def put(store_uri: str, key: str, data: bytes) -> None:
    import obstore

    obstore.put(open_store(store_uri), key, data)


def record_puts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of what is written from now on, in the order of their writing."""
    import obstore

    put, keys = obstore.put, list[str]()

    def recording(store: ObjectStore, path: str, data: Any, **options: Any) -> object:
        keys.append(path)
        return put(store, path, data, **options)

    monkeypatch.setattr(obstore, "put", recording)
    return keys


def packed_bytes(size: int) -> int:
    """What a file of `size` bytes takes in a pack."""
    return BLOCK + size + -size % BLOCK


def assert_no_duplicates(store_uri: str, *sources: dict[str, bytes], beyond: int) -> None:
    """Packs and large files of the store hold each content once, and at most `beyond` bytes more."""
    stored = {key: size for key, size in sizes(store_uri).items() if key.startswith(("packs/", "files/"))}
    needed = sum(packed_bytes(len(content)) for content in {content for source in sources for content in source.values()})
    ends = 1024 * sum(key.startswith("packs/") for key in stored)
    assert needed - 1024 <= sum(stored.values()) <= needed + ends + beyond
