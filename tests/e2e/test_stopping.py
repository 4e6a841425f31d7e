"""A run is stopped from the command line, the API and past a dead flow: its processes are gone in time, and there is a receipt."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from blocks.naming import run_id_of_flow_run
from tests.e2e.test_lives_of_a_run import LONG, wait_until_training
from tests.stack import Stack, stop, wait_for

pytestmark = pytest.mark.e2e

ENDLESS: dict[str, Any] = LONG | {"epochs": 5000}
LOOK = """
import time
from flows.reconcile import reconcile_pass
while True:
    print(*reconcile_pass(), sep="\\n", flush=True)
    time.sleep(10)
"""


def training(run_id: str) -> list[psutil.Process]:
    """Supervisor, fit and whatever they started."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if run_id in command and "-m trainer" in command:
            found.append(process)
    return found


def start_training(stack: Stack, shapes: Path) -> tuple[str, str]:
    flow_run_id = stack.start_run(dataset=str(shapes), config=ENDLESS)
    run_id = run_id_of_flow_run(flow_run_id)
    wait_until_training(stack, run_id)
    return flow_run_id, run_id


def receipt_of(stack: Stack, run_id: str) -> dict[str, Any]:
    outcome = json.loads(stack.run_file(run_id, "attempts/1/outcome.json").read_text())
    assert outcome["state"] == "cancelled"
    assert outcome["result"]["outcome"] == "partial"
    return json.loads(stack.run_file(run_id, "attempts/1/receipt.json").read_text())


def gone_within(run_id: str, seconds: float, since: float) -> None:
    wait_for("the processes of the training are gone", lambda: not training(run_id), seconds - (time.monotonic() - since))


@pytest.fixture
def reconciler(stack: Stack) -> Iterator[None]:
    """What `trainyard up` does every ten seconds."""
    with (stack.folder / "reconcile.log").open("ab") as output:
        process = subprocess.Popen([sys.executable, "-c", LOOK], cwd=stack.folder, env=stack.environment, stdout=output, stderr=output)
    yield
    stop(process)


@pytest.mark.usefixtures("worker")
def test_command_line_with_the_flow_alive(stack: Stack, shapes: Path) -> None:
    flow_run_id, run_id = start_training(stack, shapes)
    began = time.monotonic()
    asked = stack.command("trainyard", "cancel", run_id, "--why", "wrong learning rate")
    assert asked.returncode == 0, asked.stderr
    gone_within(run_id, 15, began)
    receipt = receipt_of(stack, run_id)
    assert receipt["why"] == "wrong learning rate"
    assert "@" in receipt["asked_by"]
    assert receipt["ended_at"] >= receipt["asked_at"]
    assert stack.wait_final(flow_run_id, 60)["state_type"] == "CANCELLED"


@pytest.mark.usefixtures("worker")
def test_api_with_the_flow_alive(stack: Stack, shapes: Path) -> None:
    """As the UI's Cancel button does it."""
    flow_run_id, run_id = start_training(stack, shapes)
    began = time.monotonic()
    stack.api(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING"}})
    gone_within(run_id, 15, began)
    assert stack.wait_final(flow_run_id, 60)["state_type"] == "CANCELLED"
    assert "Prefect" in receipt_of(stack, run_id)["asked_by"]


@pytest.mark.usefixtures("reconciler")
def test_dead_flow(stack: Stack, shapes: Path, worker: subprocess.Popen[bytes]) -> None:
    """Flow and worker are killed, so that nobody tells Prefect; then one run is stopped in the UI, as it is still shown as running."""
    flow_run_id, run_id = start_training(stack, shapes)
    process = stack.flow_process(flow_run_id)
    assert process is not None
    began = time.monotonic()
    stop(worker)
    if process.is_running():
        process.kill()
    assert stack.flow_run(flow_run_id)["state_type"] == "RUNNING"
    stack.api(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING"}})
    gone_within(run_id, 90, began)
    assert stack.wait_final(flow_run_id, 90)["state_type"] == "CANCELLED"
    assert "Prefect" in receipt_of(stack, run_id)["asked_by"]


def test_command_line_with_the_flow_dead_and_the_trainer_suspended(stack: Stack, shapes: Path) -> None:
    """The worst of a laptop: command line killed, supervisor and training suspended. A stop still ends in time."""
    options = [part for name, value in ENDLESS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    before = set((stack.home / "runs").iterdir()) if (stack.home / "runs").exists() else set()
    command = stack.spawn("trainyard", "train", str(shapes), *options, "--name", "to-be-suspended", log="suspended.log")
    [folder] = wait_for("the run's folder", lambda: set((stack.home / "runs").iterdir()) - before, 120)
    wait_until_training(stack, folder.name)
    stop(command)
    for process in training(folder.name):
        process.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    asked = stack.command("trainyard", "cancel", folder.name)
    assert asked.returncode == 0, asked.stderr
    gone_within(folder.name, 15, began)
    assert "@" in receipt_of(stack, folder.name)["asked_by"]
