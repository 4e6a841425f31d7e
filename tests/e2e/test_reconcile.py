"""What a killed flow, worker or command line leaves behind is taken up again, without anybody asking."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from blocks.naming import run_id_of_flow_run
from tests.e2e.test_lives_of_a_run import LONG, one_attempt_with_a_model, wait_until_training
from tests.e2e.test_stopping import reconciler
from tests.stack import Stack, stop, wait_for

__all__ = ["reconciler"]  # the fixture

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("reconciler")]


def test_flow_and_worker_killed(stack: Stack, shapes: Path, worker: subprocess.Popen[bytes]) -> None:
    """Nobody is left to tell Prefect, which shows the run as running; the next worker ends it."""
    flow_run_id = stack.start_run(dataset=str(shapes), config=LONG)
    run_id = run_id_of_flow_run(flow_run_id)
    wait_until_training(stack, run_id)
    process = stack.flow_process(flow_run_id)
    assert process is not None
    stop(worker)
    if process.is_running():
        process.kill()
    stack.start_worker()
    wait_for("the run is completed", lambda: stack.flow_run(flow_run_id)["state_type"] == "COMPLETED", 240)
    one_attempt_with_a_model(stack, run_id)
    assert not stack.run_file(run_id, "drivers").exists()
    restarted = [json.loads(path.read_text()) for path in stack.run_file(run_id, "events").iterdir()]
    assert [event["kind"] for event in restarted].count("restarted") == 1


@pytest.mark.usefixtures("worker")
@pytest.mark.full
def test_command_line_killed(stack: Stack, shapes: Path) -> None:
    """A flow run of the deployment goes on in its place, and the killed one is not shown as running for ever."""
    options = [part for name, value in LONG.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    before = set((stack.home / "runs").glob("*"))
    command = stack.spawn("trainyard", "train", str(shapes), *options, "--name", "left-alone", log="left.log")
    [folder] = wait_for("the run's folder", lambda: set((stack.home / "runs").glob("*")) - before, 120)
    wait_until_training(stack, folder.name)
    [driver] = [json.loads(path.read_text()) for path in (folder / "drivers").iterdir()]
    stop(command)
    wait_for("the run is collected", (folder / "attempts/1/outcome.json").exists, 240)
    wait_for("its driver is gone", lambda: not (folder / "drivers").exists(), 60)
    one_attempt_with_a_model(stack, folder.name)
    assert stack.flow_run(driver["flow_run_id"])["state_type"] == "CRASHED"
