"""Processes are killed before, during and after each step of a run, under `trainyard up`, and nobody lifts a finger.

Each case asserts one model from one live job, at most one epoch trained twice, and the true final state in
Prefect within two minutes of the kill (the training's own time not counted). The whole matrix:

    pytest -m full tests/e2e/test_crash_matrix.py -s

prints its table; a plain run takes a sample: the flow after its staging and in the middle of `submit`, the server, the
trainer, and an old trainer that lives on.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from blocks.naming import run_id_of_flow_run
from tests.crash import sitecustomize as crash
from tests.stack import wait_for
from tests.yard import CONFIG, Yard

pytestmark = pytest.mark.e2e

FINAL_SECONDS = 120.0

FLOW = [(f"{when} {step}", ("flow",)) for step in crash.STEPS if step != "mark" for when in ("before", "after")]  # mark: test_told_once.py
FLOW_AND_WORKER = [(moment, ("worker", "flow")) for moment in ("after check", "after plan", "after launch", "after poll", "before outcome")]
SERVER = [(moment, ("server",)) for moment in ("after dataset", "before submit", "after poll", "before collect", "before report")]
TRAINER = [("after poll", ("fit",)), ("after poll", ("supervisor",)), ("after poll", ("supervisor", "fit")), ("after poll", ("lock",))]
ALL = [("after poll", ("server", "worker", "flow")), ("after poll", ("server", "worker", "supervisor", "fit", "flow"))]
MATRIX = [*FLOW, *FLOW_AND_WORKER, *SERVER, *TRAINER, *ALL]
SAMPLE = [
    ("after stage", ("flow",)),
    ("after launch", ("flow",)),
    ("before collect", ("server",)),
    *TRAINER[2:],
]  # worker and flow: test_reconcile.py


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


def run_case(yard: Yard, yard_shapes: Path, moment: str, victims: tuple[str, ...]) -> Row:
    yard.plan_crash(moment, victims)
    asked = {"dataset": str(yard_shapes), "config": CONFIG, "stage": "stage" in moment}
    flow_run_id = wait_for("a run is started", lambda: yard.start(**asked), 120)
    run_id = run_id_of_flow_run(flow_run_id)
    wait_for(f"{victims} are killed {moment}", yard.fired, 120)
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
    wait_for("the message that it finished", lambda: yard.told(run_id, "finished"), 60)
    assert yard.told(run_id, "finished") == 1
    own = seconds_training(attempts[-1])
    assert seconds - own <= FINAL_SECONDS
    return Row(moment, victims, outcomes, repeated, seconds)


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


def seconds_training(attempt: Path) -> float:
    return sum(json.loads((attempt / "exit.json").read_text())["phase_seconds"].values())


@pytest.mark.parametrize(("moment", "victims"), SAMPLE)
def test_sample_of_crashes(yard: Yard, yard_shapes: Path, moment: str, victims: tuple[str, ...]) -> None:
    print(f"\n{HEADER}\n{run_case(yard, yard_shapes, moment, victims)}")


@pytest.mark.full
def test_all_crashes(yard: Yard, yard_shapes: Path) -> None:
    print(f"\n{HEADER}")
    failures: list[str] = []
    for moment, victims in MATRIX:
        try:
            print(run_case(yard, yard_shapes, moment, victims), flush=True)
        except AssertionError as exc:
            failures.append(f"{moment} {victims}: {exc}")
            print(f"{moment:16} {'+'.join(victims):36} FAILED {exc}", flush=True)
    assert not failures, "\n".join(failures)
