"""The image trains under each platform's contract: with its folders and variables, and the result where it is collected."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.docker_engine import Engine
from tests.fit_rig import make_attempt
from tests.stack import wait_for
from tests.trainer_image import STRICT, TrainerImage
from trainer.contract import AttemptLayout, ExitCode, ExitRecord, FailureReason, ResultManifest, TrainJob
from trainer.progress import read_lines

SET = "s3://bucket/data"


@dataclass
class Container:
    """One container with the folders that a platform mounts; it lives on until the test ends, as its exit code is asked for."""

    image: TrainerImage
    base: Path
    name: str = field(default_factory=lambda: f"trainyard-test-{uuid4().hex[:12]}")
    mounts: list[str] = field(default_factory=list)
    started: bool = False

    @property
    def engine(self) -> Engine:
        return self.image.engine

    @property
    def data(self) -> Path:
        return self.base / "made"

    def make_job(self, uri: str = SET, output_uri: str | None = None, **config: Any) -> str:
        """A job's text; its dataset has another address in the cloud than in the container."""
        layout = make_attempt(self.data, **config)
        job = TrainJob.model_validate_json((layout / AttemptLayout.CONFIG).read_bytes())
        dataset = job.dataset.model_copy(update={"root": f"{uri}/data", "index_uri": f"{uri}/index.json"})
        return job.model_copy(update={"dataset": dataset, "output_uri": output_uri}).model_dump_json()

    def mount(self, place: str, folder: Path, *, writable: bool = False) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        if writable:
            folder.chmod(0o777)  # the image's user is nobody's on this machine
        self.mounts += ["--volume", f"{folder}:{place}{'' if writable else ':ro'}"]
        return folder

    def start(self, *argv: str, variables: dict[str, str], options: tuple[str, ...] = ()) -> None:
        if self.started:
            self.engine.docker("rm", "--force", self.name)
        self.started = True
        told = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        self.engine.docker("run", "--detach", "--name", self.name, *STRICT, *self.mounts, *told, *options, self.image.reference, *argv)

    def run(self, *argv: str, variables: dict[str, str], options: tuple[str, ...] = ()) -> tuple[int, str]:
        self.start(*argv, variables=variables, options=options)
        return self.wait()

    def wait(self, seconds: float = 300) -> tuple[int, str]:
        code = int(self.engine.docker("wait", self.name, timeout=seconds).stdout)
        return code, self.output()

    def output(self) -> str:
        done = self.engine.docker("logs", self.name)
        return done.stdout + done.stderr

    def is_running(self) -> bool:
        return self.engine.inspect(self.name)["State"]["Running"]

    def wait_until_saved(self, attempt: Path) -> None:
        def saved() -> bool:
            assert self.is_running(), self.output()
            return any((attempt / "checkpoints").glob("epoch-*.pt"))

        wait_for("a checkpoint", saved, 120)


@pytest.fixture
def container(trainer_image: TrainerImage, tmp_path: Path) -> Iterator[Container]:
    made = Container(trainer_image, tmp_path)
    yield made
    if made.started:
        made.engine.docker("rm", "--force", made.name)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def end_of(attempt: Path) -> ExitRecord:
    return ExitRecord.model_validate_json((attempt / AttemptLayout.EXIT).read_bytes())


def expect_result(model_dir: Path, attempt: Path, output: str) -> None:
    manifest = ResultManifest.model_validate_json((attempt / AttemptLayout.MANIFEST).read_bytes())
    assert (model_dir / "model.pt").stat().st_size == manifest.files[AttemptLayout.MODEL].bytes
    assert json.loads((model_dir / "metrics.json").read_bytes())["best_epoch"] >= 1
    assert end_of(attempt).exit_code == 0
    assert len(read_lines(attempt / AttemptLayout.PROGRESS_LINES)) == 1
    assert "Read-only file system" not in output


def test_it_trains_as_sagemaker_starts_it(container: Container) -> None:
    job = container.make_job(epochs=1)
    ml = container.mount("/opt/ml", container.base / "ml", writable=True)
    for collected in ("model", "checkpoints", "output"):
        (ml / collected).mkdir()
        (ml / collected).chmod(0o777)
    write(ml / "input/data/config/config.json", job)
    write(
        ml / "input/config/resourceconfig.json",
        json.dumps({"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"}),
    )
    write(ml / "input/config/hyperparameters.json", json.dumps({"mounts": json.dumps({SET: "/opt/ml/input/data/training"})}))
    container.mount("/opt/ml/input/data/training", container.data)
    code, output = container.run("train", variables={"TRAINING_JOB_NAME": "job", "AWS_REGION": "eu-west-1"})
    assert code == 0, output
    expect_result(ml / "model", ml / "checkpoints/attempts/1", output)
    assert not (ml / "output/failure").exists()


def test_it_trains_as_vertex_starts_it(container: Container) -> None:
    job = container.make_job("gs://bucket/data", "gs://bucket/runs/run", epochs=1)
    bucket = container.mount("/gcs/bucket", container.base / "bucket", writable=True)
    write(bucket / "runs/run/attempts/1/config.json", job)
    for folder in (bucket / "runs", *(bucket / "runs").rglob("*")):
        folder.chmod(0o777)
    container.mount("/gcs/bucket/data", container.data)
    variables = {
        "CLOUD_ML_JOB_ID": "7",
        "TRAINYARD_CONFIG": "gs://bucket/runs/run/attempts/1/config.json",
        "AIP_MODEL_DIR": "gs://bucket/job/model/",
        "AIP_CHECKPOINT_DIR": "gs://bucket/job/checkpoints/",
        "CLUSTER_SPEC": json.dumps({"cluster": {"workerpool0": ["cmle-0:2222"]}, "task": {"type": "workerpool0", "index": 0}}),
    }
    code, output = container.run(variables=variables)
    assert code == 0, output
    expect_result(bucket / "job/model", bucket / "runs/run/attempts/1", output)


def test_it_trains_as_azure_ml_starts_it(container: Container) -> None:
    wd = "/mnt/azureml/cr/j/1/cap/data-capability/wd"
    write(container.base / "config/config.json", container.make_job("az://container/data", epochs=1))
    container.mount(f"{wd}/INPUT_config", container.base / "config")
    container.mount(f"{wd}/INPUT_data", container.data)
    model = container.mount(f"{wd}/model", container.base / "model", writable=True)
    checkpoints = container.mount(f"{wd}/checkpoints", container.base / "checkpoints", writable=True)
    code, output = container.run(
        *("--config", f"{wd}/INPUT_config", "--mount", f"az://container/data={wd}/INPUT_data"),
        *("--model-dir", f"{wd}/model", "--checkpoint-dir", f"{wd}/checkpoints"),
        variables={"AZUREML_RUN_ID": "run"},
    )
    assert code == 0, output
    expect_result(model, checkpoints / "attempts/1", output)


def test_it_trains_as_kubernetes_starts_it(container: Container) -> None:
    volume, variables = kubernetes(container, epochs=1)
    model = container.mount("/model", container.base / "model", writable=True)
    code, output = container.run(options=("--user", "54321:0"), variables={**variables, "TRAINYARD_MODEL_DIR": "/model"})
    assert code == 0, output
    expect_result(model, volume / "attempts/1", output)


def test_a_stopped_container_saves_and_the_next_one_goes_on(container: Container) -> None:
    volume, variables = kubernetes(container, epochs=400)
    attempt = volume / "attempts/1"
    container.start(variables=variables)
    container.wait_until_saved(attempt)
    asked = time.monotonic()
    container.engine.docker("stop", container.name)  # SIGTERM, and SIGKILL ten seconds later
    assert time.monotonic() - asked < 10
    code, output = container.wait()
    assert code == ExitCode.PREEMPTED, output
    assert end_of(attempt).reason is FailureReason.PREEMPTED
    done = max(int(path.stem.removeprefix("epoch-")) for path in (attempt / "checkpoints").glob("epoch-*.pt"))
    assert 1 <= done < 400
    container.start(variables=variables)
    wait_for("the training to go on", lambda: f"resuming after epoch {done}" in container.output(), 120)
    container.engine.docker("stop", container.name)
    assert container.wait()[0] == ExitCode.PREEMPTED


def test_a_container_without_enough_memory_says_what_to_lower(container: Container) -> None:
    volume, variables = kubernetes(container, epochs=1, batch_size=16, image_size=640)
    (container.base / "termination-log").touch()
    (container.base / "termination-log").chmod(0o666)
    container.mounts += ["--volume", f"{container.base / 'termination-log'}:/dev/termination-log"]
    code, output = container.run(options=("--memory", "800m"), variables=variables)
    assert code == ExitCode.OUT_OF_MEMORY, output
    end = end_of(volume / "attempts/1")
    assert end.reason is FailureReason.OUT_OF_MEMORY
    assert "smaller batch size" in end.hint
    assert "smaller batch size" in (container.base / "termination-log").read_text()


def kubernetes(container: Container, **config: Any) -> tuple[Path, dict[str, str]]:
    """A pod's volumes and variables; the record is in one of them."""
    write(container.base / "config/config.json", container.make_job(output_uri="s3://bucket/runs/run", **config))
    container.mount("/etc/trainyard", container.base / "config")
    container.mount("/data", container.data)
    volume = container.mount("/output", container.base / "output", writable=True)
    return volume, {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JOB_COMPLETION_INDEX": "0",
        "TRAINYARD_CONFIG": "/etc/trainyard/config.json",
        "TRAINYARD_MOUNTS": json.dumps({SET: "/data", "s3://bucket/runs/run": "/output"}),
    }
