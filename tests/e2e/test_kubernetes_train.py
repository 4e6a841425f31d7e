"""BCCD becomes a model on a real cluster, in the real trainer image, as the shipped service account: by the command and by a deployment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.datasets import BCCD, needs_bccd
from tests.kubernetes_runs import KubernetesRuns, job_names, kubernetes_runs
from tests.stack import Stack
from tests.stores import StoreServer
from tests.trainer_image import NAME, TrainerImage
from trainer.contract import AttemptLayout

pytestmark = [pytest.mark.cluster, pytest.mark.e2e, needs_bccd]

CONFIG: dict[str, Any] = {"model": "yolo11-pico", "epochs": 2, "batch_size": 16, "image_size": 96, "workers": 0, "device": "cpu"}
OPTIONS = [part for name, value in CONFIG.items() for part in (f"--{name.replace('_', '-')}", str(value))]
CLASS = {"cpus": 0.5, "memory_gib": 4, "usd_per_hour": 1.0}
PULL_SECONDS = 600  # of 3 GB, on a new machine; later only what changed


@pytest.fixture(scope="module")
def runs(
    stack: Stack, cluster: Cluster, s3: StoreServer, trainer_image: TrainerImage, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[KubernetesRuns]:
    """The profiles say where the trainer image is kept, and not which it is."""
    with kubernetes_runs(stack, cluster, s3, tmp_path_factory.mktemp("kubernetes")) as made:
        cluster.make_volume(made.namespace, "training-cache")
        cluster.pull(trainer_image.reference, seconds=PULL_SECONDS)
        engine = trainer_image.engine
        image = {"registry": engine.registry.host, "repository": NAME, "image_base": engine.base}
        plain = {**image, "instance_classes": {"small": CLASS}}
        shared = {**plain, "enable_shared_cache": True, "cache_pvc": "training-cache"}
        made.save_profiles(kubernetes=shared, uncached=plain)
        yield made


def train_by_deployment(runs: KubernetesRuns, **parameters: Any) -> str:
    """The run's id. As a person who has `prefect` and a server, and no checkout."""
    before = runs.run_ids()
    given = {"dataset": str(BCCD), "config": CONFIG, **parameters}
    words = [
        word for name, value in given.items() for word in ("--param", f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    ]
    done = runs.stack.command("prefect", "deployment", "run", "train/kubernetes", *words, "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    [run_id] = runs.run_ids() - before
    return run_id


def expect_model(runs: KubernetesRuns, run_id: str, image: TrainerImage, place: Path) -> Path:
    """One Job, as the shipped account and in that image; a whole result, and the same files where they are collected."""
    assert runs.jobs(run_id) == job_names(run_id)
    [pod] = runs.pods(run_id)
    assert pod["spec"]["serviceAccountName"] == "trainyard-job"
    assert pod["spec"]["containers"][0]["image"] == image.reference
    assert pod["status"]["phase"] == "Succeeded"

    manifest = runs.verified(run_id)
    index = runs.json(f"runs/{run_id}/dataset.json")
    assert (manifest.dataset_version, len(index["images"])) == (index["version"], 364)
    assert (manifest.epochs, manifest.metrics_split) == (CONFIG["epochs"], "test")
    assert manifest.fingerprint == runs.attempt(run_id, 1, AttemptLayout.REF)["fingerprint"]
    assert runs.epochs(run_id) == [1, 2]
    outcome = runs.attempt(run_id, 1, AttemptLayout.OUTCOME)
    assert (outcome["state"], outcome["result"]["outcome"]) == ("succeeded", "complete")
    assert 0 < outcome["result"]["cost_usd"] < 1

    collected = runs.stack.command("trainyard", "collect", run_id, "--to", str(place), "--json")
    assert collected.returncode == 0, collected.stderr
    for name, file in manifest.files.items():
        assert hashlib.sha256((place / name).read_bytes()).hexdigest() == file.sha256
    return Path(json.loads(collected.stdout)["model"])


def class_names(model: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """As whoever loads the model sees them."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(scratch))
    from ultralytics import YOLO

    return set(YOLO(str(model)).names.values())


def test_trained_by_the_command_then_by_the_deployment_which_fetches_no_dataset_byte(
    runs: KubernetesRuns, worker: object, trainer_image: TrainerImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the store. Both mount the shared cache; the first one to come fills it."""
    row = runs.train(str(BCCD), "--profile", "kubernetes", *OPTIONS)
    assert row["state"] == "succeeded"
    model = expect_model(runs, row["run_id"], trainer_image, tmp_path / "first")
    assert class_names(model, tmp_path, monkeypatch) == {"Platelets", "RBC", "WBC"}
    fetched = runs.dataset_bytes()
    assert fetched >= sum(path.stat().st_size for path in (BCCD / "JPEGImages").iterdir())

    run_id = train_by_deployment(runs)
    expect_model(runs, run_id, trainer_image, tmp_path / "second")
    assert runs.dataset_bytes() == fetched
    assert " 0 files, 0.0 MB fetched" in runs.log(run_id)


@pytest.mark.full
def test_without_a_shared_cache_each_of_the_two_fetches_the_dataset(
    runs: KubernetesRuns, worker: object, trainer_image: TrainerImage, tmp_path: Path
) -> None:
    before = runs.dataset_bytes()
    row = runs.train(str(BCCD), "--profile", "uncached", *OPTIONS)
    expect_model(runs, row["run_id"], trainer_image, tmp_path / "first")
    once = runs.dataset_bytes() - before
    assert once > 0
    run_id = train_by_deployment(runs, profile="uncached")
    expect_model(runs, run_id, trainer_image, tmp_path / "second")
    assert runs.dataset_bytes() - before == 2 * once
