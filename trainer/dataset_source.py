"""The data of a fit: an index, and the folder with its files, read in place or fetched from a store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from pydantic import ValidationError

from trainer.contract import AttemptLayout, DatasetCheck, DatasetRef, ExitCode, TrainerError, TrainJob
from trainer.storage import ObjectFolder, to_path
from trainer.store_access import StoreAccess, access_to

if TYPE_CHECKING:
    from trainer.dataset import DatasetIndex, ImageItem, LabelFile

Used = TypeVar("Used", "ImageItem", "LabelFile")

GIB = 2**30
Tell = Callable[[str], None]
log = logging.getLogger("trainer")


@dataclass(frozen=True)
class FitData:
    index: DatasetIndex
    root: Path


@contextmanager
def open_data(job: TrainJob, layout: AttemptLayout, tell: Tell) -> Iterator[FitData]:
    """The job's data, which stay while the context is open. `tell` hears, often, how far a fetch is; it may raise to stop it.

    Raises TrainerError: DATA for an index that is missing or of another version, or a dataset that is refused; what
    `trainer.fetching.fetch_version` raises.
    """
    ref = job.dataset
    if ref.store_uri is None:
        yield FitData(read_index(ref), to_path(ref.root))
        return
    from trainer.dataset_cache import dataset_folder

    with ExitStack() as stack:
        endpoint = ref.store_endpoint
        stack.enter_context(access_to(StoreAccess(scheme=urlsplit(ref.store_uri).scheme, endpoint=endpoint) if endpoint else None))
        folder = dataset_folder(
            ref.store_uri,
            ref.version,
            cache=Path(job.cache_dir) if job.cache_dir else None,
            limit_bytes=int(job.cache_limit_gib * GIB) if job.cache_limit_gib else None,
            scratch=layout / AttemptLayout.WORK,
            on_progress=FetchTold(tell),
            on_message=tell,
        )
        with access_to_sources(ref):
            fetched = stack.enter_context(folder)
        log.info(
            "dataset version %s from %s: %d files, %.1f MB fetched in %.1f s, kept in %s",
            *(ref.version[:12], ref.store_uri, fetched.fetched_files, fetched.fetched_bytes / 1e6, fetched.seconds, fetched.place),
        )
        index = read_index(ref) if ref.check is None else make_index(ref, ref.check, fetched.folder, tell)
        yield FitData(as_fetched(index, fetched.folder), fetched.folder)


@contextmanager
def access_to_sources(ref: DatasetRef) -> Iterator[None]:
    """To the buckets of what the version uses in place. For the fetch alone: what else the job reads and writes may lie in others."""
    with ExitStack() as stack:
        for scheme, endpoint in (ref.source_endpoints or {}).items():
            stack.enter_context(access_to(StoreAccess(scheme=scheme, endpoint=endpoint)))
        yield


class FetchTold:
    """Bytes done and in all as a line for people, at most twice a second."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.started = time.monotonic()
        self.told_at = 0.0
        self.first: int | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        self.first = done if self.first is None else self.first
        if now - self.told_at < 0.5:
            return
        self.told_at = now
        seconds, fetched = max(now - self.started, 1e-3), done - self.first
        eta = f", ETA {(total - done) * seconds / fetched:.0f} s" if fetched else ""
        self.tell(f"fetching the dataset: {done / 1e6:.0f} of {total / 1e6:.0f} MB, {fetched / 1e6 / seconds:.0f} MB/s{eta}")


def read_index(ref: DatasetRef) -> DatasetIndex:
    """The dataset's index. Raises TrainerError (DATA) where it is missing or of another version than the job's."""
    from trainer.dataset import DatasetIndex

    folder, _, name = ref.index_uri.rpartition("/")
    data = ObjectFolder(folder).get(name)
    if data is None:
        raise TrainerError(f"the dataset's index {ref.index_uri} does not exist", hint="check the dataset again", code=ExitCode.DATA)
    try:
        index = DatasetIndex.model_validate_json(data)
    except ValidationError as exc:
        raise TrainerError(f"{ref.index_uri} is not a dataset index", hint="check the dataset again", code=ExitCode.DATA) from exc
    if index.version != ref.version:
        raise TrainerError(
            f"the index describes dataset version {index.version[:12]}, the job asks for {ref.version[:12]}",
            hint="check the dataset again and start a new run",
            code=ExitCode.DATA,
        )
    return index


def as_fetched(index: DatasetIndex, root: Path) -> DatasetIndex:
    """The index with the times of the copies below `root`, whose contents were proven when they were fetched.

    So that nobody hashes them again to see whether they changed. Raises TrainerError (DATA) where one is missing or has another size.
    """

    def dated(file: Used) -> Used:
        try:
            found = (root / file.path).stat()
        except OSError as exc:
            message = f"{file.path} is not among the files of dataset version {index.version[:12]}"
            raise TrainerError(message, hint="stage the dataset again and start a new run", code=ExitCode.DATA) from exc
        if found.st_size != file.bytes:
            message = f"{file.path} has {found.st_size} bytes, and the dataset's index says {file.bytes}"
            raise TrainerError(message, hint="stage the dataset again and start a new run", code=ExitCode.DATA)
        return file.model_copy(update={"mtime_ns": found.st_mtime_ns})

    images, labels = tuple(map(dated, index.images)), tuple(map(dated, index.label_files))
    return index.model_copy(update={"images": images, "label_files": labels, "root": str(root)})


def make_index(ref: DatasetRef, check: DatasetCheck, folder: Path, tell: Tell) -> DatasetIndex:
    """Checks a dataset whose images nobody has read before, and puts its index where the run's record keeps it.

    The version is the store's, which covers the files that nobody uses, too.
    """
    from trainer.dataset import check_dataset

    place, _, name = ref.index_uri.rpartition("/")
    if ObjectFolder(place).get(name) is None:
        made = check_dataset(
            folder,
            split=check.split,
            max_problem_share=check.max_problem_share,
            on_progress=lambda done, total: tell(f"checking the dataset: {done} of {total} images"),
        )
        index = made.model_copy(update={"version": ref.version, "name": ref.name, "root": ref.root})
        # The first of several attempts decides, so that all train on the same splits.
        ObjectFolder(place).create(name, index.model_dump_json().encode())
    return read_index(ref)
