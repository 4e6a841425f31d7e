"""A real Docker Engine with BuildKit, an image registry and a small Python base image, all on loopback and all Debian's.

By hand: ``python -m tests.docker_engine up``, ``env`` (what to set to use it) and ``down``. Its data stays in the user's cache folder, so
that only a new machine pays for the big layers. Several test runs share one engine: the last one stops it, unless ``up`` started it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.components import cache_folder, skip_or_fail, unpacked_program
from tests.docker_registry import Registry, found_registry, is_program, is_running, start_daemon, start_registry, stop_process
from tests.shared_rig import shared, starting
from tests.stack import wait_for

# Tools as in an official slim Python image: no compiler, no OpenGL. `extract` only unpacks: seconds instead of minutes.
BASE_PACKAGES = "base-files base-passwd dash coreutils python3 python-is-python3 python3-pip ca-certificates libstdc++6"
BASE_OPTIONS = [
    "--variant=extract",
    f"--include={BASE_PACKAGES.replace(' ', ',')}",
    *(f"--dpkgopt=path-exclude=/usr/share/{folder}/*" for folder in ("man", "doc", "locale")),
    '--aptopt=APT::Install-Recommends "0"',
    "bookworm",
]
BASE_REPOSITORY = "trainyard-test/python"
GIB = 2**30
# What is kept between runs. A registry cannot give up single layers while it serves, so it is emptied; the engine gives up what is oldest.
REGISTRY_LIMIT = 10 * GIB
BUILD_CACHE_LIMIT = 12 * GIB
UNUSED_IMAGES_FOR = "24h"


@dataclass(frozen=True)
class Engine:
    """``environment`` makes the docker client of this engine the one that a test's programs find."""

    folder: Path
    registry: Registry
    base: str
    environment: dict[str, str]

    def docker(
        self, *argv: str, timeout: float = 1800, check: bool = True, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            ["docker", *argv],
            env={**os.environ, **self.environment, **environment},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert not check or done.returncode == 0, f"docker {shlex.join(argv)}: {done.returncode}\n{said}"
        return done

    def inspect(self, name: str) -> dict[str, Any]:
        return json.loads(self.docker("inspect", name).stdout)[0]


def rig_folder() -> Path:
    return cache_folder("docker")


def client_environment(folder: Path) -> dict[str, str]:
    programs = cache_folder("debian")
    return {
        "DOCKER_HOST": f"unix://{folder / 'docker.sock'}",
        "DOCKER_BUILDKIT": "1",
        "DOCKER_CONFIG": str(folder / "client"),  # no login of this machine's user
        "PATH": os.pathsep.join([str(programs / "usr/bin"), str(programs / "usr/sbin"), os.environ["PATH"]]),
    }


def engine_answers(folder: Path) -> bool:
    environment = {**os.environ, **client_environment(folder)}
    command = ["docker", "version", "--format", "{{.Server.Version}}"]
    return subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False).returncode == 0


def engine_pid(folder: Path) -> int | None:
    with suppress(FileNotFoundError, ValueError):
        pid = int((folder / "dockerd.pid").read_text())
        return pid if is_program(pid, "dockerd") else None
    return None


def start_dockerd(folder: Path) -> None:
    """No bridge and no firewall rule: what needs a network asks for the host's."""
    log = folder / "dockerd.log"
    log.write_bytes(b"")
    (folder / "dockerd.json").write_text("{}")  # not this machine's own settings
    options = {
        "config-file": folder / "dockerd.json",
        "data-root": folder / "data",
        "exec-root": folder / "run",
        "pidfile": folder / "engine.pid",
        "host": f"unix://{folder / 'docker.sock'}",
        "bridge": "none",
        "iptables": "false",
        "ip6tables": "false",
        "ip-forward": "false",
        "ip-masq": "false",
        "default-ulimit": "nofile=1024:1024",
        "exec-opt": "native.cgroupdriver=cgroupfs",
    }
    command = [unpacked_program("dockerd"), *(f"--{name}={value}" for name, value in options.items())]
    pid = start_daemon("dockerd", command, folder, log, {**os.environ, **client_environment(folder)})

    def ready() -> bool:
        assert is_running(pid), log.read_text()[-4000:]
        return engine_answers(folder)

    wait_for("the Docker Engine", ready, 60)


def mounts_below(folder: Path) -> list[str]:
    """The innermost first."""
    places = [line.split()[1].replace("\\040", " ") for line in Path("/proc/mounts").read_text().splitlines()]
    return sorted((place for place in places if Path(place).is_relative_to(folder.resolve())), reverse=True)


def stop_dockerd(folder: Path) -> None:
    if (pid := engine_pid(folder)) is not None:
        stop_process(pid, "dockerd", seconds=30)
    with suppress(FileNotFoundError, ValueError):  # left where the engine was killed
        stop_process(int((folder / "run/containerd/containerd.pid").read_text()), "containerd")
    # The network of containers always stays mounted, and where the engine was killed its folder, too.
    for mounted in mounts_below(folder):
        subprocess.run(["umount", mounted], capture_output=True, check=False)
    for stale in ("engine.pid", "dockerd.pid", "docker.sock"):
        (folder / stale).unlink(missing_ok=True)


def make_base(engine: Engine) -> str:
    """The base image's reference by digest. Made once, then found in the registry, so that its layers stay the same."""
    tag = hashlib.sha256(json.dumps(BASE_OPTIONS).encode()).hexdigest()[:12]
    if (digest := engine.registry.digest(BASE_REPOSITORY, tag)) is None:
        archive, name = engine.folder / "base.tar", f"{engine.registry.host}/{BASE_REPOSITORY}:{tag}"
        if (program := shutil.which("mmdebstrap")) is None:
            skip_or_fail("not here: mmdebstrap (apt-get install mmdebstrap)")
        options, suite = BASE_OPTIONS[:-1], BASE_OPTIONS[-1]
        done = subprocess.run([program, "--quiet", *options, suite, str(archive)], capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        path = "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        engine.docker("import", "--platform", "linux/amd64", "--change", path, str(archive), name)
        archive.unlink()
        engine.docker("push", name)
        engine.docker("rmi", name)
        digest = engine.registry.digest(BASE_REPOSITORY, tag)
    return f"{engine.registry.host}/{BASE_REPOSITORY}@{digest}"


def prune(engine: Engine) -> None:
    """What ended runs left: every container, images that nobody used for days, the oldest of the build cache."""
    engine.docker("container", "prune", "--force")
    engine.docker("image", "prune", "--force", "--all", "--filter", f"until={UNUSED_IMAGES_FOR}")
    engine.docker("builder", "prune", "--force", "--keep-storage", str(BUILD_CACHE_LIMIT))


def start_or_find(folder: Path) -> Engine:
    """What an earlier run left serves on; what no longer answers is ended and started again."""
    registry = found_registry(folder / "registry")
    if registry is None:
        registry = start_registry(folder / "registry")
        if registry.stored_bytes() > REGISTRY_LIMIT:
            registry.stop()
            shutil.rmtree(registry.storage)
            registry = start_registry(folder / "registry")
    found = engine_pid(folder) is not None and engine_answers(folder)
    if not found:
        stop_dockerd(folder)
        start_dockerd(folder)
    engine = Engine(folder, registry, "", client_environment(folder))
    if not found:
        prune(engine)
    return Engine(folder, registry, make_base(engine), engine.environment)


def stop_all(folder: Path) -> None:
    stop_dockerd(folder)
    if (registry := found_registry(folder / "registry")) is not None:
        registry.stop()


def running_engine() -> AbstractContextManager[Engine]:
    return shared(require_engine(), start_or_find, stop_all)


def require_engine() -> Path:
    """The rig's folder; skips, or fails in CI, where no engine can run."""
    if sys.platform != "linux" or os.geteuid() != 0:
        skip_or_fail("a Docker Engine of its own needs Linux and root")
    for program in ("docker", "dockerd", "containerd", "runc", "docker-registry"):
        unpacked_program(program)
    return rig_folder()


@pytest.fixture(scope="session")
def docker_engine() -> Iterator[Engine]:
    with running_engine() as engine:
        yield engine


def main(verb: str) -> None:
    folder = require_engine()
    with starting(folder):
        if verb == "down":
            (folder / "kept").unlink(missing_ok=True)
            stop_all(folder)
            return
        if verb == "up":
            (folder / "kept").touch()
        engine = start_or_find(folder)
    for name, value in {**engine.environment, "BASE_IMAGE": engine.base, "REGISTRY": engine.registry.host}.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    if sys.argv[1:] not in (["up"], ["down"], ["env"]):
        raise SystemExit("python -m tests.docker_engine up|down|env")
    main(sys.argv[1])
