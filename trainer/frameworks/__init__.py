"""Training frameworks by name, imported only when one is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trainer.contract import AttemptLayout, ExitCode, Framework, Task, TrainConfig, TrainerError, TrainJob
from trainer.progress import ProgressWriter
from trainer.stopping import Stopper

if TYPE_CHECKING:
    from trainer.checkpoint import Checkpoint
    from trainer.dataset import DatasetIndex

TRAINERS: dict[tuple[Framework, Task], str] = {
    (Framework.YOLO, Task.OBJECT_DETECTION): "trainer.frameworks.yolo:YoloDetection",
}


@dataclass(frozen=True, kw_only=True)
class FitContext:
    """What a framework needs to know of the fit it works for."""

    job: TrainJob
    index: DatasetIndex
    data_root: Path
    layout: AttemptLayout
    progress: ProgressWriter
    stopper: Stopper

    @property
    def config(self) -> TrainConfig:
        return self.job.config

    @property
    def work(self) -> Path:
        return self.layout / AttemptLayout.WORK

    def refuse_changed_data(self) -> None:
        """Raises TrainerError (DATA) where a file is gone or changed. Stats every file: milliseconds per thousand."""
        from trainer.dataset import changed_files

        changed = changed_files(self.index, self.data_root)
        if changed:
            named = ", ".join(changed[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
            raise TrainerError(
                f"the dataset changed since it was checked: {named}",
                hint="restore the files, or start a new run with the dataset as it is now",
                code=ExitCode.DATA,
            )


@dataclass(frozen=True, kw_only=True)
class Box:
    """A predicted or true box. Corners are fractions of the image's width and height, 0 to 1."""

    name: str
    left: float
    top: float
    right: float
    bottom: float
    confidence: float | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model's figures on one split. Shares are 0 to 1; a class without instances has None for its figures."""

    split: str
    images: int
    instances: int
    metrics: dict[str, float]
    classes: list[dict[str, Any]]
    confusion_names: list[str]
    confusion: list[list[int]] = field(default_factory=list)  # [true][predicted], background last
    thresholds: dict[str, float] = field(default_factory=dict)


class FrameworkTrainer(Protocol):
    """One framework doing one task. Construction is cheap; `prepare` imports and checks, all else needs it.

    `train` returns when the last epoch's checkpoint is saved. It raises TrainerError for expected
    failures, StopRequested when told to stop, and lets everything else through.
    """

    def __init__(self, context: FitContext) -> None: ...
    def import_framework(self) -> None: ...
    def prepare(self) -> None: ...
    def versions(self) -> dict[str, str]: ...
    def load_checkpoint(self, path: Path) -> dict[str, Any]: ...
    def train(self, start: Checkpoint | None) -> None: ...
    def evaluate(self, checkpoint: Path, split: str) -> Evaluation: ...
    def predict(self, model: Path, images: Sequence[Path]) -> list[list[Box]]: ...
    def export(self, checkpoint: Path, target: Path) -> None: ...


def get_trainer(framework: Framework, task: Task) -> type[FrameworkTrainer]:
    """The class that trains `task` with `framework`. Raises TrainerError (CONFIG) where there is none."""
    target = TRAINERS.get((framework, task))
    if target is None:
        able = sorted(t.value for f, t in TRAINERS if f == framework)
        raise TrainerError(
            f"{framework.value} cannot be trained for {task.value} yet",
            hint=f"tasks of {framework.value}: {', '.join(able) or 'none'}",
            code=ExitCode.CONFIG,
        )
    module, name = target.split(":")
    return getattr(import_module(module), name)
