"""The trainer image as tests use it: built on the local base, pushed to the loopback registry, pulled by its digest."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from blocks.image import BuildOptions, EnsuredImage, ImageSettings, Told, ensure_image
from blocks.image_source import BuildInput
from tests.docker_engine import Engine
from tests.stack import REPOSITORY

NAME = "trainyard-test/trainer"
# In what the build gets as its network's certificates: found in no layer. In two pieces, so that this file does not hold it.
SECRET = "trainyard-test" + "-hidden-word"
# As strict as any platform that starts it.
STRICT = ["--read-only", "--network", "none", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]


@dataclass(frozen=True)
class TrainerImage:
    """``reference`` is by digest."""

    engine: Engine
    reference: str
    made: EnsuredImage
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


def make_image(engine: Engine, context: Path, scratch: Path, *, host: str = "", force: bool = False) -> TrainerImage:
    """Builds and pushes as `trainyard image build` does, and pulls by digest. `host` stands in for the registry's."""
    host = host or engine.registry.host
    base = engine.base.replace(engine.registry.host, host)
    began, said, seconds = time.monotonic(), [], {}

    def say(line: str) -> None:
        said.append((line, time.monotonic()))

    with pytest.MonkeyPatch.context() as patch:
        own = {"TRAINYARD_HOME": str(scratch / "home"), "SSL_CERT_FILE": str(certificates(scratch))}
        for name, value in {**engine.environment, **own}.items():
            patch.setenv(name, value)
        target = ImageSettings(registry=host, repository=NAME)
        made = ensure_image(BuildInput(context, base=base), [target], Told(say=say), BuildOptions(force=force, network="host"))
    done = time.monotonic()
    for line, at in said:
        if line.startswith("built:"):
            seconds |= {"build": at - began, "push": done - at}
    engine.docker("pull", "--quiet", str(made.refs[0]))
    seconds["pull"] = time.monotonic() - done
    return TrainerImage(engine, str(made.refs[0]), made, seconds)


def copy_sources(folder: Path) -> Path:
    """What an image is built from, to be changed by a test."""
    for name in ("docker", "trainer", "flows", "blocks"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / ".dockerignore", folder)
    return folder


@pytest.fixture(scope="session")
def trainer_image(docker_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> TrainerImage:
    """Forced, so that a build shows it, whatever the registry has from earlier test runs."""
    return make_image(docker_engine, REPOSITORY, tmp_path_factory.mktemp("image"), force=True)
