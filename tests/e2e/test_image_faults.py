"""A disk that is full and a push that is cut, for real: the cause is told, and the same command again sends only what lacks.

With registries of their own, since nothing is ever taken out of the one that all tests share.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from blocks.errors import QuotaError
from blocks.image import ImageSettings, Told, ensure_image
from blocks.image_source import BuildInput, hash_source, source_tag
from tests.docker_engine import Engine, client_environment, start_dockerd, stop_dockerd
from tests.docker_registry import Registry, running_registry
from tests.image_layers import MIB
from tests.images import image_command, run_image_command, write_project
from tests.wire import Wire, running_wire
from trainer.errors import ExitCode

SMALL, BIG = 2 * MIB, 32 * MIB
DOCKERFILE = "FROM scratch\nCOPY trainer/small /small\nCOPY trainer/big /big\n"


def make_project(root: Path) -> Path:
    """Of two layers, which cannot be packed; new to the engine each time."""
    write_project(root)
    (root / "docker/trainer.Dockerfile").write_text(DOCKERFILE)
    for name, size in (("small", SMALL), ("big", BIG)):
        (root / "trainer" / name).write_bytes(os.urandom(size))
    return root


@contextmanager
def small_disk(folder: Path, mebibytes: int) -> Iterator[Path]:
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=512m", str(disk)], check=True)


@dataclass
class Pushing:
    """A command that pushes over the wire to the registry."""

    root: Path
    registry: Registry
    wire: Wire
    environment: dict[str, str]
    repository: str = "team/trainer"
    process: subprocess.Popen[str] | None = None

    @property
    def options(self) -> list[str]:
        return ["--registry", self.wire.host, "--repository", self.repository]

    def start(self) -> None:
        command = image_command(self.root, *self.options)
        environment = {**os.environ, **self.environment}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait(self) -> tuple[int, str]:
        """Its exit code and its last words."""
        assert self.process is not None
        _, said = self.process.communicate(timeout=180)
        assert "Traceback" not in said
        return self.process.returncode, said.partition("error: ")[2]

    def stop(self) -> None:
        """Where no test has waited for it."""
        if self.process is not None:
            self.process.kill()
            with self.process:  # closes its pipes
                pass

    def is_referenced(self) -> bool:
        tag = source_tag(hash_source(BuildInput(self.root)))
        return self.registry.digest(self.repository, tag) is not None

    def repeat(self) -> None:
        """Completes, and sends no layer that is there."""
        self.wire.reset()
        again = run_image_command(self.root, *self.options, **self.environment)
        assert again.returncode == 0, again.stderr
        assert "not built: docker here has" in again.stdout
        assert BIG < self.wire.up < BIG + SMALL
        assert self.is_referenced()


@dataclass(frozen=True)
class Both:
    cut: Pushing
    full: Pushing
    disk: Path


@pytest.fixture(scope="module")
def pushing(docker_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """The engine goes on trying for 50 s, so both are begun at once, and before the test of the build."""
    folder = tmp_path_factory.mktemp("pushing")
    environment = {**docker_engine.environment, "TRAINYARD_HOME": str(folder / "home")}
    with (
        small_disk(folder / "disk", 16) as disk,
        running_registry(folder / "roomy") as roomy,
        running_registry(folder / "small", storage=disk / "storage") as small,
        running_wire(roomy.host) as breaking,
        running_wire(small.host) as filling,
    ):
        breaking.breaks_after = BIG - 4 * MIB
        cut = Pushing(make_project(folder / "cut"), roomy, breaking, environment)
        full = Pushing(make_project(folder / "full"), small, filling, environment)
        cut.start()
        full.start()
        try:
            yield Both(cut, full, disk)
        finally:
            cut.stop()
            full.stop()


@pytest.mark.usefixtures("pushing")
def test_a_build_without_disk_space_is_told_and_done_when_there_is_some(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("engine")
    root = make_project(folder / "project")
    with small_disk(folder / "data", 48) as disk:
        start_dockerd(folder)
        try:
            environment = {**client_environment(folder), "TRAINYARD_HOME": str(folder / "home")}
            full = run_image_command(root, **environment)
            assert full.returncode == ExitCode.DISK_FULL, full.stderr
            assert "error: docker has no disk space left for the build\nnext:  docker system prune" in full.stderr
            assert full.stdout == ""
            enlarge(disk)
            again = run_image_command(root, **environment)
            assert again.returncode == 0, again.stderr
            assert ": built: no image of these sources" in again.stdout
        finally:
            stop_dockerd(folder)


def test_a_push_that_is_cut_goes_on_where_it_was(pushing: Both) -> None:
    code, said = pushing.cut.wait()
    assert code == ExitCode.UNAVAILABLE
    assert "broke off" in said
    assert "what it has is not sent again" in said
    assert pushing.cut.wire.cut > 0
    assert not pushing.cut.is_referenced()
    pushing.cut.wire.mend()
    pushing.cut.repeat()


def test_a_push_to_a_full_registry_is_told_and_goes_on_when_there_is_space(pushing: Both) -> None:
    code, said = pushing.full.wait()
    assert code == ExitCode.DISK_FULL, said
    assert said.startswith(f"the registry {pushing.full.wire.host} has no disk space left\nnext:  free space there")
    assert not pushing.full.is_referenced()
    enlarge(pushing.disk)
    pushing.full.repeat()


def test_a_copy_to_a_full_registry_is_told_and_goes_on_when_there_is_space(
    docker_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**docker_engine.environment, "TRAINYARD_HOME": str(tmp_path / "home")}.items():
        monkeypatch.setenv(name, value)
    source = BuildInput(make_project(tmp_path / "project"))
    with (
        small_disk(tmp_path / "disk", 16) as disk,
        running_registry(tmp_path / "roomy") as roomy,
        running_registry(tmp_path / "small", storage=disk / "storage") as small,
        running_wire(small.host) as wire,
    ):
        targets = [ImageSettings(registry=host, repository="team/trainer") for host in (roomy.host, wire.host)]
        with pytest.raises(QuotaError, match="has no disk space left"):
            ensure_image(source, targets, Told())
        assert small.digest("team/trainer", source_tag(hash_source(source))) is None
        enlarge(disk)
        wire.reset()
        made = ensure_image(source, targets, Told())
        assert "another registry has it" in made.why
        assert len({ref.digest for ref in made.refs}) == 1
        assert BIG < wire.up < BIG + SMALL
