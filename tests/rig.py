"""One row per provider: how the contract suite makes one, what a small real job is there, and how its answers get lost.

A new provider adds a row here (and its emulator), and inherits every test of `tests/contract/`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from blocks.credentials import AccessRef
from blocks.dataset_sources import StoreChoice, stage_index
from blocks.job import JobRef, JobSpec, JobState, JobStatus
from blocks.provider import AlreadyExists, Provider
from blocks.providers import local_process
from blocks.providers.kubernetes_job import KubernetesProvider
from blocks.record import RunRecord
from tests.faults import Fault, FaultProxy
from tests.kubernetes_trainer import TrainerPlace
from tests.remote import provider as remote
from tests.stores import StoreServer
from trainer.contract import DatasetRef, TrainConfig
from trainer.dataset import check_dataset
from trainer.shapes import write_shapes
from trainer.store_access import StoreAccess, access_to

TINY = {"model": "yolo11-pico", "epochs": 1, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}


@dataclass(frozen=True)
class Rig:
    """A provider under test, with a home of its own. `store_uri`: datasets are staged there, for jobs that see no folder of ours."""

    provider: Provider[Any]
    home: Path
    dataset: Path
    lose_answer: Callable[[], AbstractContextManager[None]]
    output_uri: str
    store_uri: str | None = None
    image: str | None = None

    def record(self, run_id: str) -> RunRecord:
        return RunRecord(self.output_uri, run_id, self.provider.access)

    def read_all(self, ref: JobRef) -> dict[str, bytes]:
        """All that the attempt's folder holds."""
        objects = self.provider.objects(ref.output_uri)
        return {name: data for name in objects.sizes() if (data := objects.get(name)) is not None}

    def reference(self, record: RunRecord) -> DatasetRef:
        index = record.dataset() or check_dataset(self.dataset)
        index_uri = record.write_dataset(index)
        if self.store_uri is None:
            return DatasetRef(root=index.root, index_uri=index_uri, version=index.version, name=index.name, image_count=len(index.images))
        access = self.provider.access.resolve(self.store_uri)
        with access_to(access):
            return stage_index(index, StoreChoice(self.store_uri, access.endpoint if access else None), index_uri)[0]

    def spec(self, run_id: str, *, attempt: int = 1, max_runtime_seconds: int = 600, **config: Any) -> JobSpec:
        """A real small training: 8 images of shapes, 64 px, one epoch unless told otherwise."""
        record = self.record(run_id)
        access = self.provider.access.resolve(self.output_uri)
        return JobSpec(
            run_id=run_id,
            attempt=attempt,
            name="contract",
            config=TrainConfig.model_validate({**TINY, **config}),
            dataset=self.reference(record),
            output_uri=record.output_uri,
            output_endpoint=access.endpoint if access else None,
            image=self.image,
            max_runtime_seconds=max_runtime_seconds,
            owner="tester",
        )

    def wait(self, ref: JobRef, until: Callable[[JobStatus], bool], seconds: float = 120) -> list[JobStatus]:
        """Every distinct observation until one fits. Fails the test after `seconds`."""
        seen: list[JobStatus] = []
        pause = self.provider.CAPABILITIES.poll_seconds[0] / 5  # what a poll costs takes time from the training
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.provider.poll(ref)
            if not seen or (seen[-1].state, seen[-1].native_state) != (status.state, status.native_state):
                seen.append(status)
            if until(status):
                return seen
            time.sleep(pause)
        raise AssertionError(f"still {seen[-1]} after {seconds} s")

    def finish(self, ref: JobRef) -> list[JobStatus]:
        return self.wait(ref, lambda status: status.state.is_terminal)

    def jobs_of(self, run_id: str) -> list[tuple[JobRef, JobStatus]]:
        return [pair for pair in self.provider.list_jobs() if pair[0].run_id == run_id]

    def stop_everything(self) -> None:
        """So that no test leaves a training behind."""
        for ref, status in self.provider.list_jobs():
            if not status.state.is_terminal:
                self.provider.cancel(ref)
                self.wait(ref, lambda seen: seen.state in (JobState.CANCELLED, JobState.FAILED, JobState.SUCCEEDED), seconds=30)


@contextmanager
def lose_local_answer() -> Iterator[None]:
    """The supervisor starts, and its launcher never hears of it."""
    real = local_process.launch

    def launch(argv: list[str], folder: Path) -> str:
        real(argv, folder)
        raise AlreadyExists("the answer was lost")

    with mock.patch.object(local_process, "launch", launch):
        yield


def make_shapes(home: Path) -> Path:
    return write_shapes(home / "shapes", train=8, val=4, test=4, size=64)


def make_local(home: Path, _request: pytest.FixtureRequest) -> Rig:
    provider = local_process.LocalProvider(local_process.LocalSettings(home=home, min_free_gib=0.1, grace_seconds=5))
    return Rig(provider=provider, home=home, dataset=make_shapes(home), lose_answer=lose_local_answer, output_uri=(home / "runs").as_uri())


class KnownAccess(AccessRef):
    """Credentials as a saved block would give them, and no environment does."""

    def resolve(self, uri: str) -> StoreAccess | None:
        config = {"access_key_id": "testing", "secret_access_key": "testing", "region": "us-east-1"}
        return StoreAccess(scheme="s3", endpoint=self.endpoint, config=config) if uri.startswith("s3:") else None


@contextmanager
def lose_remote_answer() -> Iterator[None]:
    real = remote.RemoteProvider.start

    def start(*arguments: Any) -> None:
        real(*arguments)
        raise AlreadyExists("the answer was lost")

    with mock.patch.object(remote.RemoteProvider, "start", start):
        yield


def make_remote(home: Path, request: pytest.FixtureRequest) -> Rig:
    """As a cloud: all that launcher and job share is a bucket."""
    s3: StoreServer = request.getfixturevalue("s3")
    cluster = home / "cluster"
    cluster.mkdir(parents=True)
    (cluster / "identity").write_text(json.dumps(s3.environment))
    bucket = s3.make_bucket()
    return Rig(
        provider=remote.RemoteProvider(remote.RemoteSettings(cluster=cluster), KnownAccess(s3.address)),
        home=home,
        dataset=make_shapes(home),
        lose_answer=lose_remote_answer,
        output_uri=f"{bucket}/runs",
        store_uri=f"{bucket}/data",
    )


@contextmanager
def lose_answer_of(proxy: FaultProxy) -> Iterator[None]:
    """The API server creates the Job, and the connection breaks before it says so."""
    before = proxy.met("lose")
    proxy.add(Fault("lose", "POST", r"/jobs(?!.*dryRun)"))
    yield
    assert proxy.met("lose") == before + 1


def make_kubernetes(home: Path, request: pytest.FixtureRequest) -> Rig:
    """A real cluster: the flow's side is the shipped service account, and its requests pass a proxy."""
    place: TrainerPlace = request.getfixturevalue("trainer_place")
    bucket = place.s3.make_bucket()
    return Rig(
        provider=KubernetesProvider.from_settings(place.settings, KnownAccess(place.s3.address)),
        home=home,
        dataset=make_shapes(home),
        lose_answer=partial(lose_answer_of, place.proxy),
        output_uri=f"{bucket}/runs",
        store_uri=f"{bucket}/data",
        image=place.image,
    )


RIGS: dict[str, Callable[[Path, pytest.FixtureRequest], Rig]] = {"local": make_local, "remote": make_remote, "kubernetes": make_kubernetes}
