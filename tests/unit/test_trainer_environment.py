"""Each platform's contract, from variables and files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.environment import AzureMl, Cluster, Environment, Kubernetes, SageMaker, Told, Vertex, detect, refuse_several_machines
from trainer.errors import ExitCode, TrainerError
from trainer.mounts import Mounts, parse_arguments, parse_mounts


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("environ", "platform"),
    [
        ({"TRAINING_JOB_NAME": "j", "KUBERNETES_SERVICE_HOST": "h"}, SageMaker),
        ({"CLOUD_ML_JOB_ID": "7", "KUBERNETES_SERVICE_HOST": "h"}, Vertex),
        ({"AZUREML_RUN_ID": "r", "KUBERNETES_SERVICE_HOST": "h"}, AzureMl),
        ({"KUBERNETES_SERVICE_HOST": "h"}, Kubernetes),
        ({}, Environment),
        ({"TRAINYARD_PLATFORM": "kubernetes", "AZUREML_RUN_ID": "r"}, Kubernetes),
    ],
)
def test_a_platform_is_known_by_what_it_sets(tmp_path: Path, environ: dict[str, str], platform: type[Environment]) -> None:
    assert type(detect(environ, tmp_path)) is platform


def test_sagemaker_is_known_by_its_files_too(tmp_path: Path) -> None:
    write_json(tmp_path / "opt/ml/input/config/resourceconfig.json", {})
    assert type(detect({}, tmp_path)) is SageMaker


def test_an_unknown_platform_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="did you mean 'sagemaker'"):
        detect({"TRAINYARD_PLATFORM": "sagemakr"}, tmp_path)


def test_sagemaker_is_files_below_opt_ml(tmp_path: Path) -> None:
    settings = tmp_path / "opt/ml/input/config"
    write_json(settings / "hyperparameters.json", {"config": '"s3://b/run/config.json"', "mounts": '{"s3://b/d": "/opt/ml/input/data/d"}'})
    hosts = [f"algo-{number}" for number in range(1, 12)]
    write_json(settings / "resourceconfig.json", {"current_host": "algo-10", "hosts": hosts[::-1]})
    found = SageMaker({}, tmp_path)
    assert found.config == "s3://b/run/config.json"
    assert found.mounts.localize("s3://b/d/x") == "file:///opt/ml/input/data/d/x"
    assert found.model_dir == str(tmp_path / "opt/ml/model")
    assert found.checkpoint_dir == "", "not set for this job"
    (tmp_path / "opt/ml/checkpoints").mkdir()
    assert found.checkpoint_dir == str(tmp_path / "opt/ml/checkpoints")
    assert found.failure_file == tmp_path / "opt/ml/output/failure"
    assert found.cluster == Cluster(9, 11, "algo-1", 7777)


def test_vertex_is_uris_and_mounted_buckets(tmp_path: Path) -> None:
    spec = {"cluster": {"workerpool0": ["a:2222"], "workerpool1": ["b:2222", "c:2222"]}, "task": {"type": "workerpool1", "index": 1}}
    environ = {"AIP_MODEL_DIR": "gs://b/o/model/", "AIP_CHECKPOINT_DIR": "gs://b/o/checkpoints/", "CLUSTER_SPEC": json.dumps(spec)}
    found = Vertex(environ, tmp_path)
    assert found.mounts.find("gs://b/o") is None, "nothing is mounted"
    (tmp_path / "gcs").mkdir()
    assert found.mounts.find("gs://b/o/a%20b") == tmp_path / "gcs/b/o/a b"
    assert (found.model_dir, found.checkpoint_dir) == ("gs://b/o/model", "gs://b/o/checkpoints")
    assert found.cluster == Cluster(2, 3, "a", 2222)
    with pytest.raises(TrainerError, match="CLUSTER_SPEC"):
        _ = Vertex({"CLUSTER_SPEC": "[]"}, tmp_path).cluster


def test_azure_ml_is_arguments_before_variables(tmp_path: Path) -> None:
    environ = {"AZUREML_RUN_ID": "r", "AZURE_ML_OUTPUT_model": "/a/model", "AZURE_ML_OUTPUT_checkpoints": "/a/checkpoints"}
    assert (AzureMl(environ, tmp_path).model_dir, AzureMl(environ, tmp_path).checkpoint_dir) == ("/a/model", "/a/checkpoints")
    assert AzureMl(environ, tmp_path, Told(model_dir="/b")).model_dir == "/b"
    environ = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "6105"}
    assert AzureMl(environ, tmp_path).cluster == Cluster(1, 2, "10.0.0.4", 6105)


def test_kubernetes_numbers_the_pods_of_an_indexed_job(tmp_path: Path) -> None:
    assert Kubernetes({"JOB_COMPLETION_INDEX": "0"}, tmp_path).cluster == Cluster()
    assert Kubernetes({"JOB_COMPLETION_INDEX": "2"}, tmp_path).cluster.world_size == 3
    found = Kubernetes({"JOB_COMPLETION_INDEX": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "job-0.svc"}, tmp_path).cluster
    assert found == Cluster(1, 4, "job-0.svc")
    assert Kubernetes({}, tmp_path).failure_file is None
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/termination-log").touch()
    assert Kubernetes({}, tmp_path).failure_file == tmp_path / "dev/termination-log"


def test_the_launcher_is_believed_before_the_platform(tmp_path: Path) -> None:
    environ = {"AIP_MODEL_DIR": "gs://b/model/", "TRAINYARD_MODEL_DIR": "/env", "TRAINYARD_CONFIG": str(tmp_path)}
    assert Vertex(environ, tmp_path).model_dir == "/env"
    assert Vertex(environ, tmp_path, Told(model_dir="/told")).model_dir == "/told"
    assert Vertex(environ, tmp_path).config == f"{tmp_path}/config.json", "a folder is mounted, and the job is in it"


def test_without_a_job_the_ways_to_name_one_are_told(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match=r"nobody has said where the job is \(local\). Next: set TRAINYARD_CONFIG or --config"):
        _ = Environment({}, tmp_path).config


def test_one_machine_of_several_is_refused(tmp_path: Path) -> None:
    refuse_several_machines(Kubernetes({"JOB_COMPLETION_INDEX": "0"}, tmp_path))
    with pytest.raises(TrainerError, match="machine 2 of 2") as caught:
        refuse_several_machines(Kubernetes({"JOB_COMPLETION_INDEX": "1"}, tmp_path))
    assert caught.value.code is ExitCode.CONFIG


def test_the_longest_mount_that_has_it_counts() -> None:
    mounts = Mounts((("s3://b", Path("/all")), ("s3://b/d", Path("/d"))))
    assert mounts.localize("s3://b/d/x") == "file:///d/x"
    assert mounts.localize("s3://b/dd") == "file:///all/dd", "not a prefix of names"
    assert mounts.localize("s3://bb/x") == "s3://bb/x"
    assert mounts.localize("s3://b/d/../../etc") == "s3://b/d/../../etc"


@pytest.mark.parametrize("text", ["nonsense", "[1]", '{"s3://b": "relative"}', '{"plain": "/x"}', '{"s3://b": 1}', "3"])
def test_what_names_no_mounts_is_refused(text: str) -> None:
    with pytest.raises(TrainerError, match="TRAINYARD_MOUNTS names no mounts"):
        parse_mounts(text, "TRAINYARD_MOUNTS")


def test_a_mount_is_a_uri_and_a_path() -> None:
    assert parse_arguments(["s3://b/day=1=/x"]) == (("s3://b/day=1", Path("/x")),)
    with pytest.raises(TrainerError, match="--mount names no mounts"):
        parse_arguments(["s3://b"])
