"""The trainer image as tests use it: built on the local base, pushed to the loopback registry, pulled by its digest."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.docker_engine import Engine
from tests.stack import REPOSITORY

NAME = "trainyard-test/trainer"
# In what the build gets as its network's certificates: found in no layer. In two pieces, so that this file does not hold it.
SECRET = "trainyard-test" + "-hidden-word"
# As strict as any platform that starts it.
STRICT = ["--read-only", "--network", "none", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]


@dataclass(frozen=True)
class TrainerImage:
    """``reference`` is by digest. `built_id` is what the engine calls it."""

    engine: Engine
    reference: str
    built_id: str
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        return self.reference.rpartition("@")[2]

    def run(self, *argv: str, options: list[str] | None = None, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        return self.engine.docker("run", "--rm", *STRICT, *(options or []), self.reference, *argv, timeout=timeout, check=False)

    def python(self, code: str, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("-P", "-c", code, options=["--entrypoint", "python", *options])


def certificates(folder: Path) -> Path:
    """This machine's bundle, with a comment to look for."""
    bundle = folder / "certificates.pem"
    found = Path(os.environ.get("SSL_CERT_FILE") or "/etc/ssl/certs/ca-certificates.crt")
    bundle.write_text(f"# {SECRET}\n{found.read_text()}")
    return bundle


def make_image(engine: Engine, context: Path, scratch: Path, tag: str) -> TrainerImage:
    """Builds, pushes, and pulls by digest."""
    name, seconds = f"{engine.registry.host}/{NAME}:{tag}", {}
    options = ["--build-arg", f"BASE_IMAGE={engine.base}", "--build-arg", "VERSION=0", "--secret", f"id=ca,src={certificates(scratch)}"]
    options += ["--network", "host", "--platform", "linux/amd64", "--file", str(context / "docker/trainer.Dockerfile"), "--tag", name]
    began = time.monotonic()
    engine.docker("build", *options, str(context))
    seconds["build"] = time.monotonic() - began
    began = time.monotonic()
    engine.docker("push", "--quiet", name)
    seconds["push"] = time.monotonic() - began
    digest = engine.registry.digest(NAME, tag)
    reference = f"{engine.registry.host}/{NAME}@{digest}"
    began = time.monotonic()
    engine.docker("pull", "--quiet", reference)
    seconds["pull"] = time.monotonic() - began
    return TrainerImage(engine, reference, engine.inspect(name)["Id"], seconds)


def copy_sources(folder: Path) -> Path:
    """What an image is built from, to be changed by a test."""
    for name in ("docker", "trainer", "flows", "blocks"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / ".dockerignore", folder)
    return folder


@pytest.fixture(scope="session")
def trainer_image(docker_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> TrainerImage:
    return make_image(docker_engine, REPOSITORY, tmp_path_factory.mktemp("image"), "current")
