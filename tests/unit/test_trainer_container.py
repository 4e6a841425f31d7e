"""A real small training in container mode, under the layout of each platform, as a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.fit_rig import make_attempt, wait_until
from trainer.__main__ import main
from trainer.certificates import choose_certificates
from trainer.container import choose_variables, localize, read_config
from trainer.contract import AttemptLayout, ExitCode, ExitRecord, ResultManifest, TrainerError, TrainJob
from trainer.mounts import Mounts
from trainer.progress import read_lines
from trainer.storage import ObjectFolder, to_path, to_uri

ROOT = Path(__file__).parents[2]
PLATFORM_VARIABLES = ("TRAINYARD_", "AIP_", "CLOUD_ML_", "AZUREML_", "AZURE_ML_", "KUBERNETES_", "CLUSTER_SPEC", "TRAINING_JOB")
needs_framework = pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra `train`: uv sync --extra train")


class Machine:
    """A container's file system below a folder: the platform's own folders, a mounted dataset, and a scratch folder."""

    def __init__(self, base: Path, **config: Any) -> None:
        self.root = base / "root"
        self.scratch = base / "scratch"
        self.scratch.mkdir(parents=True)
        layout = make_attempt(base / "made", **config)
        self.job = TrainJob.model_validate_json((layout / AttemptLayout.CONFIG).read_bytes())
        self.data = base / "made"

    def write_job(self, path: Path, *, uri: str = "", **changes: Any) -> None:
        """`uri` is what the dataset has in the cloud; it and its index are then reached through a mount alone."""
        place = {"root": f"{uri}/data", "index_uri": f"{uri}/index.json"} if uri else {}
        job = self.job.model_copy(update={"dataset": self.job.dataset.model_copy(update=place), **changes})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(job.model_dump_json())

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(PLATFORM_VARIABLES) and name != "HOME"}
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "trainer", *arguments, "--root", str(self.root)],
            env={**kept, "TMPDIR": str(self.scratch), "PYTHONPATH": str(ROOT), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str]:
        process = self.start(*arguments, **variables)
        output, _ = process.communicate(timeout=300)
        assert not list(self.scratch.iterdir()), "the scratch folder is left empty"
        return process.returncode, output.decode()


def expect_result(model_dir: Path, attempt: Path, output: str) -> None:
    manifest = ResultManifest.model_validate_json((attempt / AttemptLayout.MANIFEST).read_bytes())
    assert (model_dir / "model.pt").stat().st_size == manifest.files[AttemptLayout.MODEL].bytes
    assert json.loads((model_dir / "metrics.json").read_bytes())["best_epoch"] >= 1
    assert ExitRecord.model_validate_json((attempt / AttemptLayout.EXIT).read_bytes()).exit_code == 0
    assert len(read_lines(attempt / AttemptLayout.PROGRESS_LINES)) == 1
    assert "supervisor: on " in output
    assert "done: " in output, "the platform shows the log"


@needs_framework
def test_sagemaker_gets_its_result_from_opt_ml(tmp_path: Path) -> None:
    machine = Machine(tmp_path, epochs=1)
    ml = machine.root / "opt/ml"
    (ml / "checkpoints").mkdir(parents=True)
    machine.write_job(ml / "input/data/config/config.json", uri="s3://bucket/data")
    settings = ml / "input/config"
    settings.mkdir(parents=True)
    (settings / "resourceconfig.json").write_text(json.dumps({"current_host": "algo-1", "hosts": ["algo-1"]}))
    (settings / "hyperparameters.json").write_text(json.dumps({"mounts": json.dumps({"s3://bucket/data": str(machine.data)})}))
    before = {path: path.stat().st_mtime_ns for path in machine.data.rglob("*")}
    code, output = machine.run("train", TRAINING_JOB_NAME="job")
    assert code == 0, output
    expect_result(ml / "model", ml / "checkpoints/attempts/1", output)
    assert not (ml / "output/failure").exists()
    assert {path: path.stat().st_mtime_ns for path in machine.data.rglob("*")} == before, "a read-only mount must do"


@needs_framework
def test_vertex_gets_its_result_from_the_mounted_bucket(tmp_path: Path) -> None:
    machine = Machine(tmp_path, epochs=1)
    bucket = machine.root / "gcs/bucket"
    bucket.mkdir(parents=True)
    machine.data.rename(bucket / "shapes")
    machine.write_job(bucket / "runs/run/attempts/1/config.json", uri="gs://bucket/shapes", output_uri="gs://bucket/runs/run")
    code, output = machine.run(
        CLOUD_ML_JOB_ID="7",
        TRAINYARD_CONFIG="gs://bucket/runs/run/attempts/1/config.json",
        AIP_MODEL_DIR="gs://bucket/job/model/",
        AIP_CHECKPOINT_DIR="gs://bucket/job/checkpoints/",
        CLUSTER_SPEC=json.dumps({"cluster": {"workerpool0": ["cmle-0:2222"]}, "task": {"type": "workerpool0", "index": 0}}),
    )
    assert code == 0, output
    expect_result(bucket / "job/model", bucket / "runs/run/attempts/1", output)


@needs_framework
def test_azure_ml_gets_its_result_from_the_output_that_it_names(tmp_path: Path) -> None:
    machine = Machine(tmp_path, epochs=1)
    mounted = machine.root / "mnt/azureml"
    machine.write_job(mounted / "config/config.json", uri="az://container/data")
    code, output = machine.run(
        *("--config", str(mounted / "config"), "--mount", f"az://container/data={machine.data}"),
        *("--model-dir", str(mounted / "model"), "--checkpoint-dir", str(mounted / "checkpoints")),
        AZUREML_RUN_ID="run",
    )
    assert code == 0, output
    expect_result(mounted / "model", mounted / "checkpoints/attempts/1", output)


@needs_framework
def test_on_kubernetes_a_stopped_training_goes_on_in_the_next_container(tmp_path: Path) -> None:
    machine = Machine(tmp_path, epochs=400)
    volume = machine.root / "output"
    config = machine.root / "config/config.json"
    machine.write_job(config, uri="s3://bucket/data", output_uri="s3://bucket/runs/run")
    variables = {
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "JOB_COMPLETION_INDEX": "0",
        "TRAINYARD_CONFIG": str(config),
        "TRAINYARD_MODEL_DIR": str(machine.root / "model"),
        "TRAINYARD_MOUNTS": json.dumps({"s3://bucket/data": str(machine.data), "s3://bucket/runs/run": str(volume)}),
    }
    process = machine.start(**variables)
    attempt = volume / "attempts/1"
    wait_until(lambda: any((attempt / "checkpoints").glob("epoch-*.pt")), process, seconds=120)
    process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == ExitCode.PREEMPTED, output
    assert time.monotonic() - asked < 10, "docker stop kills after ten seconds"
    assert ExitRecord.model_validate_json((attempt / AttemptLayout.EXIT).read_bytes()).exit_code == ExitCode.PREEMPTED
    lines = read_lines(attempt / AttemptLayout.PROGRESS_LINES)
    done = max(int(path.stem.removeprefix("epoch-")) for path in (attempt / "checkpoints").glob("epoch-*.pt"))
    assert 1 <= done < 400

    process = machine.start(**variables)
    wait_until(lambda: f"resuming after epoch {done}" in read_text(attempt / AttemptLayout.LOG), process, seconds=120)
    assert not (attempt / AttemptLayout.EXIT).exists(), "its first end is no end any more"
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == ExitCode.PREEMPTED, output
    assert read_lines(attempt / AttemptLayout.PROGRESS_LINES)[:done] == lines[:done], "what the first container did is still there"


def read_text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def test_what_cannot_start_says_why_where_the_platform_looks(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    settings = machine.root / "opt/ml/input/config"
    settings.mkdir(parents=True)
    (settings / "resourceconfig.json").write_text(json.dumps({"current_host": "algo-2", "hosts": ["algo-1", "algo-2"]}))
    code, output = machine.run("train", TRAINING_JOB_NAME="job", TRAINYARD_CONFIG="/nowhere/config.json")
    assert code == ExitCode.CONFIG
    assert output.startswith("this is machine 2 of 2 (sagemaker), and a training runs on one. Next: ")
    assert (machine.root / "opt/ml/output/failure").read_text() == output.strip()


def test_a_job_without_a_place_for_its_result_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write_job(tmp_path / "config.json")
    code, output = machine.run("--config", str(tmp_path / "config.json"))
    assert code == ExitCode.CONFIG
    assert "no place for its checkpoints" in output
    assert "Traceback" not in output


def test_an_attempt_that_a_newer_one_replaced_does_not_begin(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write_job(tmp_path / "config.json")
    (tmp_path / "record/attempts/2").mkdir(parents=True)
    (tmp_path / "record/attempts/2/plan.json").write_text("{}")
    code, output = machine.run("--config", str(tmp_path / "config.json"), "--checkpoint-dir", str(tmp_path / "record"))
    assert code == ExitCode.OCCUPIED
    assert "a newer attempt exists (2)" in output


def test_what_is_mounted_is_read_from_its_folder(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    dataset = machine.job.dataset.model_copy(
        update={"root": "s3://b/set", "index_uri": "s3://b/set/i.json", "store_uri": "s3://b/store", "store_endpoint": "http://h"}
    )
    job = machine.job.model_copy(update={"dataset": dataset, "output_uri": "s3://out/run/"})
    found = localize(job, Mounts((("s3://b/set", Path("/m")), ("s3://b/store", Path("/s")))))
    assert (found.dataset.root, found.dataset.index_uri) == ("/m", "file:///m/i.json")
    assert (found.dataset.store_uri, found.dataset.store_endpoint) == ("file:///s", None)
    assert found.output_uri == "s3://out/run", "not mounted"


def test_a_user_without_a_home_gets_one_in_scratch(tmp_path: Path) -> None:
    cache = tmp_path / "mine"
    cache.mkdir()
    chosen = choose_variables({"HOME": "/nonexistent", "XDG_CACHE_HOME": str(cache)}, tmp_path / "scratch", Mounts())
    assert chosen["HOME"] == str(tmp_path / "scratch/home")
    assert Path(chosen["HOME"]).is_dir()
    assert "XDG_CACHE_HOME" not in chosen


def test_a_config_at_the_root_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file is mounted by itself."""
    asked: list[str] = []

    def get(folder: ObjectFolder, name: str) -> bytes:
        asked.append(f"{to_path(folder.uri)} {name}")
        return b"{"

    monkeypatch.setattr(ObjectFolder, "get", get)
    with pytest.raises(TrainerError, match="not a job"):
        read_config("/b.json")
    assert asked == ["/ b.json"]


def test_a_folder_that_is_missing_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--attempt-dir", str(tmp_path / "none")]) == ExitCode.NOT_FOUND
    assert "there is no config.json" in capsys.readouterr().out


def test_a_slash_too_few_is_no_folder() -> None:
    with pytest.raises(TrainerError, match="one slash") as caught:
        to_uri("s3:/bucket/x")
    assert "s3://bucket/x" in f"{caught.value}"
    assert to_uri("file:///") == to_uri("/") == "file:///"


@pytest.mark.parametrize("uri", ["s3://bucket//x#set", "az://bucket/x///y"])
def test_a_slash_too_many_is_no_folder_either(uri: str) -> None:
    with pytest.raises(TrainerError, match="two slashes in a row") as caught:
        to_uri(uri)
    assert caught.value.code is ExitCode.CONFIG
    assert f"write {re.sub('(?<!:)/+', '/', uri)};" in caught.value.hint
    assert to_uri("s3://bucket//") == "s3://bucket"


def test_where_the_system_trusts_nobody_the_trainer_brings_certificates(tmp_path: Path) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "one.pem").touch()
    chosen = choose_certificates({}, [str(empty), str(tmp_path / "none.pem")])
    assert Path(chosen["SSL_CERT_FILE"]).stat().st_size > 10_000
    assert choose_certificates({}, [str(empty), str(full)]) == {}
    assert choose_certificates({}, [str(full / "one.pem")]) == {}
    assert choose_certificates({"SSL_CERT_FILE": "/mine.pem"}, [str(empty)]) == {}
