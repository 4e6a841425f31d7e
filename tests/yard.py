"""`trainyard up` of its own with a webhook, whose processes can be killed at exact moments of a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.crash import CrashPlan
from tests.serving import in_thread
from tests.stack import BIN, Stack, free_port, wait_for

CONFIG: dict[str, Any] = {"model": "yolo11-pico", "epochs": 30, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}


@dataclass
class Yard(Stack):
    """`trainyard up`, with a plan for crashes in its children's environment."""

    crash: CrashPlan = field(default_factory=lambda: CrashPlan(Path()))
    messages: list[str] = field(default_factory=list)
    webhook: str = ""

    def up(self) -> subprocess.Popen[bytes]:
        port = self.environment["PREFECT_API_URL"].rsplit(":", 1)[1].split("/")[0]
        environment = {name: value for name, value in self.environment.items() if name != "PREFECT_API_URL"}
        with (self.folder / "up.log").open("ab") as output:
            return subprocess.Popen(
                [str(BIN / "trainyard"), "up", "--port", port, "--notify", self.webhook],
                cwd=self.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def plan_crash(self, moment: str, victims: tuple[str, ...]) -> None:
        self.crash.write(moment, victims)

    def fired(self) -> bool:
        return self.crash.fired()

    def start(self, **parameters: Any) -> str:
        """The flow run; empty where the server is down."""
        with suppress(OSError, AssertionError):
            return self.start_run(**parameters)
        return ""

    def told(self, run_id: str, event: str) -> int:
        """Messages about the run whose subject has the word."""
        return sum(f"run: {run_id}" in message and event in json.loads(message)["subject"] for message in self.messages)

    def state(self, flow_run_id: str) -> str:
        """Empty where the server is down."""
        with suppress(OSError, AssertionError):
            return self.flow_run(flow_run_id)["state_type"]
        return ""


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    folder = tmp_path_factory.mktemp("yard")
    plan = CrashPlan(folder / "crash.json")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "HOME": str(folder),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "TRAINYARD_HOME": str(folder / "home"),
        **plan.environment,
    }
    signal.signal(signal.SIGINT, signal.default_int_handler)
    made = Yard(folder, environment, crash=plan)
    with receiving(made.messages) as made.webhook:
        up = made.up()
        try:
            wait_for("`trainyard up` is up", lambda: up.poll() is None and "worker" in (folder / "up.log").read_text(), 240)
            yield made
        finally:
            up.send_signal(signal.SIGTERM)
            up.wait(60)


@contextmanager
def receiving(messages: list[str]) -> Iterator[str]:
    """A webhook on loopback; yields its address."""

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            messages.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    with in_thread(ThreadingHTTPServer(("127.0.0.1", 0), Receiver)) as address:
        yield f"{address}/hook"


@pytest.fixture(scope="module")
def yard_shapes(yard: Yard) -> Path:
    from trainer.shapes import write_shapes

    return write_shapes(yard.folder / "shapes", train=8, val=4, test=4, size=64)
