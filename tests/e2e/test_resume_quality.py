"""A training that is killed in the middle and resumed, against the same training left alone.

Same epochs, same learning rates, the first resumed epoch's loss within 10 % of that epoch's in the training left alone, and
the median over three seeds of the difference in mAP50 at most 0.05. A plain run takes one seed and fewer epochs. All of it,
with its table:

    pytest -m full tests/e2e/test_resume_quality.py -s
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fit_rig import make_attempt
from trainer.contract import ENV_HOME, AttemptLayout, Progress, ResultManifest
from trainer.progress import read_lines
from trainer.shapes import write_shapes

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra `train`: uv sync --extra train"),
]

# As `trainyard demo` trains.
CONFIG: dict[str, Any] = {
    "batch_size": 8,
    "image_size": 96,
    "learning_rate": 0.008,
    "optimizer": "AdamW",
    "model_params": {"lrf": 0.05, "warmup_epochs": 0.5, "mosaic": 0.0, "scale": 0.2, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0},
}
LOSS_SHARE = 0.10
MAP_DIFFERENCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Comparison:
    seed: int
    killed_in: int  # epoch, 1-based
    loss_shares: list[float]  # |resumed - whole| / whole, of each epoch after the kill
    map_whole: float
    map_resumed: float
    weights_equal: bool

    @property
    def difference(self) -> float:
        return abs(self.map_whole - self.map_resumed)

    def __str__(self) -> str:
        return (
            f"{self.seed:4}  {self.killed_in:9}  {self.loss_shares[0]:10.2%}  {max(self.loss_shares):10.2%}"
            f"  {self.map_whole:11.4f}  {self.map_resumed:13.4f}  {self.difference:6.4f}  {self.weights_equal}"
        )


HEADER = "seed  killed in  first loss  worst loss  mAP50 whole  mAP50 resumed  differ  same weights"


@pytest.fixture(autouse=True)
def home(tmp_path: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV_HOME, str(tmp_path / "home"))
        yield


def start(layout: AttemptLayout) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "trainer", "--attempt-dir", str(layout.folder)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], env=dict(os.environ), stdout=subprocess.DEVNULL)


def train_whole(layout: AttemptLayout) -> None:
    assert start(layout).wait(1200) == 0, (layout / AttemptLayout.LOG).read_text()[-3000:]


def train_until_killed(layout: AttemptLayout, epoch: int) -> None:
    """Kills supervisor and fit a third into `epoch`, the third or a later one."""
    supervisor = start(layout)
    deadline = time.monotonic() + 1200
    while len(lines := read_lines(layout / AttemptLayout.PROGRESS_LINES)) < epoch - 1:
        assert supervisor.poll() is None, (layout / AttemptLayout.LOG).read_text()[-3000:]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)
    time.sleep((lines[-1].updated_at - lines[-2].updated_at).total_seconds() / 3)
    processes = [psutil.Process(supervisor.pid), *psutil.Process(supervisor.pid).children(recursive=True)]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes[1:], timeout=30)
    supervisor.wait(30)


def training_loss(line: Progress) -> float:
    return sum(value for name, value in line.losses.items() if name.startswith("train/"))


def compare(base: Path, *, seed: int, epochs: int, killed_in: int, data: Path) -> Comparison:
    config = {**CONFIG, "epochs": epochs, "seed": seed}
    whole = make_attempt(base / f"whole-{seed}", data=data, **config)
    train_whole(whole)
    first = make_attempt(base / f"resumed-{seed}", 1, data=data, **config)
    train_until_killed(first, killed_in)
    second = make_attempt(base / f"resumed-{seed}", 2, data=data, **config)
    train_whole(second)
    lines = read_lines(whole / AttemptLayout.PROGRESS_LINES)
    before, after = (read_lines(layout / AttemptLayout.PROGRESS_LINES) for layout in (first, second))
    assert [line.epoch for line in lines] == [*range(1, epochs + 1)]
    assert [line.epoch for line in (*before, *after)] == [line.epoch for line in lines]
    assert len(before) == killed_in - 1
    assert [line.learning_rate for line in (*before, *after)] == pytest.approx([line.learning_rate for line in lines], rel=1e-9)
    losses = [(training_loss(a), training_loss(b)) for a, b in zip(lines[len(before) :], after, strict=True)]
    maps = [manifest_of(layout).metrics["map50"] for layout in (whole, second)]
    return Comparison(
        seed=seed,
        killed_in=killed_in,
        loss_shares=[abs(b - a) / a for a, b in losses],
        map_whole=maps[0],
        map_resumed=maps[1],
        weights_equal=last_weights_equal(whole, second, epochs),
    )


def manifest_of(layout: AttemptLayout) -> ResultManifest:
    return ResultManifest.model_validate_json((layout / AttemptLayout.MANIFEST).read_bytes())


def last_weights_equal(one: AttemptLayout, other: AttemptLayout, epochs: int) -> bool:
    import torch

    name = f"checkpoints/epoch-{epochs:04d}.pt"
    a, b = (torch.load(layout / name, map_location="cpu", weights_only=False)["ema"].state_dict() for layout in (one, other))
    return all(torch.equal(a[key], b[key]) for key in a)


def report(rows: list[Comparison]) -> None:
    print("", HEADER, *rows, f"median difference in mAP50: {statistics.median(row.difference for row in rows):.4f}", sep="\n")


@pytest.mark.full
def test_a_resumed_training_follows_the_one_left_alone(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", train=96, val=32, test=32, size=96)
    row = compare(tmp_path, seed=0, epochs=6, killed_in=4, data=data)
    report([row])
    assert row.loss_shares[0] <= LOSS_SHARE


@pytest.mark.full
def test_a_resumed_training_is_as_good_over_three_seeds(tmp_path: Path) -> None:
    data = write_shapes(tmp_path / "data", size=96)
    rows = [compare(tmp_path, seed=seed, epochs=12, killed_in=6 + seed, data=data) for seed in range(3)]
    report(rows)
    assert all(row.loss_shares[0] <= LOSS_SHARE for row in rows)
    assert statistics.median(row.difference for row in rows) <= MAP_DIFFERENCE
