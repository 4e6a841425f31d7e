"""What happens while Ultralytics trains: progress, checkpoints, stopping. Attached by its public callbacks."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import psutil

from trainer.checkpoint import Checkpoint, CheckpointRecord, save_checkpoint
from trainer.contract import STEPPING, AttemptLayout, ExitCode, TrainerError, utc_now
from trainer.frameworks import FitContext
from trainer.progress import finite

if TYPE_CHECKING:
    from ultralytics.models.yolo.detect import DetectionTrainer

log = logging.getLogger("trainer")

# Ultralytics' names of the headline figures.
METRICS = {
    "metrics/mAP50(B)": "map50",
    "metrics/mAP50-95(B)": "map50_95",
    "metrics/precision(B)": "precision",
    "metrics/recall(B)": "recall",
}
GIB = 2**30
STEPS_REMEMBERED = 50
PAUSES_REMEMBERED = 5


def rename_metrics(metrics: dict[str, Any]) -> dict[str, float]:
    return finite({name: float(metrics[key]) for key, name in METRICS.items() if key in metrics})


def measure_memory_gib() -> float:
    """Resident memory of this process and its data loaders."""
    total = 0
    process = psutil.Process()
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.Error:  # it ended meanwhile
            continue
    return round(total / GIB, 3)


class StepClock:
    """Times one epoch's steps: how long in all, and how much of it was waiting for the next batch.

    Over the epochs it remembers what whoever watches for stalls compares with: how long the last steps took, and
    the last pauses from one epoch's last step to the next one's first (validation, checkpoint, data loaders).
    """

    def __init__(self) -> None:
        self.epoch_seconds: list[float] = []
        self.last_step_at: datetime | None = None
        self._steps: deque[float] = deque(maxlen=STEPS_REMEMBERED)
        self._pauses: deque[float] = deque(maxlen=PAUSES_REMEMBERED)
        self._stepped = math.nan
        self.start_epoch()

    def start_epoch(self) -> None:
        self.started = self.ended_step = time.monotonic()
        self.waited = self.trained = 0.0
        self.step = 0

    def start_step(self) -> None:
        self.waited += time.monotonic() - self.ended_step

    def end_step(self) -> None:
        self.ended_step = time.monotonic()
        self.trained = self.ended_step - self.started
        self.step += 1
        if not math.isnan(self._stepped):
            (self._steps if self.step > 1 else self._pauses).append(self.ended_step - self._stepped)
        self._stepped, self.last_step_at = self.ended_step, utc_now()

    @property
    def step_seconds(self) -> float | None:
        return round(median(self._steps), 4) if self._steps else None

    @property
    def pause_seconds(self) -> float | None:
        return round(max(self._pauses), 4) if self._pauses else None

    def end_epoch(self) -> None:
        self.epoch_seconds.append(time.monotonic() - self.started)

    def eta_seconds(self, *, remaining_epochs: float, steps: int) -> float | None:
        """Seconds until the last epoch ends, from the recent epochs, or from this one's steps while there is none."""
        recent = self.epoch_seconds[-5:]
        if recent:
            return round(remaining_epochs * sum(recent) / len(recent), 1)
        return round(remaining_epochs * self.trained / self.step * steps, 1) if self.step else None


class TrainingCallbacks:
    """The state of one training in this process. `start` is the checkpoint it resumes from, with `best` its best epoch."""

    def __init__(self, context: FitContext, start: Checkpoint | None, best: CheckpointRecord | None) -> None:
        self._context = context
        self._start = start
        self._best = best
        self._clock = StepClock()
        self._folder = context.layout / AttemptLayout.CHECKPOINTS
        self.batch_size = 0
        self.nonfinite_losses = 0

    def attach(self, trainer: DetectionTrainer) -> None:
        trainer.add_callback("on_pretrain_routine_end", self.on_setup_end)
        trainer.add_callback("on_train_epoch_start", self.on_epoch_start)
        trainer.add_callback("on_train_batch_start", self.on_step_start)
        trainer.add_callback("on_train_batch_end", self.on_step_end)
        trainer.add_callback("on_train_epoch_end", self.on_epoch_trained)
        trainer.add_callback("on_val_batch_end", self.on_validated_batch)
        trainer.add_callback("on_model_save", self.on_saved)

    def on_setup_end(self, trainer: DetectionTrainer) -> None:
        self.batch_size = trainer.batch_size
        if self._start is None:
            return
        verify_resumed(trainer, self._start)
        reseed(trainer, self._start.record.epoch)
        if self._best is not None and self._best.sha256 != self._start.record.best_sha256:
            # The best epoch's weights are lost: from here on the best is the checkpoint that takes its place.
            trainer.best_fitness = trainer.stopper.best_fitness = fitness_of(self._start.path)
            trainer.stopper.best_epoch = self._best.epoch

    def on_epoch_start(self, _trainer: DetectionTrainer) -> None:
        self._clock.start_epoch()
        if self._context.progress.latest.activity == STEPPING:  # begun anew, with a smaller batch: the loaders start again
            self._context.progress.update(activity="")

    def on_step_start(self, _trainer: DetectionTrainer) -> None:
        self._clock.start_step()
        self._check_stop()

    def on_step_end(self, trainer: DetectionTrainer) -> None:
        self._clock.end_step()
        # Ultralytics' progress bar waited for the GPU in this step already: asking costs next to nothing.
        finite_loss = trainer.loss is None or bool(trainer.loss.isfinite().all())
        self.nonfinite_losses = 0 if finite_loss else self.nonfinite_losses + 1
        self._check_stop()
        if self._context.progress.is_due():
            self._context.progress.update(**self._describe_step(trainer), activity=STEPPING)

    def on_epoch_trained(self, trainer: DetectionTrainer) -> None:
        self._check_stop()
        self._context.refuse_changed_data()
        changes = self._describe_step(trainer)
        changes["activity"] = "validating"
        if trainer.batch_size != self.batch_size > 0:
            changes["message"] = f"the GPU's memory was too small: batch size reduced from {self.batch_size} to {trainer.batch_size}"
            log.warning(changes["message"])
        self._context.progress.update(**changes)

    def on_validated_batch(self, _validator: Any) -> None:
        self._check_stop()
        self._context.progress.beat()

    def on_saved(self, trainer: DetectionTrainer) -> None:
        """After every epoch, once Ultralytics wrote ``last.pt`` (in place, so it is no checkpoint to rely on)."""
        self._clock.end_epoch()
        with self._context.stopper.deferred():
            self._finish_epoch(trainer)
        self._check_stop()

    def _check_stop(self) -> None:
        self._context.stopper.check()

    def _finish_epoch(self, trainer: DetectionTrainer) -> None:
        epoch = trainer.epoch + 1
        metrics = trainer.metrics or {}
        losses = {**self._context.progress.latest.losses, **{k: float(v) for k, v in metrics.items() if k.startswith("val/")}}
        remaining = 0 if trainer.stop else trainer.epochs - epoch
        latest = self._context.progress.update(
            epoch=epoch,
            step=0,
            activity="saving",
            metrics=rename_metrics(metrics),
            losses=losses,
            eta_seconds=self._clock.eta_seconds(remaining_epochs=remaining, steps=self._context.progress.latest.steps),
        )
        is_best = trainer.best_fitness == trainer.fitness
        saved = save_checkpoint(
            self._folder,
            Path(trainer.last).read_bytes(),
            self._context.job,
            epoch=epoch,
            best=None if is_best else self._best,
            finished=bool(trainer.stop),
            progress=latest,
        )
        if is_best or self._best is None:
            self._best = saved.record
        self._context.progress.finish_epoch()
        figures = " ".join(f"{name} {value:.4f}" for name, value in latest.metrics.items())
        log.info("epoch %d of %d: %s", epoch, trainer.epochs, figures)

    def _describe_step(self, trainer: DetectionTrainer) -> dict[str, Any]:
        clock, steps = self._clock, len(trainer.train_loader)
        assert trainer.optimizer is not None
        images = min(clock.step * trainer.batch_size, len(trainer.train_loader.dataset))
        remaining = trainer.epochs - trainer.epoch - clock.step / max(steps, 1)
        return {
            "epoch": trainer.epoch,
            "step": clock.step,
            "steps": steps,
            "losses": trainer.label_loss_items(trainer.tloss) if trainer.tloss else {},
            "learning_rate": float(trainer.optimizer.param_groups[0]["lr"]),
            "images_per_second": round(images / clock.trained, 2) if clock.trained > 0 else None,
            "data_wait_share": round(min(1.0, clock.waited / clock.trained), 4) if clock.trained > 0 else None,
            "memory_gib": measure_memory_gib(),
            "gpu_memory_gib": measure_gpu_gib(trainer),
            "eta_seconds": clock.eta_seconds(remaining_epochs=remaining, steps=steps),
            "step_seconds": clock.step_seconds,
            "last_step_at": clock.last_step_at,
            "pause_seconds": clock.pause_seconds,
            "nonfinite_losses": self.nonfinite_losses,
        }


def measure_gpu_gib(trainer: DetectionTrainer) -> float | None:
    if trainer.device.type != "cuda":
        return None
    import torch

    return round(torch.cuda.max_memory_reserved(trainer.device) / GIB, 3)


def fitness_of(checkpoint: Path) -> float | None:
    """The validation fitness of the epoch that the checkpoint holds."""
    import torch

    state = torch.load(checkpoint, map_location="cpu", weights_only=False)  # our own file: its hash was compared
    return state["train_metrics"].get("fitness")


def optimizer_steps(state: dict[Any, dict[str, Any]]) -> dict[Any, int]:
    """Parameter → steps its optimizer state counts; 0 for an optimizer that keeps no count."""
    return {key: int(value.get("step", 0)) for key, value in state.items()}


def reseed(trainer: DetectionTrainer, epoch: int) -> None:
    """Gives the epochs after a resume random numbers of their own.

    Checkpoints hold no generator state: Ultralytics would shuffle and augment as it did from epoch 1 on.
    """
    import random

    import numpy as np
    import torch

    seed = trainer.args.seed + 7919 * epoch
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    loader = trainer.train_loader
    loader.generator.manual_seed(seed)
    loader.reset()


def verify_resumed(trainer: DetectionTrainer, start: Checkpoint) -> None:
    """Raises TrainerError where Ultralytics did not take over the checkpoint's epoch, optimizer or average of the weights."""
    import torch

    if trainer.start_epoch != start.record.epoch:
        raise _not_resumed(f"it starts at epoch {trainer.start_epoch + 1}, not at {start.record.epoch + 1}")
    state = torch.load(start.path, map_location="cpu", weights_only=False)  # our own file: its hash was compared
    assert trainer.optimizer is not None
    saved, loaded = optimizer_steps(state["optimizer"]["state"]), optimizer_steps(trainer.optimizer.state_dict()["state"])
    if saved != loaded:
        raise _not_resumed(f"the optimizer holds the state of {len(loaded)} parameters, the checkpoint of {len(saved)}")
    if trainer.ema is None or trainer.ema.updates != state["updates"]:
        raise _not_resumed("the average of the weights was not restored")
    log.info("resumed: optimizer state of %d parameters, %d steps", len(loaded), max(loaded.values(), default=0))


def _not_resumed(what: str) -> TrainerError:
    hint = "this is a defect of Trainyard with this release of Ultralytics; start a new run"
    return TrainerError(f"the training did not resume as it should: {what}", hint=hint, code=ExitCode.UNEXPECTED)
