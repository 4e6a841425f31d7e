"""A run through a real Prefect server and worker: it ends well, it fails readably, and it survives its flow."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pytest

from blocks.naming import run_id_of_flow_run
from tests.stack import BIN, Stack, stop, wait_for

pytestmark = pytest.mark.e2e

CONFIG: dict[str, Any] = {"model": "yolo11-pico", "epochs": 1, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}
LONG = CONFIG | {"epochs": 80}  # some 20 s: it still trains when it is killed


def one_attempt_with_a_model(stack: Stack, run_id: str) -> dict[str, Any]:
    attempts = sorted(path.name for path in stack.run_file(run_id, "attempts").iterdir())
    assert attempts == ["1"]
    outcome = json.loads(stack.run_file(run_id, "attempts/1/outcome.json").read_text())
    assert outcome["state"] == "succeeded"
    assert stack.run_file(run_id, "attempts/1/model/model.pt").stat().st_size > 10_000
    return outcome


def epochs_trained(stack: Stack, run_id: str) -> list[int]:
    lines = stack.run_file(run_id, "attempts/1/progress.jsonl").read_text().splitlines()
    return [json.loads(line)["epoch"] for line in lines]


def wait_until_training(stack: Stack, run_id: str) -> None:
    wait_for("the second epoch", stack.run_file(run_id, "attempts/1/progress.jsonl").exists, 120)


@pytest.mark.usefixtures("worker")
def test_command_line_of_prefect_succeeds_and_fails(stack: Stack, shapes: Path, tmp_path: Path) -> None:
    """`prefect deployment run train/local --watch`, from any folder: 0 on success, 1 on a broken dataset with a readable reason."""
    arguments = ("deployment", "run", "train/local", "--param", f"config={json.dumps(CONFIG)}", "--watch")
    good = stack.command("prefect", *arguments, "--param", f"dataset={shapes}", cwd=tmp_path)
    assert good.returncode == 0, good.stdout + good.stderr

    broken = tmp_path / "broken"
    shutil.copytree(shapes, broken)
    for image in sorted(broken.rglob("*.jpg"))[:4] or sorted(broken.rglob("*.png"))[:4]:
        image.write_bytes(image.read_bytes()[:40])
    bad = stack.command("prefect", *arguments, "--param", f"dataset={broken}", cwd=tmp_path)
    assert bad.returncode == 1, bad.stdout + bad.stderr
    newest = stack.api("/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})[0]
    assert newest["state_type"] == "FAILED"
    assert "unreadable" in newest["state"]["message"]
    assert "max-problem-share" in newest["state"]["message"]


@pytest.mark.usefixtures("worker")
def test_killed_flow_is_retried_to_the_same_job(stack: Stack, shapes: Path) -> None:
    """(a) The run's process on the worker is killed; `prefect flow-run retry` finds the job, and there is one model."""
    flow_run_id = stack.start_run(dataset=str(shapes), config=LONG)
    run_id = run_id_of_flow_run(flow_run_id)
    wait_until_training(stack, run_id)
    process = stack.flow_process(flow_run_id)
    assert process is not None
    process.kill()
    assert stack.wait_final(flow_run_id)["state_type"] == "CRASHED"

    def retried_and_over() -> bool:
        # Runner and worker may both report the crash, seconds apart; the second report undoes a retry in between.
        state = stack.flow_run(flow_run_id)["state_type"]
        if state == "CRASHED":
            stack.command("prefect", "flow-run", "retry", flow_run_id)
        return state == "COMPLETED"

    wait_for("the retry ends well", retried_and_over, 240, every=8)
    one_attempt_with_a_model(stack, run_id)
    assert epochs_trained(stack, run_id) == list(range(1, LONG["epochs"] + 1))


@pytest.mark.usefixtures("worker")
def test_copy_in_the_ui_is_a_new_run(stack: Stack, shapes: Path) -> None:
    """(c) The same parameters again, as "copy to new run" sends them: another run, another model."""
    first, second = (stack.start_run(dataset=str(shapes), config=CONFIG) for _ in range(2))
    for flow_run_id in (first, second):
        assert stack.wait_final(flow_run_id)["state_type"] == "COMPLETED"
        one_attempt_with_a_model(stack, run_id_of_flow_run(flow_run_id))
    assert run_id_of_flow_run(first) != run_id_of_flow_run(second)


def test_second_worker_without_the_dataset_collects(stack: Stack, shapes: Path, tmp_path: Path, worker: subprocess.Popen[bytes]) -> None:
    """(d) The first worker dies with its flow; the job goes on; a second worker, where the dataset is not, collects its model."""
    dataset = shutil.copytree(shapes, tmp_path / "only here")
    flow_run_id = stack.start_run(dataset=str(dataset), config=CONFIG | {"epochs": 10})
    run_id = run_id_of_flow_run(flow_run_id)
    wait_until_training(stack, run_id)
    process = stack.flow_process(flow_run_id)
    assert process is not None
    stop(worker)
    process.kill()
    wait_for("the job ends by itself", stack.run_file(run_id, "attempts/1/exit.json").exists, 120)
    shutil.rmtree(dataset)
    # Nobody is left to tell the server that the run crashed.
    stack.api(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    stack.start_worker()
    assert stack.command("prefect", "flow-run", "retry", flow_run_id).returncode == 0
    wait_for("the second worker ends the run", lambda: stack.flow_run(flow_run_id)["state_type"] == "COMPLETED", 120)
    one_attempt_with_a_model(stack, run_id)


@pytest.mark.full
def test_killed_command_line_attaches_again(stack: Stack, shapes: Path, tmp_path: Path) -> None:
    """(b) The command line is killed, the same command again: it attaches, and there is one job. From a folder with rooms of its own."""
    for room in ("flows", "blocks", "trainer"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").write_text("raise RuntimeError('imported from the working directory')\n")
    options = [part for name, value in LONG.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    before = set((stack.home / "runs").iterdir()) if (stack.home / "runs").exists() else set()
    with (tmp_path / "first.log").open("wb") as output:
        first = subprocess.Popen(
            [str(BIN / "trainyard"), "train", str(shapes), *options], cwd=tmp_path, env=stack.environment, stdout=output, stderr=output
        )
    try:
        [folder] = wait_for("the run's folder", lambda: set((stack.home / "runs").iterdir()) - before, 120)
        wait_until_training(stack, folder.name)
    finally:
        stop(first)
    again = stack.command("trainyard", "train", str(shapes), *options, "--json", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert f"attaches to the open run {folder.name}" in " ".join(again.stderr.split())
    summary = json.loads(again.stdout)
    assert summary["run_id"] == folder.name
    assert {"run_id", "state", "model_uri", "manifest_uri", "metrics", "cost_usd", "duration_seconds"} <= summary.keys()
    one_attempt_with_a_model(stack, folder.name)
    assert set((stack.home / "runs").iterdir()) - before == {folder}


@pytest.mark.full
def test_killed_trainer_is_replaced_by_an_attempt_that_goes_on(stack: Stack, shapes: Path) -> None:
    """Supervisor and fit are killed while the flow watches: the next attempt resumes, no more than an epoch is lost."""
    options = [part for name, value in LONG.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    before = set((stack.home / "runs").iterdir()) if (stack.home / "runs").exists() else set()
    command = stack.spawn("trainyard", "train", str(shapes), *options, "--name", "to-be-killed", log="killed.log")
    [folder] = wait_for("the run's folder", lambda: set((stack.home / "runs").iterdir()) - before, 120)
    wait_until_training(stack, folder.name)
    for process in [other for other in psutil.process_iter(["cmdline"]) if folder.name in " ".join(other.info["cmdline"] or [])]:
        process.kill()
    assert command.wait(180) == 0, (stack.folder / "killed.log").read_text()
    first, second = (
        [json.loads(line)["epoch"] for line in (folder / f"attempts/{number}/progress.jsonl").read_text().splitlines()] for number in (1, 2)
    )
    assert len(first) <= second[0] <= len(first) + 2
    assert second[-1] == LONG["epochs"]
    outcomes = [json.loads((folder / f"attempts/{number}/outcome.json").read_text())["state"] for number in (1, 2)]
    assert outcomes == ["failed", "succeeded"]


@pytest.mark.usefixtures("worker")
def test_cancelled_in_prefect_stops_the_job(stack: Stack, shapes: Path) -> None:
    flow_run_id = stack.start_run(dataset=str(shapes), config=LONG | {"epochs": 5000})
    run_id = run_id_of_flow_run(flow_run_id)
    wait_until_training(stack, run_id)
    stack.api(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING"}})
    record = wait_for(
        "the job ended",
        lambda: stack.run_file(run_id, "attempts/1/exit.json").exists() and stack.run_file(run_id, "attempts/1/exit.json"),
        60,
    )
    assert json.loads(record.read_text())["cancelled"]
    assert stack.wait_final(flow_run_id)["state_type"] == "CANCELLED"
