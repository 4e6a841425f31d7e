"""A peer of the staging benchmark: every file as an object of its own, with the same transfer library and a fixed number of threads.

Keeps neither digests nor state, so it cannot tell later what changed. Called as ``FOLDER URI THREADS``.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SMALL_BYTES = 2**20  # read at once; larger ones the library reads from the path


def main() -> None:
    import obstore

    from trainer.storage import open_store

    folder, uri, threads = sys.argv[1:]
    store = open_store(uri)

    def send(entry: os.DirEntry[str]) -> None:
        path = Path(entry.path)
        obstore.put(store, os.path.relpath(path, folder), path.read_bytes() if entry.stat().st_size <= SMALL_BYTES else path)

    with ThreadPoolExecutor(int(threads)) as pool:
        for _ in pool.map(send, walk(folder)):
            pass


def walk(folder: str) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found += walk(entry.path)
            else:
                found.append(entry)
    return found


if __name__ == "__main__":
    main()
