"""The newcomer's path of deployments/kubernetes/README.md: its six lines, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.components import cache_folder, skip_or_fail
from tests.docker_registry import running_registry
from tests.kubernetes_images import push_image
from tests.kubernetes_jobs import host_folders
from tests.stack import REPOSITORY, Stack, wait_for
from tests.stores import CLOUD_PREFIXES, StoreServer

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]
NAMESPACE = "trainyard"
FOLDER = Path("deployments/kubernetes")


def read_commands() -> list[str]:
    """The first block for a shell, a command a line."""
    found = re.search(r"^```sh\n(.*?)^```", (REPOSITORY / FOLDER / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert found
    return found[1].splitlines()


def find_uv() -> str:
    """Its folder; CI brings its own."""
    found = shutil.which("uv") or next((str(path) for path in cache_folder("").glob("uv-*/bin/uv")), None)
    if found is None:
        skip_or_fail("not here: uv (pip install uv)")
    return str(Path(found).parent)


@pytest.fixture
def namespace_of_the_readme(cluster: Cluster) -> Iterator[None]:
    wait_for("the namespace of an earlier run to be gone", lambda: not cluster.exists("namespace", NAMESPACE), 60)
    yield
    cluster.kubectl("delete", "namespace", NAMESPACE, "--wait=false", "--ignore-not-found")


def fill_in(profile: Path, store: StoreServer, image: str) -> None:
    """As a person does for a cluster like the tests': its bucket is on loopback, and its image is this environment."""
    text = profile.read_text()
    text = text.replace("s3://BUCKET", store.make_bucket()).replace("registry: REGISTRY", f"image: {image}")
    folders = {f"host-{number}": path for number, path in enumerate(host_folders()) if Path(path).exists()}
    mounts = [{"name": name, "mountPath": path, "readOnly": True} for name, path in folders.items()]
    volumes = [{"name": name, "hostPath": {"path": path}} for name, path in folders.items()]
    own = {
        "store_endpoint": store.address,
        "host_network": True,
        "instance_classes": {"here": {"cpus": 0.1, "memory_gib": 6, "usd_per_hour": 1.0}},
        "pod_patch": {"containers": [{"name": "trainer", "volumeMounts": mounts}], "volumes": volumes},
    }
    profile.write_text(text + "".join(f"{name}: {json.dumps(value)}\n" for name, value in own.items()))


@pytest.mark.usefixtures("namespace_of_the_readme")
def test_from_a_kubeconfig_to_a_model(cluster: Cluster, stack: Stack, s3: StoreServer, shapes: Path, tmp_path: Path) -> None:
    commands = read_commands()
    assert 1 < len(commands) <= 6
    shutil.copytree(REPOSITORY / FOLDER, tmp_path / FOLDER)
    hidden = (*CLOUD_PREFIXES, "KUBECONFIG")
    environment = {name: value for name, value in stack.environment.items() if not name.startswith(hidden)}
    environment |= {**cluster.environment, **s3.environment, "TRAINYARD_HOME": str(tmp_path / "home")}
    environment |= {"UV_PROJECT": str(REPOSITORY), "UV_NO_SYNC": "1", "PATH": f"{find_uv()}{os.pathsep}{cluster.environment['PATH']}"}
    with running_registry(tmp_path / "registry") as registry:
        entrypoint = [sys.executable, "-P", "-m", "trainer"]
        variables = [f"PATH={sys.prefix}/bin:/usr/bin:/bin", f"PYTHONPATH={REPOSITORY}", "PYTHONDONTWRITEBYTECODE=1"]
        fill_in(tmp_path / FOLDER / "profile.yaml", s3, push_image(registry.host, "team/trainer", entrypoint, variables))
        run_id = ""
        for line in commands:
            command = line.replace("DATASET", str(shapes)).replace("RUN", run_id or "RUN")
            done = subprocess.run(
                ["sh", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            if " train " in command:
                found = re.search(r"trainyard collect (\w+)", done.stdout)
                assert found, done.stdout
                run_id = found[1]
    assert (tmp_path / "model/model/model.pt").stat().st_size > 1_000_000
    assert "map50" in json.loads((tmp_path / "model/metrics.json").read_text())
