"""Reads what a store has of a dataset, compares every file's sha256, and keeps nothing of it."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from trainer.errors import ExitCode, TrainerError
from trainer.fetch_index import FetchIndex, Part, cut_parts
from trainer.fetching import Count, Fetched, Progress, read_version
from trainer.in_place import verify_in_place
from trainer.packs import StagedFile
from trainer.ranges import RangeReader
from trainer.silence import SilenceWatch
from trainer.storage import PATIENCE, folders_told_plainly, open_store, told_plainly


def verify_version(
    store_uri: str, version: str, on_progress: Progress | None = None, *, on_silence: Callable[[str], None] | None = None
) -> Fetched:
    """Reads every file of a version in the store and compares its sha256. Raises as `fetch_version` does, at the first that is wrong.

    Files in place have no sha256 that is known: their store is asked whether they are as they were registered.
    """
    with told_plainly(store_uri), folders_told_plainly():
        header, files = read_version(open_store(store_uri), version)
        count = Count(header.bytes, on_progress)
        with _indexed(files) as index, SilenceWatch(on_silence, PATIENCE.total_seconds()) as silence:
            reader = RangeReader(open_store(store_uri, "fetch"), silence)

            def verify(part: Part) -> None:
                _compare(reader, part)
                count.add(sum(file.size for file in part.files))

            reader.in_parallel(cut_parts(index.files()), verify)
            verify_in_place(index.files_in_place(), store_uri, count.add, silence)
    return Fetched(version, header.files, header.bytes, header.files, header.bytes)


def find_wrong(store_uri: str, files: Iterable[StagedFile], on_bytes: Callable[[int], None], silence: SilenceWatch) -> set[str]:
    """Keys of the objects that the store lacks, or that hold something else than the files say. Each range is read to its end.

    `on_bytes` is told of what has been compared, by several threads, one at a time. Raises what the store raises.
    """
    wrong: set[str] = set()
    lock = threading.Lock()
    with _indexed(files) as index:
        reader = RangeReader(open_store(store_uri, "fetch"), silence)

        def look(part: Part) -> None:
            try:
                _compare(reader, part)
            except TrainerError as exc:
                if exc.code is not ExitCode.DATA:
                    raise
                wrong.add(part.key)
            with lock:
                on_bytes(sum(file.size for file in part.files))

        reader.in_parallel(cut_parts(index.files()), look)
    return wrong


@contextlib.contextmanager
def _indexed(files: Iterable[StagedFile]) -> Iterator[FetchIndex]:
    """The files by object, which are read to their end first."""
    with tempfile.TemporaryDirectory(prefix="trainyard-") as scratch, contextlib.closing(FetchIndex(Path(scratch) / "index")) as index:
        index.fill(files)
        yield index


def _compare(reader: RangeReader, part: Part) -> None:
    """Raises TrainerError (DATA) where the store lacks the part, or it is not what it should be."""
    if part.is_large:
        total = hashlib.sha256()
        for content in reader.read_ahead(part.key, part.start, part.end):
            total.update(content)
        part.files[0].compare(total.digest())
        return
    content = reader.read(part.key, part.start, part.end)
    for file in part.files:
        file.compare(hashlib.sha256(part.cut(content, file)).digest())
