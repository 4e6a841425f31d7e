"""One row per provider: how the contract suite makes one, what a small real job is there, and how its answers get lost.

A new provider adds a row here (and its emulator), and inherits every test of `tests/contract/`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from blocks.dataset_sources import StoreChoice, stage_index
from blocks.job import JobRef, JobSpec, JobState, JobStatus
from blocks.provider import AlreadyExists, Provider
from blocks.providers import kubernetes_client, local_process
from blocks.providers.kubernetes_job import KubernetesProvider
from blocks.record import RunRecord
from trainer.contract import DatasetRef, TrainConfig
from trainer.dataset import check_dataset
from trainer.shapes import write_shapes
from trainer.storage import ObjectFolder, list_paths, open_store

TINY = {"model": "yolo11-pico", "epochs": 1, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}


@dataclass(frozen=True)
class Rig:
    """A provider under test, with a home of its own."""

    provider: Provider[Any]
    home: Path
    dataset: Path
    lose_answer: Callable[[], AbstractContextManager[None]]
    output_uri: str = ""
    store: StoreChoice | None = None
    image: str | None = None
    more: dict[str, Any] = field(default_factory=dict)  # further fields of every spec

    def record(self, run_id: str) -> RunRecord:
        return RunRecord(self.output_uri or (self.home / "runs").as_uri(), run_id)

    def objects(self, ref: JobRef) -> ObjectFolder:
        return ObjectFolder(ref.output_uri)

    def texts(self, ref: JobRef) -> list[str]:
        """All that the attempt has, as far as it is text."""
        found = (self.objects(ref).get(name) for name in list_paths(open_store(ref.output_uri), ""))
        return [data.decode(errors="replace") for data in found if data is not None]

    def spec(self, run_id: str, *, attempt: int = 1, max_runtime_seconds: int = 600, **config: Any) -> JobSpec:
        """A real small training: 8 images of shapes, 64 px, one epoch unless told otherwise."""
        record = self.record(run_id)
        index = record.dataset() or check_dataset(self.dataset)
        dataset = DatasetRef(
            root=index.root,
            index_uri=record.write_dataset(index),
            version=index.version,
            name=index.name,
            image_count=len(index.images),
        )
        if self.store is not None:
            dataset, _ = stage_index(index, self.store, dataset.index_uri)
        return JobSpec(
            run_id=run_id,
            attempt=attempt,
            name="contract",
            config=TrainConfig.model_validate({**TINY, **config}),
            dataset=dataset,
            output_uri=record.output_uri,
            image=self.image,
            max_runtime_seconds=max_runtime_seconds,
            owner="tester",
            **self.more,
        )

    def wait(self, ref: JobRef, until: Callable[[JobStatus], bool], seconds: float = 120) -> list[JobStatus]:
        """Every distinct observation until one fits. Fails the test after `seconds`."""
        seen: list[JobStatus] = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            status = self.provider.poll(ref)
            if not seen or (seen[-1].state, seen[-1].native_state) != (status.state, status.native_state):
                seen.append(status)
            if until(status):
                return seen
            time.sleep(0.1)
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


@contextmanager
def make_local(home: Path, _request: pytest.FixtureRequest) -> Iterator[Rig]:
    provider = local_process.LocalProvider(local_process.LocalSettings(home=home, min_free_gib=0.1, grace_seconds=5))
    yield Rig(
        provider=provider, home=home, dataset=write_shapes(home / "shapes", train=8, val=4, test=4, size=64), lose_answer=lose_local_answer
    )


@contextmanager
def lose_kubernetes_answer() -> Iterator[None]:
    """The API server creates the Job, and its answer does not arrive."""
    real = kubernetes_client.Cluster.call

    def call(self: kubernetes_client.Cluster, method: str, path: str, **options: Any) -> Any:
        answer = real(self, method, path, **options)
        if method == "POST":
            raise kubernetes_client.NoAnswer(TimeoutError("read"), "cluster", unsent=False)
        return answer

    with mock.patch.object(kubernetes_client.Cluster, "call", call):
        yield


@contextmanager
def make_kubernetes(home: Path, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """The tests' cluster, with S3 as the only store that both sides see, and this environment's trainer in the pods."""
    from tests.kubernetes_jobs import host_settings, import_host_image
    from tests.stores import new_store

    cluster, s3 = request.getfixturevalue("cluster"), request.getfixturevalue("s3")
    with pytest.MonkeyPatch.context() as patch, cluster.namespace("rig") as namespace:
        bucket = new_store(s3, patch)
        provider = KubernetesProvider.from_settings(host_settings(cluster, namespace, s3))
        dataset = write_shapes(home / "shapes", train=8, val=4, test=4, size=64)
        yield Rig(
            provider=provider,
            home=home,
            dataset=dataset,
            lose_answer=lose_kubernetes_answer,
            output_uri=f"{bucket}/runs",
            store=StoreChoice(f"{bucket}/store", s3.address),
            image=import_host_image(cluster),
        )


# As context managers: what a row needs of the machine comes by pytest's own fixtures.
RIGS: dict[str, Callable[[Path, pytest.FixtureRequest], AbstractContextManager[Rig]]] = {"local": make_local, "kubernetes": make_kubernetes}
