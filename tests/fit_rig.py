"""Attempts small enough to be trained inside a test: 16 images of shapes, 64 px, a pico model on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer.contract import AttemptLayout, DatasetRef, SplitConfig, TrainConfig, TrainJob
from trainer.dataset import check_dataset
from trainer.progress import read_lines
from trainer.shapes import write_shapes

TINY: dict[str, Any] = {
    "model": "yolo11-pico",
    "epochs": 2,
    "batch_size": 8,
    "image_size": 64,
    "learning_rate": 0.005,
    "device": "cpu",
    "workers": 0,
    # Every batch a step, so that two batches an epoch leave an optimizer state to compare.
    "model_params": {"nbs": 8, "close_mosaic": 0},
}


def make_dataset(folder: Path, *, train: int = 16, val: int = 6, test: int = 6) -> Path:
    return write_shapes(folder, train=train, val=val, test=test, size=64)


def make_attempt(
    base: Path, number: int = 1, *, data: Path | None = None, split: SplitConfig | None = None, **config: Any
) -> AttemptLayout:
    """``<base>/run/attempts/<number>`` with its config.json, and the dataset and its index in `base`."""
    index_path = base / "index.json"
    base.mkdir(parents=True, exist_ok=True)
    if not index_path.exists():
        index = check_dataset(data or make_dataset(base / "data"), split=split or SplitConfig.model_validate({}))
        index_path.write_text(index.model_dump_json())
    else:
        from trainer.dataset import DatasetIndex

        index = DatasetIndex.model_validate_json(index_path.read_bytes())
    reference = DatasetRef(
        root=index.root, index_uri=index_path.as_uri(), version=index.version, name="shapes", image_count=len(index.images)
    )
    job = TrainJob(run_id="run", attempt=number, name="t", config=TrainConfig.model_validate({**TINY, **config}), dataset=reference)
    layout = AttemptLayout(base / "run" / "attempts" / str(number))
    layout.folder.mkdir(parents=True)
    (layout / AttemptLayout.CONFIG).write_text(job.model_dump_json())
    return layout


def start_fit(layout: AttemptLayout, **environment: str) -> subprocess.Popen[bytes]:
    """The fit as a process of its own, its output in the attempt's log."""
    log = layout / AttemptLayout.LOG
    log.parent.mkdir(exist_ok=True)
    root = Path(__file__).parents[1]
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "trainer.task", "--attempt-dir", str(layout.folder)],
            cwd=root,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"the fit ended early with {process.returncode}"
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def epochs_of(layout: AttemptLayout) -> list[int]:
    return [line.epoch for line in read_lines(layout / AttemptLayout.PROGRESS_LINES)]
