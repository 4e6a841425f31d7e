"""The data of the staging benchmark: folders of random bytes, changes to them, and a cold page cache."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FILES_PER_FOLDER = 1000
OLD = 1_600_000_000  # seconds: nothing is "just written" to a tool that goes by times
BLOCK_BYTES = 16 * 2**20
TOUCHED_BYTES = 768 * 2**20


@dataclass(frozen=True)
class DataSet:
    """`count` files of `size` bytes each, no two alike, and not to be compressed."""

    name: str
    count: int
    size: int

    @property
    def bytes(self) -> int:
        return self.count * self.size

    def __str__(self) -> str:
        size = f"{self.size / 1e6:g} MB" if self.size >= 1e6 else f"{self.size / 1e3:g} KB"
        return f"{self.count:,} x {size}"


def build(wanted: DataSet, root: Path) -> Path:
    """Writes the set below `root`, in folders of a thousand files."""
    folder = root / wanted.name
    block = random.Random(1).randbytes(min(BLOCK_BYTES, wanted.size + FILES_PER_FOLDER))
    for number in range(wanted.count):
        path = folder / f"{number // FILES_PER_FOLDER:04d}" / f"image {number:07d}.jpg"
        if number % FILES_PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        write(path, number, wanted.size, block)
    os.sync()  # dirty pages are neither dropped from the cache nor free for the next
    return folder


def write(path: Path, seed: int, size: int, block: bytes) -> None:
    """The block from a place of its own on, behind a number of its own."""
    head = seed.to_bytes(8, "big")
    with path.open("wb") as file:
        file.write(head[:size])
        left = size - len(head)
        start = seed % FILES_PER_FOLDER
        while left > 0:
            piece = block[start : start + left]
            file.write(piece)
            left -= len(piece)
            start = 0
    os.utime(path, (OLD, OLD))


def change(folder: Path, share: float, round_number: int) -> int:
    """Gives that share of the files other content of the same size, as of now. Returns how many."""
    paths = sorted(path for path in folder.rglob("*.jpg"))
    rng = random.Random(round_number + 1)
    chosen = rng.sample(paths, max(1, round(share * len(paths))))
    for path in chosen:
        path.write_bytes(rng.randbytes(path.stat().st_size))
    return len(chosen)


def touch_memory() -> None:
    """Takes and gives back memory. A virtual machine's host takes back what is free for seconds, and who needs it first would pay."""
    # Not in this process, whose peak its children inherit.
    subprocess.run([sys.executable, "-c", f"bytearray(b'x') * {TOUCHED_BYTES}"], check=True)


def drop_cache(folder: Path) -> None:
    """Takes the files' pages, not their names and inodes, out of the page cache."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
