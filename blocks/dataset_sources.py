"""Where a run's dataset comes from: a folder read in place, a folder staged to a store, a version in a store, or a bucket."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from blocks.garbage import pin_version, unpin_version
from blocks.job import TrainRequest
from blocks.label_matching import is_image
from blocks.places import home
from blocks.refs import choose_name, find_version
from blocks.registering import Registered, register_uri
from blocks.staging import OnCounts, Staged, stage_folder
from trainer.contract import DatasetCheck, DatasetRef, ExitCode, TrainerError
from trainer.dataset import DatasetIndex
from trainer.fetching import read_version
from trainer.storage import open_store, to_store_uri, told_plainly

ENV_STORE = "TRAINYARD_STORE"
SUFFIX = ".used"  # of the name in the store: the files that trainings use, beside a folder that was staged whole under its own name

SPARE_DAYS = 30  # for queues, and a person who resumes

EndpointOf = Callable[[str], str | None]  # the address of the store of a URI, where that is not its cloud's own


@dataclass(frozen=True)
class StoreChoice:
    """Where to stage, and the address of a store that is not its cloud's own; those of buckets whose objects stay in place, by scheme."""

    uri: str
    endpoint: str | None = None
    source_endpoints: Mapping[str, str] = field(default_factory=dict[str, str])


def is_uri(dataset: str) -> bool:
    return "://" in dataset


def split_staged(dataset: str) -> tuple[str, str] | None:
    """Store and version of ``s3://bucket/datasets#cells``, a dataset that lies staged in a store; None of anything else."""
    uri, hash_sign, name = dataset.partition("#")
    return (uri.rstrip("/"), unquote(name)) if is_uri(dataset) and hash_sign and name else None


def choose_store(request: TrainRequest, profile_store: str | None) -> str:
    """The request's store, else the profile's, $TRAINYARD_STORE, or a folder of this machine."""
    return to_store_uri(request.store or profile_store or os.environ.get(ENV_STORE) or home() / "store")


def dataset_name(dataset: str) -> str:
    """What people call it: the folder's or file's name; of a URI its last folder, or the staged dataset's name."""
    if not is_uri(dataset):
        return Path(dataset).stem
    staged, parts = split_staged(dataset), urlsplit(dataset)
    return staged[1] if staged else unquote(parts.path.rstrip("/").rsplit("/", 1)[-1]) or parts.netloc


def stage_index(
    index: DatasetIndex,
    store: StoreChoice,
    index_uri: str,
    on_counts: OnCounts | None = None,
    on_silence: Callable[[str], None] | None = None,
) -> tuple[DatasetRef, Staged]:
    """Brings the files that an index names to the store, and only them: the version there is the index's.

    Raises what `stage_folder` raises, and TrainerError (DATA) where the files are not what they were when they were checked.
    """
    paths = sorted({file.path for file in (*index.images, *index.label_files)})
    name = f"{choose_name(index.name, 80)}{SUFFIX}"
    staged = stage_folder(Path(index.root), store.uri, name, on_counts, only=paths, on_silence=on_silence)
    if staged.version != index.version:
        raise TrainerError(
            f"{index.root} changed between its check and its staging: it is version {staged.version[:12]} now, not {index.version[:12]}",
            hint="run it again when nothing writes to the folder",
            code=ExitCode.DATA,
        )
    ref = DatasetRef(
        root=index.root,
        index_uri=index_uri,
        version=index.version,
        name=index.name,
        image_count=len(index.images),
        store_uri=store.uri,
        store_endpoint=store.endpoint,
    )
    return ref, staged


def find_staged(dataset: str, endpoint_of: EndpointOf, index_uri: str, check: DatasetCheck) -> DatasetRef:
    """The version that ``STORE#NAME`` means now; the trainer checks its images. Raises TrainerError: NOT_FOUND, CONFIG."""
    found = split_staged(dataset)
    assert found is not None, "callers ask for staged datasets only"
    uri, wanted = found
    version = find_version(uri, wanted)
    images, sources = look_at_files(uri, version)
    store = StoreChoice(uri, endpoint_of(uri), find_endpoints(sources, endpoint_of))
    return _checked_later(dataset, version, images, store, index_uri, check)


def look_at_files(store_uri: str, version: str) -> tuple[int, set[str]]:
    """How many images the version has, by their names, and where files in place lie; reads all of the manifest."""
    images, sources = 0, set[str]()
    with told_plainly(store_uri):
        for file in read_version(open_store(store_uri), version)[1]:
            images += is_image(file.path)
            if file.in_place:
                sources.add(file.in_place.source)
    return images, sources


def find_endpoints(uris: Iterable[str], endpoint_of: EndpointOf) -> dict[str, str]:
    """By scheme, the addresses of stores that are not their cloud's own."""
    found = {urlsplit(uri).scheme: endpoint_of(uri) for uri in uris}
    return {scheme: endpoint for scheme, endpoint in sorted(found.items()) if endpoint}


def register(
    request: TrainRequest, store: StoreChoice, index_uri: str, check: DatasetCheck, say: Callable[[str], None] | None = None
) -> tuple[DatasetRef, Registered]:
    """A manifest over the objects of a bucket, with labels from a folder or COCO file where they are given; no image moves."""
    labels = Path(request.labels) if request.labels else None
    staged = register_uri(request.dataset, store.uri, labels=labels, on_progress=say)
    return _checked_later(request.dataset, staged.version, staged.images, store, index_uri, check), staged


def _checked_later(dataset: str, version: str, images: int, store: StoreChoice, index_uri: str, check: DatasetCheck) -> DatasetRef:
    return DatasetRef(
        root=dataset,
        index_uri=index_uri,
        version=version,
        name=dataset_name(dataset),
        image_count=images,
        store_uri=store.uri,
        store_endpoint=store.endpoint,
        source_endpoints=dict(store.source_endpoints) or None,
        check=check,
    )


# --- While a run is open -------------------------------------------------------------------------------


def pin(ref: DatasetRef, request: TrainRequest, run_id: str, say: Callable[[str], None] | None = None) -> None:
    """No collection takes the version away before the run can be over, wherever that collection runs."""
    assert ref.store_uri is not None
    days = SPARE_DAYS + request.max_attempts * request.max_runtime_seconds / 86_400
    pin_version(open_store(ref.store_uri), ref.store_uri, run_id, ref.version, days, say)


def unpin(ref: DatasetRef, run_id: str) -> None:
    if ref.store_uri is not None:
        unpin_version(open_store(ref.store_uri), ref.store_uri, run_id)
