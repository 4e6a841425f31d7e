"""The flow runner's image as tests use it: built on the local base, as a person builds it."""

from __future__ import annotations

from pathlib import Path

from tests.docker_engine import Engine
from tests.stack import REPOSITORY
from tests.trainer_image import certificates

NAME = "trainyard-test/flow-runner"


def build_flow_runner(engine: Engine, scratch: Path, *extras: str) -> str:
    """Its name by tag. What did not change is found in the engine's cache."""
    name = f"{engine.registry.host}/{NAME}:{'-'.join(extras)}"
    options = ["--build-arg", f"BASE_IMAGE={engine.base}", "--build-arg", f"EXTRAS={' '.join(extras)}", "--network", "host"]
    options += ["--secret", f"id=ca,src={certificates(scratch)}", "--platform", "linux/amd64"]
    engine.docker("build", *options, "--file", str(REPOSITORY / "docker/flow-runner.Dockerfile"), "--tag", name, str(REPOSITORY))
    return name
