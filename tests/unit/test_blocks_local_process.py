"""Golden plans and the pure parts of the local provider."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from blocks.job import FailureReason, JobSpec, JobState
from blocks.providers.local_process import LocalProvider, LocalSettings, launch, parse_status
from trainer.contract import DatasetRef, ExitRecord, JobFile, Phase, Progress, TrainConfig, utc_now

GOLDEN = Path(__file__).parents[1] / "golden" / "local"
CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "tuned": {"epochs": 20, "image_size": 320, "batch_size": 8, "learning_rate": 0.002, "model_params": {"lrf": 0.05, "mosaic": 0.5}},
}


def make_spec(config: dict[str, Any], attempt: int = 1) -> JobSpec:
    return JobSpec(
        run_id="goldenrun123",
        attempt=attempt,
        name="bccd-yolo11n",
        config=TrainConfig.model_validate(config),
        dataset=DatasetRef(
            root="/data/bccd", index_uri="file:///runs/goldenrun123/dataset.json", version="ab" * 32, name="bccd", image_count=364
        ),
        output_uri="file:///runs",
        max_runtime_seconds=3600,
        owner="tester",
    )


@pytest.mark.parametrize("case", sorted(CASES))
def test_golden_request(case: str) -> None:
    provider = LocalProvider(LocalSettings(home=Path("/home/tester/trainyard"), python="python"))
    request = provider.plan(make_spec(CASES[case])).request
    text = json.dumps(request, indent=1, sort_keys=True) + "\n"
    path = GOLDEN / f"{case}.json"
    assert path.exists(), f"review and save as {path.name}:\n{text}"
    assert text == path.read_text()


def native(**changes: Any) -> dict[str, Any]:
    job = JobFile(run_id="r", attempt=1, fingerprint="f", host="h", pid=1, pid_created_at=0.0)
    return {"job": job.model_dump(mode="json"), "alive": True, "exit": None, "progress": None, "stopping": False, **changes}


def ended(**fields: Any) -> dict[str, Any]:
    return ExitRecord(started_at=utc_now(), **fields).model_dump(mode="json")


def at(phase: Phase) -> dict[str, Any]:
    return Progress(attempt=1, phase=phase, epochs=3).model_dump(mode="json")


@pytest.mark.parametrize(
    ("found", "state", "reason"),
    [
        (native(), JobState.STARTING, None),
        (native(progress=at(Phase.QUEUED)), JobState.QUEUED, None),
        (native(progress=at(Phase.TRAINING)), JobState.RUNNING, None),
        (native(progress=at(Phase.TRAINING), stopping=True), JobState.STOPPING, None),
        (native(alive=False), JobState.FAILED, FailureReason.INFRASTRUCTURE),
        (native(alive=False, exit=ended(exit_code=0)), JobState.SUCCEEDED, None),
        (native(alive=True, exit=ended(exit_code=0)), JobState.SUCCEEDED, None),
        (native(alive=False, exit=ended(exit_code=75, cancelled=True)), JobState.CANCELLED, None),
        (native(alive=False, exit=ended(exit_code=65, reason=FailureReason.DATA)), JobState.FAILED, FailureReason.DATA),
    ],
)
def test_states(found: dict[str, Any], state: JobState, reason: FailureReason | None) -> None:
    status = parse_status(found)
    assert (status.state, status.reason) == (state, reason)
    assert status.message or status.state not in (JobState.FAILED,) or status.exit_code


def test_a_training_gets_nothing_of_the_flows_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_KEY", "made-up-77f0")
    monkeypatch.setenv("TRAINYARD_SEEN", "yes")
    assert launch([sys.executable, "-c", "import os; print(dict(os.environ))"], tmp_path) == ""
    [said] = (path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "TRAINYARD_SEEN" in said
    assert "PREFECT" not in said
