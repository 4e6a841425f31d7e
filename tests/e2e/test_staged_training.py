"""Trainings whose data go through a store: a folder's, a staged dataset, images in a bucket with labels of their own."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.test_command_line import TINY, told
from tests.faults import running_proxy
from tests.stack import REPOSITORY, Stack
from tests.stores import StoreServer, no_cloud, s3
from trainer.contract import ExitCode
from trainer.shapes import write_shapes

__all__ = ["no_cloud", "s3"]

pytestmark = pytest.mark.e2e

SIGNER = re.compile(r"Credential=(\w+)/")


def trained(stack: Stack, *arguments: str, **environment: str) -> tuple[Path, dict[str, Any], str]:
    """A training of one epoch: the run's folder, the result's manifest, and the attempt's log."""
    done = replace(stack, environment={**stack.environment, **environment}).command(
        "trainyard", "train", *arguments, *TINY, "--epochs", "1", "--new", "--json"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = stack.home / "runs" / json.loads(done.stdout)["run_id"]
    manifest = json.loads((run / "attempts/1/manifest.json").read_text())
    return run, manifest, (run / "attempts/1/logs/trainer.log").read_text()


def test_a_folder_is_staged_once_and_fetched_once(stack: Stack, shapes: Path, tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    run, manifest, log = trained(stack, str(shapes), "--stage", "--store", store)
    index, source = (json.loads((run / name).read_text()) for name in ("dataset.json", "source.json"))
    assert manifest["dataset_version"] == index["version"] == source["version"]
    assert source["store_uri"] == store
    assert f"dataset version {index['version'][:12]}" in log
    assert f"version `{source['version']}` in the store `{tmp_path}/store`, from `{shapes}`" in (run / "report.md").read_text()
    stored = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file() and "pins" not in path.parts}
    _, again, log = trained(stack, str(shapes), "--stage", "--store", store)
    assert again["dataset_version"] == manifest["dataset_version"]
    assert " 0 files, 0.0 MB fetched" in log, "the machine's cache has it"
    now = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*") if path.is_file() and "pins" not in path.parts}
    assert now == stored


def test_without_stage_nothing_is_copied(stack: Stack, shapes: Path) -> None:
    store = stack.home / "store"
    assert not store.exists()
    run, _, log = trained(stack, str(shapes))
    assert not (run / "source.json").exists()
    assert not store.exists()
    assert "fetched" not in log


def test_a_staged_dataset_is_trained_on_by_its_name(stack: Stack, shapes: Path, tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    staged = stack.command("trainyard", "dataset", "stage", str(shapes), "--store", store, "--name", "all shapes", "--json")
    assert staged.returncode == 0, staged.stderr
    run, manifest, _ = trained(stack, f"{store}#all%20shapes")
    assert manifest["dataset_version"] == json.loads(staged.stdout)["version"]
    index = json.loads((run / "dataset.json").read_text())
    assert (index["name"], index["version"]) == ("all shapes", manifest["dataset_version"])
    assert "all shapes" in (run / "report.md").read_text()
    missing = stack.command("trainyard", "train", f"{store}#none", *TINY)
    assert missing.returncode == ExitCode.NOT_FOUND
    assert "no dataset or version" in told(missing)


def test_images_stay_in_their_bucket_and_labels_come_from_a_folder(stack: Stack, shapes: Path, tmp_path: Path, s3: StoreServer) -> None:
    import boto3

    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    client = boto3.client("s3", endpoint_url=s3.address, region_name="us-east-1", **keys)
    bucket = urlsplit(s3.make_bucket()).netloc
    for image in sorted((shapes / "images").rglob("*.jpg")):
        client.upload_file(str(image), bucket, f"shapes/{image.relative_to(shapes).as_posix()}")
    labels = tmp_path / "labels of today"
    shutil.copytree(shapes / "labels", labels / "labels")
    shutil.copy(shapes / "data.yaml", labels / "data.yaml")
    run, manifest, _ = trained(
        stack, f"s3://{bucket}/shapes", "--labels", str(labels), "--store", f"s3://{bucket}/trainyard", **s3.settings()
    )
    index = json.loads((run / "dataset.json").read_text())
    assert len(index["images"]) == 16
    assert manifest["dataset_version"] == json.loads((run / "source.json").read_text())["version"]
    sizes = {item["Key"]: item["Size"] for item in client.list_objects_v2(Bucket=bucket, Prefix="trainyard/")["Contents"]}
    images = sum(path.stat().st_size for path in (shapes / "images").rglob("*.jpg"))
    assert not [key for key in sizes if key.startswith("trainyard/files/")]
    assert sum(sizes.values()) < images, "no image was copied"

    client.upload_file(str(run / "attempts/1/model/model.pt"), bucket, "models/first.pt")
    _, tuned, _ = trained(stack, str(shapes), "--weights", f"s3://{bucket}/models/first.pt", **s3.settings())
    assert tuned["model"] == "first.pt"
    reached = replace(stack, environment={**stack.environment, **s3.settings()})
    gone = reached.command("trainyard", "train", str(shapes), "--weights", f"s3://{bucket}/models/none.pt", *TINY)
    assert gone.returncode == ExitCode.CONFIG


def read_all(folder: Path) -> Iterator[bytes]:
    """Of every file; other tests' processes may take one away meanwhile."""
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            if path.is_file():
                yield path.read_bytes()


SAVE_PROFILE = """
import sys
from prefect_aws import AwsCredentials
from blocks.profiles import LocalProfile
store, endpoint = sys.argv[1:]
for kind in (AwsCredentials, LocalProfile):
    kind.register_type_and_schema()
credentials = AwsCredentials(aws_access_key_id="AKIDOFTHEBLOCK", aws_secret_access_key="made-up-7f3a", region_name="us-east-1")
credentials.save("stores", overwrite=True)
profile = LocalProfile(slots=1, store=store, store_endpoint=endpoint, store_credentials="aws-credentials/stores")
profile.save("with-store", overwrite=True)
"""


def test_a_profile_names_store_address_and_credentials(stack: Stack, tmp_path: Path, s3: StoreServer) -> None:
    """The saved credentials stage; the training uses the machine's own, here those of the environment. The secret is nowhere."""
    store = f"{s3.make_bucket()}/trainyard"
    shapes = write_shapes(tmp_path / "others", train=8, val=4, test=4, size=64, seed=7)  # which this machine's cache does not have
    with running_proxy(s3.address) as proxy:
        command = [sys.executable, "-c", SAVE_PROFILE, store, proxy.address]
        subprocess.run(command, env=stack.environment, cwd=REPOSITORY, check=True, timeout=120)
        own = {"AWS_ACCESS_KEY_ID": "AKIDOFTHEMACHINE", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
        run, _, _ = trained(stack, str(shapes), "--stage", "--profile", "with-store", **own)
    signers = {
        kind: {match[1] for request in proxy.requests if kind in request.path and (match := SIGNER.search(request.authorization))}
        for kind in ("refs/", "packs/")
    }
    assert signers == {"refs/": {"AKIDOFTHEBLOCK"}, "packs/": {"AKIDOFTHEBLOCK", "AKIDOFTHEMACHINE"}}
    assert json.loads((run / "source.json").read_text())["store_endpoint"] == proxy.address
    told = list(read_all(stack.home))
    assert len(told) > 20
    assert not [text for text in told if b"made-up-7f3a" in text]


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (["{shapes}", "--labels", "{shapes}"], ExitCode.CONFIG, "labels are for images in a bucket"),
        (["s3://bucket/images", "--labels", "{shapes}/none"], ExitCode.NOT_FOUND, "there is nothing at"),
        (["{shapes}", "--stage", "--store", "ftp://host/x"], ExitCode.CONFIG, "is no object store"),
        (["{shapes}", "--stage", "--store", "{a_file}/store"], ExitCode.OCCUPIED, "cannot write"),
        (["{store}#shapes"], ExitCode.NOT_FOUND, "there is no store at"),
    ],
)
def test_what_cannot_be_staged_is_told_in_one_screen(
    stack: Stack, shapes: Path, tmp_path: Path, arguments: list[str], code: ExitCode, cause: str
) -> None:
    (tmp_path / "a file").touch()
    places = {"shapes": shapes, "a_file": tmp_path / "a file", "store": (tmp_path / "empty").as_uri()}
    done = stack.command("trainyard", "train", *(argument.format(**places) for argument in arguments), *TINY)
    assert done.returncode == code, done.stdout + done.stderr
    assert cause in told(done)
