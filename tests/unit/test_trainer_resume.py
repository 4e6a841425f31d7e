from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.fit_rig import epochs_of, make_attempt
from trainer import task
from trainer.contract import ENV_HOME, AttemptLayout
from trainer.frameworks import yolo_resume

pytestmark = pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra `train`: uv sync --extra train")
AUGMENTED: dict[str, Any] = {
    "epochs": 3,
    "augmentations": [{"transform": "VerticalFlip", "p": 1.0}],
    "model_params": {"nbs": 8, "mosaic": 0.0},
}


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    before = dict(os.environ)
    os.environ[ENV_HOME] = str(tmp_path_factory.mktemp("home"))
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> AttemptLayout:
    layout = make_attempt(tmp_path_factory.mktemp("whole"), **AUGMENTED)
    task.fit(layout)
    return layout


def state_of(layout: AttemptLayout, epoch: int) -> dict[str, Any]:
    import torch

    return torch.load(layout / f"checkpoints/epoch-{epoch:04d}.pt", map_location="cpu", weights_only=False)


def test_a_checkpoint_holds_what_is_trained_in_32_bits(whole: AttemptLayout) -> None:
    import torch

    state = state_of(whole, 2)
    floats = [value for value in state[yolo_resume.TRAINED].values() if value.is_floating_point()]
    floats += [value for value in state["ema"].state_dict().values() if value.is_floating_point()]
    floats += [one[name] for one in state["optimizer"]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    assert {value.dtype for value in floats} == {torch.float32}
    assert not {"git", "model_path"} & state.keys()


def test_a_resumed_training_is_the_same_to_the_last_bit(whole: AttemptLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every batch a step, and no mosaics.

    Where gradients are gathered over batches, those of an epoch's last, unfinished step are lost; and a mosaic takes images that
    were loaded lately, of which a new process has none.
    """
    import albumentations as A
    import torch

    source = whole.folder.parents[2]
    first = make_attempt(tmp_path, 1, data=source / "data", **AUGMENTED)
    (first / AttemptLayout.CHECKPOINTS).mkdir()
    for ending in ("pt", "json"):
        name = f"checkpoints/epoch-0002.{ending}"
        (first / name).write_bytes((whole / name).read_bytes())
    if (best := state_of(whole, 2))["stopper"]["best_epoch"] != 2:
        name = f"checkpoints/epoch-{best['stopper']['best_epoch']:04d}"
        for ending in ("pt", "json"):
            if (whole / f"{name}.{ending}").exists():
                (first / f"{name}.{ending}").write_bytes((whole / f"{name}.{ending}").read_bytes())
    flips: list[int] = []
    apply = A.VerticalFlip.apply
    monkeypatch.setattr(A.VerticalFlip, "apply", lambda self, *args, **named: flips.append(1) or apply(self, *args, **named))
    second = make_attempt(tmp_path, 2, **AUGMENTED)
    task.fit(second)
    assert epochs_of(second) == [3]
    assert len(flips) >= 16  # the transforms are not in the checkpoint; they come from the configuration
    ours, theirs = state_of(second, 3), state_of(whole, 3)
    for key, value in theirs[yolo_resume.TRAINED].items():
        assert torch.equal(ours[yolo_resume.TRAINED][key], value), key
    assert all(torch.equal(a, b) for a, b in zip(ours["ema"].state_dict().values(), theirs["ema"].state_dict().values(), strict=True))
