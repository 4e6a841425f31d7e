"""A real Prefect server and worker, on loopback, in a home of their own; stopped by process id at the end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
POOL = "trainyard-local"


def wait_for(what: str, condition: Callable[[], Any], seconds: float, every: float = 0.25) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(every)
    raise AssertionError(f"{what}: not within {seconds:.0f} s")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def stop(process: subprocess.Popen[bytes]) -> None:
    """The process and its children; never a training, which is nobody's child."""
    with suppress(psutil.NoSuchProcess):
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
    process.wait(10)


@dataclass
class Stack:
    folder: Path
    environment: dict[str, str]
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        return Path(self.environment["TRAINYARD_HOME"])

    def command(self, *argv: str, cwd: Path | None = None, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(BIN / argv[0]), *argv[1:]],
            cwd=cwd or self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def spawn(self, *argv: str, log: str, cwd: Path | None = None) -> subprocess.Popen[bytes]:
        with (self.folder / log).open("ab") as output:
            return subprocess.Popen(
                [str(BIN / argv[0]), *argv[1:]],
                cwd=cwd or self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            f"{self.environment['PREFECT_API_URL']}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        for patience in (0.5, 1.0, 2.0, 4.0):
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as exc:
                # SQLite under load: the server asks to come again.
                if exc.code != 503:
                    raise
            time.sleep(patience)
        raise AssertionError(f"the server stays busy: {path}")

    def healthy(self) -> bool:
        with suppress(OSError):
            return self.api("/health") is True
        return False

    def start_worker(self) -> subprocess.Popen[bytes]:
        worker = self.spawn("prefect", "worker", "start", "--pool", POOL, "--name", f"worker-{len(self.workers)}", log="worker.log")
        self.workers.append(worker)
        return worker

    def start_run(self, **parameters: Any) -> str:
        """A run of the deployment, as the UI's form and its "copy to new run" make it. Returns the flow run's id."""
        deployment = self.api("/deployments/name/train/local")
        return self.api(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})["id"]

    def flow_run(self, flow_run_id: str) -> dict[str, Any]:
        return self.api(f"/flow_runs/{flow_run_id}")

    def wait_final(self, flow_run_id: str, seconds: float = 240) -> dict[str, Any]:
        final = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
        wait_for(f"flow run {flow_run_id} is over", lambda: self.flow_run(flow_run_id)["state_type"] in final, seconds, 0.5)
        return self.flow_run(flow_run_id)

    def flow_process(self, flow_run_id: str) -> psutil.Process | None:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                if environment.get("PREFECT__FLOW_RUN_ID") == flow_run_id and "TRAINYARD_SUPERVISOR_PID" not in environment:
                    command = " ".join(process.cmdline())
                    if "prefect" in command and "-m trainer" not in command:
                        return process
        return None

    def run_file(self, run_id: str, name: str) -> Path:
        return self.home / "runs" / run_id / name


@contextmanager
def running_stack(folder: Path, **settings: str) -> Iterator[Stack]:
    """A server with the deployment; workers are started by whoever wants them, and stopped here. `settings` are Prefect's."""
    # A shell's background jobs start with SIGINT ignored, and would hand that on to every process started here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "PREFECT_HOME": str(folder / "prefect"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DO_NOT_TRACK": "1",
        "TRAINYARD_HOME": str(folder / "home with space"),
        **settings,
    }
    made = Stack(folder, environment)
    server = made.spawn("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), log="server.log")
    try:
        wait_for("the Prefect server answers", made.healthy, 180)
        created = made.command("prefect", "work-pool", "create", POOL, "--type", "process")
        assert created.returncode == 0, created.stdout + created.stderr
        deployed = made.command("prefect", "--no-prompt", "deploy", "--all", cwd=REPOSITORY)
        assert deployed.returncode == 0, deployed.stdout + deployed.stderr
        # Tests look for themselves at what nobody takes up; those of `reconcile` start it, whose schedule is the only one.
        paused = made.command("prefect", "deployment", "schedule", "pause", "--all")
        assert paused.returncode == 0, paused.stdout + paused.stderr
        [schedule] = made.api("/deployments/name/reconcile/local")["schedules"]
        assert schedule["active"] is False
        yield made
    finally:
        for process in [*made.workers, server]:
            stop(process)
