"""A person's way through `deployments/kubernetes`: its commands as they stand there, in a clone filled in for the tests' cluster."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.cluster import Cluster
from tests.components import cache_folder, skip_or_fail
from tests.docker_engine import Engine
from tests.stack import REPOSITORY, Stack, wait_for
from tests.stores import CLOUD_PREFIXES, StoreServer
from tests.trainer_image import NAME, TrainerImage, certificates, copy_sources

NAMESPACE = "trainyard"
FOLDER = Path("deployments/kubernetes")


def shell_blocks(file: str) -> list[list[str]]:
    """Each block for a shell of a file of the folder, a command a line."""
    found = re.findall(r"^```sh\n(.*?)^```", (REPOSITORY / FOLDER / file).read_text(), re.DOTALL | re.MULTILINE)
    assert found
    return [block.splitlines() for block in found]


def find_uv() -> str:
    """Its folder; CI brings its own."""
    found = shutil.which("uv") or next((str(path) for path in cache_folder("").glob("uv-*/bin/uv")), None)
    if found is None:
        skip_or_fail("not here: uv (pip install uv)")
    return str(Path(found).parent)


@dataclass(frozen=True)
class Clone:
    """A clone of Trainyard in `folder`, and the shell of a person who works in it."""

    folder: Path
    environment: dict[str, str]

    @property
    def manifests(self) -> Path:
        return self.folder / FOLDER

    def shell(self, script: str, *, timeout: float = 600) -> str:
        """What it printed. Fails the test where a line of it fails."""
        done = subprocess.run(
            ["sh", "-ec", script], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert done.returncode == 0, f"{script}\n{done.stdout}{done.stderr}"
        return done.stdout


def make_clone(folder: Path, stack: Stack, cluster: Cluster, s3: StoreServer, engine: Engine) -> Clone:
    """Of a cloud nothing is in the shell's environment but the bucket's keys."""
    folder.mkdir()
    copy_sources(folder)
    shutil.copytree(REPOSITORY / FOLDER, folder / FOLDER)
    for name in ("pyproject.toml", "README.md", "LICENSE", "prefect.yaml"):
        shutil.copy(REPOSITORY / name, folder)
    hidden = (*CLOUD_PREFIXES, "KUBECONFIG")
    environment = {name: value for name, value in stack.environment.items() if not name.startswith(hidden)}
    environment |= {**engine.environment, **cluster.environment, **s3.environment}
    path = [find_uv(), str(make_docker(folder / ".bin", engine)), cluster.environment["PATH"], engine.environment["PATH"]]
    environment |= {"UV_PROJECT": str(REPOSITORY), "UV_NO_SYNC": "1", "PATH": os.pathsep.join(path)}
    return Clone(folder, environment)


def make_docker(folder: Path, engine: Engine) -> Path:
    """A folder with a `docker` that builds on the local base image, through this machine's network and its certificates."""
    folder.mkdir()
    real = shutil.which("docker", path=engine.environment["PATH"])
    options = ["--network", "host", "--secret", f"id=ca,src={certificates(folder)}", "--build-arg", f"BASE_IMAGE={engine.base}"]
    build = shlex.join([str(real), "build", *options, "--platform", "linux/amd64"])
    program = folder / "docker"
    program.write_text(f'#!/bin/sh\nif [ "$1" = build ]; then shift; exec {build} "$@"; fi\nexec {real} "$@"\n')
    program.chmod(0o755)
    return folder


def fill_in_profile(clone: Clone, s3: StoreServer, image: TrainerImage) -> str:
    """As a person does for a cluster whose store is on loopback, and whose base image comes from a mirror. Returns the store."""
    profile, store = clone.manifests / "profile.yaml", s3.make_bucket()
    text = profile.read_text().replace("s3://BUCKET", store).replace("registry: REGISTRY", f"registry: {image.engine.registry.host}")
    own = {
        "repository": NAME,
        "image_base": image.engine.base,
        "store_endpoint": s3.address,
        "host_network": True,
        "grace_seconds": 20,
        "instance_classes": {"small": {"cpus": 0.1, "memory_gib": 4, "usd_per_hour": 1.0}},
    }
    profile.write_text(text + "".join(f"{name}: {json.dumps(value)}\n" for name, value in own.items()))
    return f"{store}/trainyard"


@contextmanager
def named_namespace(cluster: Cluster) -> Iterator[str]:
    """The one that the files name: made by their commands, and taken away here."""
    wait_for("the namespace of an earlier run to be gone", lambda: not cluster.exists("namespace", NAMESPACE), 120)
    try:
        yield NAMESPACE
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false", "--ignore-not-found")
