"""A staged version in a folder, written by hand: as somebody writes it who is not bound to our stager."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

from trainer.packs import (
    BLOCK,
    END,
    ManifestHeader,
    StagedFile,
    VersionHash,
    file_key,
    manifest_key,
    pack_id,
    pack_key,
    padding,
    tar_header,
    write_manifest,
)


def write_store(root: Path, packed: dict[str, bytes], alone: dict[str, bytes] | None = None, **header: Any) -> str:
    """A version whose files lie in one pack, or each `alone`; the header says what is right or what the test wants."""
    alone = alone or {}
    chunks: list[bytes] = []
    placed: dict[bytes, int] = {}
    size = 0
    for content in packed.values():
        digest = hashlib.sha256(content).digest()
        if digest not in placed:
            placed[digest] = size + BLOCK
            chunks += (tar_header(digest, len(content)), content, padding(len(content)))
            size += sum(map(len, chunks[-3:]))
    pack = pack_id(list(placed.items()))
    write(root / pack_key(pack), b"".join((*chunks, END)))
    files: list[StagedFile] = []
    total = VersionHash()
    for path, content in sorted({**packed, **alone}.items()):
        digest = hashlib.sha256(content).digest()
        if path in alone:
            write(root / file_key(digest), content)
        files.append(StagedFile(path, digest, len(content), "" if path in alone else pack, 0 if path in alone else placed[digest]))
        total.add(path, digest, len(content))
    values = {"version": total.hexdigest(), "files": total.files, "bytes": total.bytes, "packs": (pack,), **header}
    out = io.BytesIO()
    write_manifest(out, ManifestHeader(**values), files)
    write(root / manifest_key(values["version"]), out.getvalue())
    return values["version"]


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def read_tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
