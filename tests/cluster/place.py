"""Where one cluster lives: its folder, its ports, its tokens, and how its programs are started there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.components import cache_folder
from tests.docker_registry import is_program, is_running, start_daemon, stop_process
from tests.stack import free_port, wait_for

NODE = "localhost"  # by this name the API server reaches the kubelet on loopback
STATE = "cluster.json"
# Token users and their groups, as the API server's token file wants them.
USERS = {
    "admin": ("admin", "system:masters"),
    "controller-manager": ("system:kube-controller-manager", ""),
    "scheduler": ("system:kube-scheduler", ""),
    "kubelet": (f"system:node:{NODE}", "system:nodes"),
}
SERVERS = ("etcd", "etcd-peer", "api-server", "kubelet")


def cluster_folder() -> Path:
    """`TRAINYARD_TEST_CLUSTER` names one of your own beside the shared one: for two working copies at the same time."""
    return cache_folder("cluster") / (os.environ.get("TRAINYARD_TEST_CLUSTER") or "shared")


@dataclass(frozen=True)
class Place:
    """``run`` holds what ends with the cluster; ``store``, with containerd's images, outlives it."""

    folder: str
    ports: dict[str, int]
    tokens: dict[str, str]

    @property
    def run(self) -> Path:
        return Path(self.folder) / "run"

    @property
    def store(self) -> Path:
        return Path(self.folder) / "containerd"

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.ports['api-server']}"

    @property
    def certificate(self) -> Path:
        """The API server's own, which signs itself."""
        return self.run / "certificates" / "apiserver.crt"

    @property
    def cgroup(self) -> str:
        """Of its own, since a kubelet ends what it does not know below its root."""
        return f"trainyard-{hashlib.sha256(self.folder.encode()).hexdigest()[:8]}"

    def kubeconfig(self, user: str) -> Path:
        return self.run / f"{user}.kubeconfig"

    def log(self, program: str) -> Path:
        return self.run / f"{program}.log"

    def pid(self, program: str) -> int | None:
        """None: it does not run."""
        file = self.run / f"{program}.pid"
        pid = int(file.read_text().strip() or 0) if file.is_file() else 0
        return pid if pid and is_program(pid, program) else None

    def start(self, program: str, command: list[str], options: Mapping[str, object], environment: Mapping[str, str] | None = None) -> None:
        """It outlives the process that starts it."""
        flags = [f"--{name}={value}" for name, value in options.items()]
        pid = start_daemon(program, [*command, *flags], self.run, self.log(program), {**os.environ, **(environment or {})})
        # Until then it is still what starts it.
        wait_for(f"{program} to start", lambda: is_program(pid, program) or not is_running(pid), 10, every=0.02)

    def stop(self, program: str) -> None:
        if (pid := self.pid(program)) is not None:
            stop_process(pid, program)


def new_place(folder: Path) -> Place:
    ports = {name: free_port() for name in SERVERS}
    place = Place(str(folder.resolve()), ports, {user: secrets.token_hex(16) for user in USERS})
    place.run.mkdir(parents=True)
    (place.run / STATE).write_text(json.dumps(asdict(place)))
    return place


def found_place(folder: Path) -> Place | None:
    state = folder / "run" / STATE
    return Place(**json.loads(state.read_text())) if state.is_file() else None


def kubeconfig(place: Place, token: str, namespace: str = "default") -> dict[str, Any]:
    """As a file of a user who has a server, its certificate authority and a token."""
    import base64

    authority = base64.b64encode(place.certificate.read_bytes()).decode()
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "trainyard-test", "cluster": {"server": place.server, "certificate-authority-data": authority}}],
        "users": [{"name": "user", "user": {"token": token}}],
        "contexts": [{"name": "test", "context": {"cluster": "trainyard-test", "user": "user", "namespace": namespace}}],
        "current-context": "test",
    }
