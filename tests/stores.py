"""Stores of three kinds for tests: a folder, S3 (moto's server) and Azure (Azurite), on loopback, stopped by process id at the end."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from tests.components import npm_folder, npm_install, skip_or_fail
from tests.stack import stop, wait_for
from trainer.store_access import AWS_FILES

AZURITE_PACKAGE = Path("tests/emulators/azurite/package.json")
AZURITE_FOLDER = npm_folder("azurite")
AZURITE_MAIN = AZURITE_FOLDER / "node_modules/azurite/dist/src/blob/main.js"
# What a machine of one cloud or the other has; none of it reaches a test.
CLOUD_PREFIXES = ("AWS_", "AZURE_", "AZURITE_", "GOOGLE_")


@dataclass(frozen=True)
class StoreServer:
    """A store under test. ``environment`` is what a user would set, apart from the endpoint."""

    kind: str
    address: str
    environment: dict[str, str]
    make_bucket: Callable[[], str]

    def settings(self, address: str | None = None) -> dict[str, str]:
        """The environment to reach it by, directly or through a proxy at `address`."""
        address = address or self.address
        if self.kind == "s3":
            return {**self.environment, "AWS_ENDPOINT_URL": address}
        return {**self.environment, "AZURE_STORAGE_ENDPOINT": f"{address}/{self.environment['AZURE_STORAGE_ACCOUNT_NAME']}"}


@dataclass
class RunsBucket:
    """A bucket as its owner sees it, whoever's keys the product has. Runs are below ``runs/``."""

    bucket: str
    client: Any

    def objects(self, prefix: str = "") -> dict[str, int]:
        """Sizes by key."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=urlsplit(self.bucket).netloc, Prefix=prefix)
        return {item["Key"]: item["Size"] for page in pages for item in page.get("Contents", [])}

    def read(self, key: str) -> bytes:
        return self.client.get_object(Bucket=urlsplit(self.bucket).netloc, Key=key)["Body"].read()

    def json(self, key: str) -> Any:
        return json.loads(self.read(key))

    def run_ids(self) -> set[str]:
        return {key.split("/")[1] for key in self.objects("runs/") if key.endswith("/run.json")}


def s3_client(address: str) -> Any:
    import boto3

    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
    return boto3.client("s3", endpoint_url=address, region_name="us-east-1", **keys)


@contextmanager
def server_process(command: list[str], folder: Path, pattern: str, environment: dict[str, str]) -> Iterator[str]:
    """A server that chooses a free port; the address that it writes in its log."""
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **environment}, stdout=out, stderr=out)

    def address() -> re.Match[str] | None:
        assert process.poll() is None, log.read_text()
        return re.search(pattern, log.read_text())

    try:
        yield wait_for("the store's server", address, 60)[1]
    finally:
        stop(process)


@contextmanager
def running_moto(folder: Path) -> Iterator[StoreServer]:
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with server_process(command, folder, r"Running on (http://127\.0\.0\.1:\d+)", {}) as address:
        client = s3_client(address)

        def make_bucket() -> str:
            name = f"data-{uuid4().hex[:12]}"
            client.create_bucket(Bucket=name)
            return f"s3://{name}"

        environment = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}
        yield StoreServer("s3", address, environment, make_bucket)


@contextmanager
def running_azurite(folder: Path) -> Iterator[StoreServer]:
    """In memory, with an account and key of its own. Skips, or fails in CI, where Node.js or Azurite is missing."""
    node = shutil.which("node")
    if node is None:
        skip_or_fail("not here: Node.js (apt-get install nodejs npm)")
    if not AZURITE_MAIN.is_file():
        skip_or_fail(f"not here: Azurite ({npm_install(AZURITE_PACKAGE, AZURITE_FOLDER)})")
    account, key = "trainyard", base64.b64encode(secrets.token_bytes(64)).decode()
    options = [
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        "0",
        "--inMemoryPersistence",
        "--silent",
        "--disableTelemetry",
        "--skipApiVersionCheck",
    ]
    command = [node, str(AZURITE_MAIN), *options]
    with server_process(command, folder, r"listens on (http://127\.0\.0\.1:\d+)", {"AZURITE_ACCOUNTS": f"{account}:{key}"}) as address:
        from azure.storage.blob import BlobServiceClient

        client = BlobServiceClient(f"{address}/{account}", credential={"account_name": account, "account_key": key})

        def make_bucket() -> str:
            name = f"data-{uuid4().hex[:12]}"
            client.create_container(name)
            return f"az://{name}"

        yield StoreServer("az", address, {"AZURE_STORAGE_ACCOUNT_NAME": account, "AZURE_STORAGE_ACCOUNT_KEY": key}, make_bucket)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with running_moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def az(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoreServer]:
    with running_azurite(tmp_path_factory.mktemp("azurite")) as server:
        yield server


@pytest.fixture
def no_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's clouds is seen."""
    for name in [name for name in os.environ if name.startswith(CLOUD_PREFIXES)]:
        monkeypatch.delenv(name)
    for name in AWS_FILES:
        monkeypatch.setenv(name, os.devnull + "/none")


@pytest.fixture(params=["file", "s3", "az"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cloud: None) -> str:
    """An empty store of each kind; the environment is set to reach it."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    if request.param == "file":
        return (tmp_path / "store with space").as_uri()
    return new_store(request.getfixturevalue(request.param), monkeypatch)


@pytest.fixture(params=["s3", "az"])
def server(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cloud: None) -> StoreServer:
    """A store that is reached over the network, of each kind."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    return request.getfixturevalue(request.param)


def new_store(server: StoreServer, monkeypatch: pytest.MonkeyPatch, address: str | None = None) -> str:
    """The URI of an empty store, below a new bucket; the environment is set to reach it."""
    for name, value in server.settings(address).items():
        monkeypatch.setenv(name, value)
    return f"{server.make_bucket()}/some/prefix"
