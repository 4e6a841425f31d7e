"""Processes are killed before, during and after each step of a run, under `trainyard up`, and nobody lifts a finger.

Each case asserts one model from one live job, at most one epoch trained twice, and the true final state in
Prefect within two minutes of the kill (the training's own time not counted). The whole matrix:

    pytest -m full tests/e2e/test_crash_matrix.py -s

prints its table; a plain run takes a sample: the flow in the middle of `submit`, the server, the trainer, and an old
trainer that lives on.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from blocks.naming import run_id_of_flow_run
from tests.crash import sitecustomize as crash
from tests.stack import BIN, Stack, free_port, wait_for

pytestmark = pytest.mark.e2e

CONFIG: dict[str, Any] = {"model": "yolo11-pico", "epochs": 30, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}
FINAL_SECONDS = 120.0

FLOW = [(f"{when} {step}", ("flow",)) for step in crash.STEPS for when in ("before", "after")]
FLOW_AND_WORKER = [(moment, ("worker", "flow")) for moment in ("after check", "after plan", "after launch", "after poll", "before outcome")]
SERVER = [(moment, ("server",)) for moment in ("after dataset", "before submit", "after poll", "before collect", "before report")]
TRAINER = [("after poll", ("fit",)), ("after poll", ("supervisor",)), ("after poll", ("supervisor", "fit")), ("after poll", ("lock",))]
ALL = [("after poll", ("server", "worker", "flow")), ("after poll", ("server", "worker", "supervisor", "fit", "flow"))]
MATRIX = [*FLOW, *FLOW_AND_WORKER, *SERVER, *TRAINER, *ALL]
SAMPLE = [("after launch", ("flow",)), ("before collect", ("server",)), *TRAINER[2:]]  # worker and flow: test_reconcile.py


@dataclass
class Yard(Stack):
    """`trainyard up`, with a plan for crashes in its children's environment."""

    plan: Path = field(default_factory=Path)
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

    def state(self, flow_run_id: str) -> str:
        """Empty where the server is down."""
        with suppress(OSError, AssertionError):
            return self.flow_run(flow_run_id)["state_type"]
        return ""


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Yard]:
    folder = tmp_path_factory.mktemp("yard")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")} | {
        "HOME": str(folder),
        "PREFECT_API_URL": f"http://127.0.0.1:{free_port()}/api",
        "TRAINYARD_HOME": str(folder / "home"),
        "PYTHONPATH": str(Path(crash.__file__).parent),
        "TRAINYARD_CRASH_PLAN": str(folder / "crash.json"),
    }
    signal.signal(signal.SIGINT, signal.default_int_handler)
    made = Yard(folder, environment, plan=folder / "crash.json")
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

    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def dataset(yard: Yard) -> Path:
    from trainer.shapes import write_shapes

    return write_shapes(yard.folder / "shapes", train=8, val=4, test=4, size=64)


@dataclass(frozen=True)
class Row:
    moment: str
    victims: tuple[str, ...]
    attempts: list[str]
    repeated_epochs: int
    seconds: float

    def __str__(self) -> str:
        killed = "+".join(self.victims)
        return f"{self.moment:16} {killed:36} {' '.join(self.attempts):24} {self.repeated_epochs:3} {self.seconds:7.1f}"


HEADER = f"{'moment':16} {'killed':36} {'attempts':24} {'rep':>3} {'s to end':>7}"


def run_case(yard: Yard, dataset: Path, moment: str, victims: tuple[str, ...]) -> Row:
    yard.plan.with_suffix(".fired").unlink(missing_ok=True)
    yard.plan.write_text(json.dumps({"moment": moment, "victims": victims}))
    flow_run_id = wait_for("a run is started", lambda: start(yard, dataset), 120)
    run_id = run_id_of_flow_run(flow_run_id)
    wait_for(f"{victims} are killed {moment}", yard.plan.with_suffix(".fired").exists, 120)
    killed_at = time.monotonic()
    wait_for("the run is over in Prefect", lambda: yard.state(flow_run_id) == "COMPLETED", FINAL_SECONDS + 60, 0.5)
    seconds = time.monotonic() - killed_at
    attempts = sorted((yard.home / "runs" / run_id / "attempts").iterdir())
    outcomes = [json.loads((attempt / "outcome.json").read_text())["state"] for attempt in attempts]
    assert outcomes.count("succeeded") == 1
    assert outcomes[-1] == "succeeded"
    assert len(attempts) == (2 if {"fit", "supervisor", "lock"} & set(victims) else 1)
    assert (attempts[-1] / "model/model.pt").stat().st_size > 10_000
    assert not (attempts[0] / "manifest.json").exists() or len(attempts) == 1
    wait_for("nothing of the run is left running", lambda: not processes_of(run_id), 30)
    epochs = [epochs_of(attempt) for attempt in attempts]
    assert sorted({epoch for lines in epochs for epoch in lines}) == list(range(1, CONFIG["epochs"] + 1))
    # An old trainer that lives on trains in vain, beside the one that counts; it is not what was lost.
    repeated = 0 if "lock" in victims else sum(map(len, epochs)) - CONFIG["epochs"]
    assert repeated <= 1
    wait_for("the message that it finished", lambda: told(yard, run_id), 60)
    assert told(yard, run_id) == 1
    own = seconds_training(attempts[-1])
    assert seconds - own <= FINAL_SECONDS
    return Row(moment, victims, outcomes, repeated, seconds)


def start(yard: Yard, dataset: Path) -> str:
    with suppress(OSError, AssertionError):
        return yard.start_run(dataset=str(dataset), config=CONFIG)
    return ""


def processes_of(run_id: str) -> list[str]:
    found: list[str] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if run_id in command and "-m trainer" in command:
                found.append(command)
    return found


def epochs_of(attempt: Path) -> list[int]:
    """Epochs that the attempt finished; none where an earlier one had trained them all, and it only wrote the result."""
    lines = attempt / "progress.jsonl"
    return [json.loads(line)["epoch"] for line in lines.read_text().splitlines()] if lines.exists() else []


def told(yard: Yard, run_id: str) -> int:
    return sum(f"run: {run_id}" in message and "finished" in message for message in yard.messages)


def seconds_training(attempt: Path) -> float:
    return sum(json.loads((attempt / "exit.json").read_text())["phase_seconds"].values())


@pytest.mark.parametrize(("moment", "victims"), SAMPLE)
def test_sample_of_crashes(yard: Yard, dataset: Path, moment: str, victims: tuple[str, ...]) -> None:
    print(f"\n{HEADER}\n{run_case(yard, dataset, moment, victims)}")


@pytest.mark.full
def test_all_crashes(yard: Yard, dataset: Path) -> None:
    print(f"\n{HEADER}")
    failures: list[str] = []
    for moment, victims in MATRIX:
        try:
            print(run_case(yard, dataset, moment, victims), flush=True)
        except AssertionError as exc:
            failures.append(f"{moment} {victims}: {exc}")
            print(f"{moment:16} {'+'.join(victims):36} FAILED {exc}", flush=True)
    assert not failures, "\n".join(failures)
