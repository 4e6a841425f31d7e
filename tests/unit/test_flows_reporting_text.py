from __future__ import annotations

from typing import Any

import pytest

from blocks.job import JobState, JobStatus, Result
from blocks.record import RunFile
from flows.reporting_text import build_report, describe_status, format_seconds
from trainer.contract import Phase, Progress


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (75, "1m15s"), (3600, "1h00m"), (90_061, "25h01m")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_status_in_one_line() -> None:
    progress = Progress(
        attempt=1, phase=Phase.TRAINING, epoch=3, epochs=20, metrics={"map50": 0.4321}, images_per_second=14.2, eta_seconds=75
    )
    line = describe_status(JobStatus(state=JobState.RUNNING, progress=progress, message="all is well"))
    assert line == "running, epoch 3/20, val mAP50 0.432, 14 images/s, ETA 1m15s, all is well"


def test_report_tells_the_verdict_first_and_knows_classes_without_figures() -> None:
    run = RunFile(run_id="abcd", name="bccd-yolo11n", request={}, request_hash="", provider="local", settings={}, owner="me")
    result = Result(
        outcome="complete",
        model_uri="file:///m",
        manifest_uri="file:///x",
        metrics={"map50": 0.69, "map50_95": 0.4, "precision": 0.7, "recall": 0.6},
        metrics_split="test",
        files={},
        best_epoch=3,
        epochs=4,
        duration_seconds=60,
    )
    row: dict[str, Any] = {"name": "rare", "instances": 0, **dict.fromkeys(("precision", "recall", "map50", "map50_95"))}
    lines = build_report(run, result, None, {"classes": [row]}).splitlines()
    assert lines[2].startswith("**mAP50 0.690** on the test split")
    assert "| rare | 0 | - | - | - | - |" in lines
    assert "unknown" in "".join(lines), "no price, so no cost"
