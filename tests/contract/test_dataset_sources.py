"""Images in an S3-compatible bucket, used in place by a store that is a plain folder: the run knows where they lie."""

from __future__ import annotations

import shutil
from datetime import timedelta
from pathlib import Path

import obstore
import pytest
from prefect.logging import disable_run_logger

from blocks.job import TrainRequest
from blocks.profiles import LocalProfile
from blocks.record import RunRecord
from flows.job_tasks import stage_dataset
from tests.datasets import config, yolo
from tests.stores import StoreServer
from trainer import storage
from trainer.contract import AttemptLayout, DatasetRef, ExitCode, TrainConfig, TrainerError, TrainJob
from trainer.dataset_source import open_data
from trainer.storage import open_store
from trainer.store_access import StoreAccess, access_to, current_access


@pytest.fixture
def images(s3: StoreServer, no_cloud: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with images; the environment has keys for it, and does not say where it is. Their labels are in ``labels``."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    root = yolo(tmp_path / "labels", "images/{split}", ("train", "val"), count=4)
    config(root, train="images/train", val="images/val")
    uri = f"{s3.make_bucket()}/cells"
    with access_to(StoreAccess(scheme="s3", endpoint=s3.address)):
        for path in (root / "images").rglob("*.png"):
            obstore.put(open_store(uri), path.relative_to(root).as_posix(), path)
    shutil.rmtree(root / "images")
    return uri


def staged(dataset: str, endpoint: str, tmp_path: Path, labels: Path | None = None) -> DatasetRef:
    profile = LocalProfile(slots=1, store=(tmp_path / "store").as_uri(), store_endpoint=endpoint)
    request = TrainRequest(dataset=dataset, labels=str(labels) if labels else None)
    record = RunRecord(str(tmp_path / "runs"), "abcd")
    with disable_run_logger():
        ref = stage_dataset.fn(profile, request, record, None, lambda *_: None)
    record.write_source(ref)
    return record.dataset_ref()


def fetched_images(ref: DatasetRef, tmp_path: Path) -> int:
    job = TrainJob(run_id="abcd", attempt=1, name="cells", config=TrainConfig(), dataset=ref)
    with open_data(job, AttemptLayout(tmp_path / "attempt"), lambda _: None) as data:
        assert current_access("s3://anything") is None, "what else the job reads and writes is not sent there"
        return sum((data.root / image.path).stat().st_size > 0 for image in data.index.images)


def test_the_images_address_is_remembered_where_the_store_has_none(images: str, s3: StoreServer, tmp_path: Path) -> None:
    ref = staged(images, s3.address, tmp_path, tmp_path / "labels")
    assert (ref.store_uri, ref.store_endpoint) == ((tmp_path / "store").as_uri(), None)
    assert ref.source_endpoints == {"s3": s3.address}
    assert fetched_images(ref, tmp_path) == 8


def test_it_is_remembered_of_a_set_that_is_named_by_its_store(images: str, s3: StoreServer, tmp_path: Path) -> None:
    first = staged(images, s3.address, tmp_path, tmp_path / "labels")
    ref = staged(f"{(tmp_path / 'store').as_uri()}#cells", s3.address, tmp_path)
    assert (ref.version, ref.source_endpoints) == (first.version, {"s3": s3.address})
    assert fetched_images(ref, tmp_path) == 8


def test_without_the_address_the_images_are_not_found(
    images: str, s3: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the tests above pass by nothing else."""
    monkeypatch.setitem(storage.RETRIES, "fetch", {"max_retries": 1, "retry_timeout": timedelta(seconds=1)})
    ref = staged(images, s3.address, tmp_path, tmp_path / "labels")
    elsewhere = ref.model_copy(update={"source_endpoints": {"s3": "http://127.0.0.1:9"}})
    with pytest.raises(TrainerError, match="s3://") as told:
        fetched_images(elsewhere, tmp_path)
    assert told.value.code is ExitCode.UNAVAILABLE
