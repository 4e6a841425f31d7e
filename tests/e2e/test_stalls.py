"""A training that hangs is noticed by its steps within the profile's limit, and what the profile says happens."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.stack import Stack, stop, wait_for

pytestmark = pytest.mark.e2e

CONFIG: dict[str, Any] = {"model": "yolo11-pico", "epochs": 60, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}
LIMIT_SECONDS = 8.0
SAVE_PROFILE = """
import sys
from blocks.profiles import LocalProfile
LocalProfile.register_type_and_schema()
LocalProfile(slots=1, stall_factor=5, stall_min_seconds=float(sys.argv[2]), on_stall=sys.argv[3]).save(sys.argv[1], overwrite=True)
"""


def save_profile(stack: Stack, name: str, on_stall: str) -> None:
    command = [sys.executable, "-c", SAVE_PROFILE, name, str(LIMIT_SECONDS), on_stall]
    subprocess.run(command, env=stack.environment, cwd=Path(__file__).parents[2], check=True, timeout=120)


@contextmanager
def training(stack: Stack, shapes: Path, profile: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A training in its third epoch or later, whose pace is known; nothing of it is left behind, however it hangs."""
    options = [part for name, value in CONFIG.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    before = set(stack.home.glob("runs/*"))
    command = stack.spawn("trainyard", "train", str(shapes), *options, "--profile", profile, "--name", profile, log=f"{profile}.log")
    try:
        [folder] = wait_for("the run's folder", lambda: set(stack.home.glob("runs/*")) - before, 120)
        wait_for("the second epoch's end", lambda: epochs(folder, 1)[1:], 120)
        yield command, folder
    finally:
        stop(command)
        for process in [process for folder in set(stack.home.glob("runs/*")) - before for process in processes(folder)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def processes(folder: Path) -> list[psutil.Process]:
    """The run's supervisor and its fit."""
    return [process for process in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(process.info["cmdline"] or [])]


def epochs(folder: Path, attempt: int) -> list[int]:
    path = folder / f"attempts/{attempt}/progress.jsonl"
    return [json.loads(line)["epoch"] for line in path.read_text().splitlines()] if path.exists() else []


def suspend(folder: Path, module: str) -> psutil.Process:
    """Stops (SIGSTOP) the run's process that runs `module`: `trainer.task` is the fit, `trainer` its supervisor."""
    [process] = [process for process in processes(folder) if module in process.cmdline()]
    process.send_signal(signal.SIGSTOP)
    return process


def told(folder: Path) -> list[tuple[str, int]]:
    texts = [json.loads(path.read_text()) for path in sorted((folder / "events").iterdir())]
    return [(text["kind"], text["data"]["attempt"]) for text in texts if "cause" in text["data"]]


@pytest.mark.full
def test_a_hanging_training_is_told_of_and_goes_on(stack: Stack, shapes: Path) -> None:
    save_profile(stack, "stall-warn", "warn")
    with training(stack, shapes, "stall-warn") as (command, folder):
        fit = suspend(folder, "trainer.task")
        wait_for("the stall is told", lambda: ("stalled", 1) in told(folder), 3 * LIMIT_SECONDS + 20)
        fit.send_signal(signal.SIGCONT)
        assert command.wait(240) == 0, (stack.folder / "stall-warn.log").read_text()
    assert told(folder) == [("stalled", 1), ("recovered", 1)]
    assert epochs(folder, 1) == list(range(1, CONFIG["epochs"] + 1))


def test_a_hanging_training_is_restarted_and_resumes(stack: Stack, shapes: Path) -> None:
    """The fit and its supervisor hang, as on a machine that is suspended."""
    save_profile(stack, "stall-restart", "restart")
    with training(stack, shapes, "stall-restart") as (command, folder):
        suspend(folder, "trainer.task")
        suspend(folder, "trainer")
        wait_for("the stall is told", lambda: ("stalled", 1) in told(folder), 3 * LIMIT_SECONDS + 20)
        assert command.wait(300) == 0, (stack.folder / "stall-restart.log").read_text()
    assert told(folder)[:2] == [("stalled", 1), ("stall-restart", 1)]
    outcomes = [json.loads((folder / f"attempts/{number}/outcome.json").read_text()) for number in (1, 2)]
    assert [outcome["state"] for outcome in outcomes] == ["failed", "succeeded"]
    assert outcomes[0]["reason"] == "infrastructure"
    first, second = epochs(folder, 1), epochs(folder, 2)
    # An epoch whose checkpoint was saved, but whose line was not, is not trained again.
    assert second[0] - first[-1] in (1, 2)
    assert second == list(range(second[0], CONFIG["epochs"] + 1))
    assert not (folder / "cancel.json").exists()


@pytest.mark.full
def test_a_hanging_training_is_stopped_with_a_receipt(stack: Stack, shapes: Path) -> None:
    save_profile(stack, "stall-stop", "stop")
    with training(stack, shapes, "stall-stop") as (command, folder):
        suspend(folder, "trainer.task")
        assert command.wait(120) != 0
    receipt = json.loads((folder / "attempts/1/receipt.json").read_text())
    assert receipt["asked_by"] == "stall policy"
    assert "the limit is" in receipt["why"]
    assert not (folder / "attempts/2").exists()
