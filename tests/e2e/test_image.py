"""The trainer image with a real engine and a real registry: built once, pushed once, then only found. On a small Dockerfile."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from blocks.errors import ConfigError, TrainyardError
from blocks.image import BuildOptions, ImageSettings, Told, ensure_image, resolve_image
from blocks.image_build import BuildStep
from blocks.image_engine import connect
from blocks.image_source import BuildInput
from blocks.registry_login import Identity
from tests.docker_engine import Engine
from tests.docker_registry import Registry, running_registry
from tests.image_layers import pushed_layers
from tests.images import Uploader, run_image_command, write_project

USER, PASSWORD = "builder", "hunter2-very-secret"


@pytest.fixture
def engine(docker_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    for name, value in {**docker_engine.environment, "TRAINYARD_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    return docker_engine


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Registry]:
    with running_registry(tmp_path / "guarded", users={USER: PASSWORD}) as running:
        yield running


@pytest.fixture
def source(tmp_path: Path) -> BuildInput:
    root = write_project(tmp_path / "project")
    # New to the engine each time, whatever its cache has.
    (root / "trainer/task.py").write_text(f"print('{uuid4().hex}')\n")
    return BuildInput(root)


def test_built_once_pushed_once_copied_and_then_only_found(engine: Engine, guarded: Registry, source: BuildInput) -> None:
    first = ImageSettings(registry=engine.registry.host, repository=f"image-test/{uuid4().hex[:8]}")
    second = ImageSettings(registry=guarded.host, repository="team/trainer", identity=Identity(USER, PASSWORD))
    steps: list[BuildStep] = []
    made = ensure_image(source, [first, second], Told(step=lambda step, _seconds: steps.append(step)))
    assert made.built
    assert "no image of these sources" in made.why
    assert [(step.number, step.count) for step in steps] == [(1, 2), (2, 2)]
    assert len({ref.digest for ref in made.refs}) == 1
    assert engine.registry.digest(first.repository, made.tag) == made.refs[0].digest
    assert resolve_image(replace(first, image=str(made.refs[0]))) == made.refs[0]

    # Elsewhere, and without an engine.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_HOST", "unix:///none.sock")
        started = time.monotonic()
        again = ensure_image(source, [first, second], Told())
        assert time.monotonic() - started < 2
    assert (again.built, again.refs) == (False, made.refs)

    # Another registry gets it by a copy; an engine that has it needs no build.
    third = replace(first, repository=f"{first.repository}/pushed")
    pushed = ensure_image(source, [third], Told(), BuildOptions(build=False))
    assert not pushed.built
    assert "docker here has" in pushed.why
    with connect() as docker:
        found = docker.find(docker.images()[0].source_hash, source.platform)
        assert found is not None
    engine.docker("rmi", "--force", found.id)


def test_with_nothing_changed_the_command_says_so_within_two_seconds(engine: Engine, source: BuildInput, tmp_path: Path) -> None:
    """As installed: what the first start compiles, the next one finds. The best of three, since a busy machine only adds."""
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    options = ["--registry", engine.registry.host, "--repository", f"image-test/{uuid4().hex[:8]}"]
    first = run_image_command(source.root, *options, **compiled)
    assert first.returncode == 0, first.stderr
    assert ": built: no image of these sources" in first.stdout
    seconds: list[float] = []
    for _ in range(3):
        started = time.monotonic()
        again = run_image_command(source.root, *options, **compiled)
        seconds.append(time.monotonic() - started)
        assert "nothing that it is made of has changed" in again.stdout
        assert again.stdout.splitlines()[1:] == first.stdout.splitlines()[1:]
        assert again.stderr == "imported:\n"
    assert min(seconds) < 2, seconds


def test_a_change_builds_anew_and_a_step_that_fails_is_told(engine: Engine, source: BuildInput) -> None:
    target = ImageSettings(registry=engine.registry.host, repository=f"image-test/{uuid4().hex[:8]}")
    before = ensure_image(source, [target], Told())
    (source.root / "flows/train.py").write_text("# another comment\n")
    assert ensure_image(source, [target], Told()).refs == before.refs
    (source.root / "trainer/task.py").write_text(f"print('{uuid4().hex}')\n")
    after = ensure_image(source, [target], Told())
    assert after.built
    assert after.refs[0].digest != before.refs[0].digest
    with (source.root / "docker/trainer.Dockerfile").open("a") as dockerfile:
        dockerfile.write("COPY docker/trainer-missing.txt /\n")
    with pytest.raises(ConfigError, match="a step of the build failed"):
        ensure_image(source, [target], Told())


def test_a_base_that_moved_is_built_on_when_that_is_asked_for(engine: Engine, source: BuildInput) -> None:
    """By its tag alone nobody sees that it moved; and docker takes the one that it has."""
    base = Uploader(engine.registry.host, f"image-test/{uuid4().hex[:8]}")
    target = ImageSettings(registry=engine.registry.host, repository=f"{base.repository}/trainer")
    named = replace(source, base=f"{base.host}/{base.repository}:1")
    base.image("1", payload=uuid4().bytes)
    engine.docker("pull", "--quiet", named.base)
    before = ensure_image(named, [target], Told())
    base.image("1", payload=uuid4().bytes)
    moved = pushed_layers(engine.registry, base.repository, "1")

    assert ensure_image(named, [target], Told()).refs == before.refs
    forced = ensure_image(named, [target], Told(), BuildOptions(force=True))
    assert moved[0] not in pushed_layers(engine.registry, target.repository, forced.refs[0].digest)
    pulled = ensure_image(named, [target], Told(), BuildOptions(pull=True))
    assert (pulled.built, pulled.tag) == (True, before.tag)
    assert pushed_layers(engine.registry, target.repository, pulled.refs[0].digest)[0] == moved[0]
    assert ensure_image(named, [target], Told()).refs == pulled.refs
    engine.docker("rmi", "--force", named.base, before.image_id, pulled.image_id)


@pytest.mark.parametrize("base", ["127.0.0.1:1/none:1", "{registry}/none/base:1"])
def test_a_base_that_is_missing_is_told(engine: Engine, source: BuildInput, base: str) -> None:
    target = ImageSettings(registry=engine.registry.host, repository="image-test/base")
    named = replace(source, base=base.format(registry=engine.registry.host))
    with pytest.raises(TrainyardError, match="the base image cannot be had"):
        ensure_image(named, [target], Told())


def test_a_wrong_password_is_told_before_the_build_and_none_is_shown(
    engine: Engine, guarded: Registry, source: BuildInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the command, whose password comes from the environment."""
    monkeypatch.setenv("TRAINYARD_REGISTRY_PASSWORD", "wrong-secret")
    options = ["--registry", guarded.host, "--user", USER]
    refused = run_image_command(source.root, *options)
    assert refused.returncode == 77, refused.stderr
    assert "refuses the user or the password" in refused.stderr
    assert "wrong-secret" not in refused.stderr
    assert "build 1/" not in refused.stderr
    monkeypatch.setenv("TRAINYARD_REGISTRY_PASSWORD", PASSWORD)
    done = run_image_command(source.root, *options, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["refs"][0].startswith(f"{guarded.host}/trainyard-trainer@sha256:")
    assert PASSWORD not in done.stdout + done.stderr
