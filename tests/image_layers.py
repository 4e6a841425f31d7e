"""What an image is made of: its layers' sizes as a registry has them, and their files as the engine unpacked them.

By hand: ``python -m tests.image_layers IMAGE`` prints the layers of an image that the engine has.
"""

from __future__ import annotations

import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.docker_engine import Engine, running_engine
from tests.docker_registry import Registry

MIB = 2**20
SEARCHED_BYTES = 2 * MIB


@dataclass(frozen=True)
class Layer:
    """`size` is compressed, as it is pushed and pulled."""

    digest: str
    size: int


@dataclass(frozen=True)
class Finding:
    path: str
    why: str


def pushed_layers(registry: Registry, repository: str, reference: str) -> list[Layer]:
    """From the base upwards."""
    manifest = registry.json(f"{repository}/manifests/{reference}")
    return [Layer(layer["digest"], layer["size"]) for layer in manifest["layers"]]


def unpacked_layers(engine: Engine, image: str) -> list[Path]:
    """The folder of each layer that has files, from the base upwards."""
    data: dict[str, Any] = engine.inspect(image)["GraphDriver"]["Data"]
    return [Path(folder) for folder in [*reversed(data.get("LowerDir", "").split(":")), data["UpperDir"]] if folder]


def files_of(layer: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(layer.rglob("*")):
        yield path.relative_to(layer).as_posix(), path


def unpacked_bytes(layer: Path) -> int:
    return sum(path.lstat().st_size for _, path in files_of(layer) if not path.is_dir())


def scan_layer(layer: Path, secrets: list[bytes]) -> list[Finding]:
    """What has no place in an image. Deleted files count, too: they are in the layer below."""
    found: list[Finding] = []
    for name, path in files_of(layer):
        mode = path.lstat().st_mode
        parts = name.split("/")
        if mode & (stat.S_ISUID | stat.S_ISGID) and stat.S_ISREG(mode):
            found.append(Finding(name, "runs with another's rights"))
        if mode & stat.S_IWOTH and not stat.S_ISLNK(mode) and not mode & stat.S_ISVTX and not stat.S_ISCHR(mode):
            found.append(Finding(name, "can be written by everyone"))
        if parts[-1] in {"tests", ".git", ".pytest_cache"} and stat.S_ISDIR(mode):
            found.append(Finding(name, "has no place in an image"))
        if stat.S_ISREG(mode) and (parts[:2] == ["var", "cache"] or parts[0] in {"root", "tmp"} or ".cache" in parts):
            found.append(Finding(name, "is left from the build"))
        if stat.S_ISREG(mode) and path.stat().st_size <= SEARCHED_BYTES:
            text = path.read_bytes()
            found += [Finding(name, "holds a secret") for secret in secrets if secret in text]
    return found


def report(engine: Engine, image: str) -> str:
    lines = [
        f"{unpacked_bytes(layer) / MIB:10.1f} MiB unpacked  {', '.join(sorted(entry.name for entry in layer.iterdir()))}"
        for layer in unpacked_layers(engine, image)
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    with running_engine() as running:
        sys.stdout.write(report(running, sys.argv[1]) + "\n")
