"""The flow runner's image executes a flow run as a work pool's container does, without torch, a name or a writable disk."""

from __future__ import annotations

import pytest

from tests.docker_engine import Engine
from tests.flow_runner_image import build_flow_runner
from tests.image_layers import scan_layer, unpacked_layers
from tests.stack import Stack
from tests.trainer_image import SECRET, STRICT

PROBE = """
from importlib.metadata import version
from importlib.util import find_spec
import flows.train, prefect_aws, prefect_kubernetes
print(version("trainyard"), find_spec("torch"), find_spec("prefect_gcp"))
"""


@pytest.fixture(scope="module")
def image(docker_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_flow_runner(docker_engine, tmp_path_factory.mktemp("certificates"), "aws", "kubernetes")


def test_it_holds_the_chosen_clouds_and_no_framework(docker_engine: Engine, image: str) -> None:
    done = docker_engine.docker("run", "--rm", *STRICT, image, "python", "-c", PROBE)
    assert done.stdout.split()[1:] == ["None", "None"]
    assert docker_engine.inspect(image)["Config"]["User"] == "1000:1000"
    _, *ours = unpacked_layers(docker_engine, image)
    assert [finding for layer in ours for finding in scan_layer(layer, [SECRET.encode()])] == []


def test_it_executes_a_flow_run(docker_engine: Engine, image: str, stack: Stack) -> None:
    """As a work pool does: the run's id as a variable, and the image's own command."""
    deployment = stack.api("/deployments/name/reconcile/local")
    # Pending, as a worker makes it before it starts a container: the worker of the session leaves it alone.
    made = stack.api(f"/deployments/{deployment['id']}/create_flow_run", {"state": {"type": "PENDING"}})
    told = {"PREFECT_API_URL": stack.environment["PREFECT_API_URL"], "PREFECT__FLOW_RUN_ID": made["id"]}
    strict = [word if word != "none" else "host" for word in STRICT]
    options = [word for name, value in told.items() for word in ("--env", f"{name}={value}")]
    done = docker_engine.docker("run", "--rm", *strict, *options, image, timeout=180, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert stack.wait_final(made["id"], 30)["state_type"] == "COMPLETED", done.stdout + done.stderr
