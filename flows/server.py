"""The Prefect server and worker that `trainyard up` keeps: how they are started, watched and stopped.

Both run apart from the terminal, so that Ctrl-C reaches only `up`, which stops them in order. Trainings are not
among what is stopped: they are nobody's children and live in sessions of their own.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO

import psutil

from blocks.errors import ConfigError, ServiceUnavailable
from flows.prefect_settings import ENV_ENCRYPTION_KEY, details_path, encryption_key, prefect_home
from trainer.contract import ENV_HOME, ExitCode

HOST = "127.0.0.1"
POOL = "trainyard-local"
# In the environment of all that an `up` starts: how what is left of a killed one is found.
MARKER = "TRAINYARD_UP"
NOTIFY = "TRAINYARD_NOTIFY"
SUPERVISED = "TRAINYARD_SUPERVISOR_PID"  # in the environment of a training
# The user's own server, database and profile stay out of it.
FOREIGN = ("PREFECT_HOME", "PREFECT_PROFILE", "PREFECT_API_", "PREFECT_UI_", "PREFECT_SERVER_API_", "PREFECT_SERVER_DATABASE_", NOTIFY)
STEADY_SECONDS = 60.0
LONGEST_PAUSE = 60.0
LOG_BYTES = 10_000_000

Say = Callable[[str], None]


# --- What they are started with --------------------------------------------------------------------------------------


def api_url(port: int) -> str:
    return f"http://{HOST}:{port}/api"


def build_environment(environment: Mapping[str, str], trainyard_home: Path, port: int, token: str) -> dict[str, str]:
    """Pure. The environment of whatever `up` starts: the user's, but with the server, home and database of its own."""
    kept = {name: value for name, value in environment.items() if not name.startswith(FOREIGN)}
    return kept | {
        ENV_HOME: str(trainyard_home),
        "PREFECT_HOME": str(trainyard_home / "prefect"),
        "PREFECT_API_URL": api_url(port),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_WORKER_QUERY_SECONDS": kept.get("PREFECT_WORKER_QUERY_SECONDS", "2"),
        MARKER: token,
    }


def build_server_environment(environment: Mapping[str, str], key: str) -> dict[str, str]:
    """Pure. Leases on disk: with those in memory a server that is killed leaves concurrency slots occupied for good."""
    return dict(environment) | {
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        ENV_ENCRYPTION_KEY: key,
        "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    }


def require_free_port(port: int) -> None:
    """Raises ConfigError where somebody else listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            raise ConfigError(
                f"port {port} is taken by another program ({exc.strerror})",
                hint=f"choose a free one: trainyard up --port {port + 1 if port < 65_535 else port - 1}",
                code=ExitCode.OCCUPIED,
            ) from exc


# --- One of them ----------------------------------------------------------------------------------------------------


def pause_before_start(failures: int) -> float:
    """Pure. Seconds to wait before a service that ended `failures` times in a row is started again: 1, 2, 4 ... 60."""
    return min(LONGEST_PAUSE, 2.0 ** min(failures - 1, 10))


def describe_exit(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


@dataclass
class Service:
    name: str
    arguments: Sequence[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started: float = 0.0
    due: float | None = None

    @property
    def log(self) -> Path:
        return prefect_home() / "logs" / f"{self.name}.log"

    def start(self) -> None:
        self.started, self.due = time.monotonic(), None
        with open_log(self.log) as output:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "prefect", *self.arguments],
                cwd=prefect_home(),
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def look(self, now: float) -> str:
        """Starts it again where it ended and its pause is over; returns the line to tell, once per end."""
        code = self.process.poll() if self.process else None
        if code is None:
            return ""
        if self.due is None:
            self.failures = 1 if now - self.started > STEADY_SECONDS else self.failures + 1
            pause = pause_before_start(self.failures)
            self.due = now + pause
            return f"the {self.name} ended ({describe_exit(code)}); it is started again in {pause:.0f} s; log: {self.log}"
        if now >= self.due:
            self.start()
        return ""

    def stop(self, seconds: float, hurry: Callable[[], bool]) -> None:
        """Asks it to end, and makes it after `seconds`, or at once when `hurry` says so."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            if time.monotonic() > deadline or hurry():
                self.process.kill()
                self.process.wait()
                return
            time.sleep(0.1)

    def tail(self, lines: int = 8) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:]) if self.log.exists() else ""


def open_log(path: Path) -> IO[bytes]:
    """To append to; a long one is put aside first, and the one before it dropped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(path.with_suffix(".log.1"))
    return path.open("ab")


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"{api_url(port)}/health", timeout=5) as answer:  # noqa: S310 - loopback
            return answer.status == 200
    except OSError:
        return False


# --- What is left of them ----------------------------------------------------------------------------------------


def is_ours(command: Sequence[str], environment: Mapping[str, str], token: str) -> bool:
    """Pure. Whether a process is a server, worker or flow of the `up` with this token. Never a training, which inherits the token."""
    if environment.get(MARKER) != token or SUPERVISED in environment:
        return False
    modules = [after for option, after in pairwise(command) if option == "-m"]
    return any(module.split(".")[0] == "prefect" for module in modules[:1])


def find_ours(token: str, spare: frozenset[int] = frozenset()) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.pid not in spare and is_ours(process.cmdline(), process.environ(), token):
                found.append(process)
        except (psutil.Error, OSError):  # ended meanwhile, or another user's
            continue
    return found


def end_leftovers(token: str, seconds: float, spare: frozenset[int] = frozenset()) -> int:
    """Ends what a worker or a whole `up` left behind when it was killed. Returns how many processes that were."""
    left = find_ours(token, spare)
    for process in left:
        _signal(process, signal.SIGTERM)
    _, stubborn = psutil.wait_procs(left, timeout=seconds)
    for process in {*stubborn, *find_ours(token, spare)}:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(stubborn, timeout=5)
    return len(left)


def _signal(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


# --- Both -------------------------------------------------------------------------------------------------------------


@dataclass
class Stack:
    """A server and its worker. `stopping` and `hurry` are asked all the while, since a person may press Ctrl-C at any moment."""

    port: int
    trainyard_home: Path
    say: Say
    stopping: Callable[[], bool]
    hurry: Callable[[], bool]
    token: str = field(default_factory=lambda: secrets.token_hex(8))

    def __post_init__(self) -> None:
        folder = prefect_home()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.environment = build_environment(os.environ, self.trainyard_home, self.port, self.token)
        server_environment = build_server_environment(self.environment, encryption_key())
        serve = ("server", "start", "--host", HOST, "--port", str(self.port))
        self.server = Service("server", serve, server_environment)
        self.worker = Service(
            "worker", ("worker", "start", "--pool", POOL, "--type", "process", "--name", "trainyard-up"), self.environment
        )

    def start_server(self, patience: float = 300) -> None:
        """Returns when it answers, or when somebody wants it stopped. Raises ServiceUnavailable where it ends or stays silent."""
        self.server.start()
        began = told = time.monotonic()
        while not is_healthy(self.port):
            if self.stopping():
                return
            now = time.monotonic()
            assert self.server.process is not None
            if self.server.process.poll() is not None or now - began > patience:
                what = "did not start" if self.server.process.poll() is not None else f"does not answer after {patience:.0f} s"
                raise ServiceUnavailable(f"the Prefect server {what}; its last words:\n{self.server.tail()}", hint=f"see {self.server.log}")
            if now - told > 10:
                told = now
                self.say(f"  still starting, {now - began:.0f} s")
            time.sleep(0.25)

    def look(self) -> None:
        for service in (self.server, self.worker):
            if line := service.look(time.monotonic()):
                self.say(line)

    def stop(self) -> None:
        """The worker first, so that its flows can tell the server that they end."""
        self.worker.stop(20, self.hurry)
        server_pid = self.server.process.pid if self.server.process else 0
        end_leftovers(self.token, 0 if self.hurry() else 5, frozenset({server_pid}))
        self.server.stop(15, self.hurry)
        end_leftovers(self.token, 0)
        details_path().unlink(missing_ok=True)
