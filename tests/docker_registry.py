"""A real image registry (Debian's docker-registry) on loopback, with a password where a test wants one; stopped by process id."""

from __future__ import annotations

import json
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.components import skip_or_fail, unpacked_program
from tests.stack import wait_for

CONFIG = "registry.json"
STATE = "running.json"
LOG = "registry.log"
MANIFESTS = ", ".join(f"application/vnd.{kind}+json" for kind in ("docker.distribution.manifest.v2", "oci.image.manifest.v1"))


@dataclass(frozen=True)
class Registry:
    """``host`` is what goes before an image's name. `storage` is what it keeps, and may outlive it."""

    host: str
    pid: int
    storage: str
    log: str

    def alive(self) -> bool:
        return is_program(self.pid, "docker-registry")

    def stop(self) -> None:
        stop_process(self.pid, "docker-registry")

    def stored_bytes(self) -> int:
        """Of all blobs: layers, configurations and manifests, as they came over the wire."""
        return sum(file.stat().st_size for file in Path(self.storage).glob("docker/registry/v2/blobs/*/*/*/data"))

    def sent_bytes(self) -> int:
        """Of all answers so far: what clients pulled."""
        return sum(map(int, re.findall(r'"http.response.written":(\d+)', Path(self.log).read_text())))

    def json(self, path: str) -> Any:
        """``/v2/<path>``, of a registry without a password."""
        request = urllib.request.Request(f"http://{self.host}/v2/{path}", headers={"Accept": MANIFESTS})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def digest(self, repository: str, tag: str) -> str | None:
        """What the tag means now; None: there is no such image."""
        request = urllib.request.Request(
            f"http://{self.host}/v2/{repository}/manifests/{tag}", headers={"Accept": MANIFESTS}, method="HEAD"
        )
        with suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=30) as answer:
            return answer.headers["Docker-Content-Digest"]
        return None


def start_registry(folder: Path, *, users: Mapping[str, str] | None = None, storage: Path | None = None) -> Registry:
    """On a free port. `users` are passwords by name; none: everyone may do everything. It runs until ``stop()``."""
    program = unpacked_program("docker-registry")
    storage = storage or folder / "storage"
    for made in (folder, storage):
        made.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "version": "0.1",
        "log": {"level": "info", "formatter": "json"},
        "storage": {"filesystem": {"rootdirectory": str(storage)}, "delete": {"enabled": True}},
        "http": {"addr": "127.0.0.1:0"},
    }
    if users is not None:
        passwords = folder / "htpasswd"
        passwords.write_text("".join(f"{name}:{hashed(password)}\n" for name, password in users.items()))
        config["auth"] = {"htpasswd": {"realm": "registry", "path": str(passwords)}}
    (folder / CONFIG).write_text(json.dumps(config))
    log = folder / LOG
    log.write_bytes(b"")
    pid = start_daemon("docker-registry", [program, "serve", str(folder / CONFIG)], folder, log)

    def address() -> re.Match[str] | None:
        assert is_running(pid), log.read_text()
        return re.search(r"listening on (127\.0\.0\.1:\d+)", log.read_text())

    try:
        host = wait_for("the registry", address, 30, every=0.05)[1]
    except BaseException:
        stop_process(pid, "docker-registry")
        raise
    registry = Registry(host, pid, str(storage), str(log))
    (folder / STATE).write_text(json.dumps(asdict(registry)))
    return registry


def found_registry(folder: Path) -> Registry | None:
    """The one that an earlier process started there, if it still runs."""
    with suppress(FileNotFoundError):
        registry = Registry(**json.loads((folder / STATE).read_text()))
        return registry if registry.alive() else None
    return None


@contextmanager
def running_registry(folder: Path, *, users: Mapping[str, str] | None = None, storage: Path | None = None) -> Iterator[Registry]:
    registry = start_registry(folder, users=users, storage=storage)
    try:
        yield registry
    finally:
        registry.stop()


def hashed(password: str) -> str:
    """As a registry's htpasswd file wants it; the cheapest that counts."""
    import bcrypt

    return bcrypt.hashpw(password.encode(), bcrypt.gensalt(rounds=4)).decode()


def start_daemon(name: str, command: list[str], folder: Path, log: Path, environment: Mapping[str, str] | None = None) -> int:
    """A process that is nobody's child, since it may outlive the test run that starts it. Returns its id."""
    pid_file = folder / f"{name}.pid"
    pid_file.unlink(missing_ok=True)
    starter = ["start-stop-daemon", "--start", "--background", "--make-pidfile", "--pidfile", str(pid_file), "--output", str(log)]
    starter += ["--startas", command[0], "--", *command[1:]]
    try:
        subprocess.run(starter, env=environment, check=True, capture_output=True, timeout=30)
    except FileNotFoundError:
        skip_or_fail("not here: start-stop-daemon, of Debian")
    return int(wait_for(f"the process id of {name}", lambda: pid_file.is_file() and pid_file.read_text().strip(), 10, every=0.02))


def is_running(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def is_program(pid: int, name: str) -> bool:
    """Whether that process runs, and is the program of that name: process ids come round again."""
    with suppress(psutil.NoSuchProcess):
        return is_running(pid) and [Path(word).name for word in psutil.Process(pid).cmdline()[:1]] == [name]
    return False


def stop_process(pid: int, name: str, seconds: float = 20) -> None:
    if not is_program(pid, name):
        return
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        process.terminate()
        try:
            process.wait(seconds)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(seconds)
