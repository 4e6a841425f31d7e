"""What a resumed training needs beyond Ultralytics' own checkpoint, so that it goes on as if it had not been interrupted.

Ultralytics keeps the averaged weights and the optimizer's state in 16 bits, and the weights that are trained not at all: it
goes on from the average, which lags behind them. Adam's second moments, squares of gradients, are zero in 16 bits below 6e-8,
and a step divides by their root. Here all three are kept in 32 bits. Its checkpoints also lack the states of the random number
generators; instead the numbers of an epoch follow from the seed and the epoch, where no data-loading processes hold generators
of their own.
"""

from __future__ import annotations

import io
import random
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

from trainer.files import write_atomic

Trainer = Any  # Ultralytics' DetectionTrainer, whose attributes are declared with types that a running training has no more

TRAINED = "trained_weights"  # key in a checkpoint: the state of the model that the optimizer works on, in 32 bits
_SEED_STEP = 7919  # a prime, so that neighbouring seeds share no epoch's numbers


def save_state(trainer: Trainer) -> None:
    """Writes ``last.pt``, whole or not at all. Keys as Ultralytics reads them, without its git details. Raises OSError."""
    import torch
    from ultralytics import __version__
    from ultralytics.utils.torch_utils import unwrap_model

    resync_average(trainer)
    average = deepcopy(trainer.ema.ema).float().to(memory_format=torch.contiguous_format)
    average.criterion = None
    state: dict[str, Any] = {
        "epoch": trainer.epoch,
        "best_fitness": trainer.best_fitness,
        "stopper": {"best_fitness": trainer.stopper.best_fitness, "best_epoch": trainer.stopper.best_epoch},
        "model": None,
        "ema": average,
        "updates": trainer.ema.updates,
        TRAINED: unwrap_model(trainer.model).state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        # Transforms are objects of another package, which a safe load refuses; the configuration has them.
        "train_args": {**vars(trainer.args), "augmentations": None},
        "train_metrics": {**trainer.metrics, "fitness": trainer.fitness},
        "train_results": trainer.read_results_csv(),
        "date": datetime.now().astimezone().isoformat(),
        "version": __version__,
        "license": "AGPL-3.0 (https://ultralytics.com/license)",
        "docs": "https://docs.ultralytics.com",
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(Path(trainer.last), buffer.getvalue())


def resync_average(trainer: Trainer) -> None:
    """A value that was once infinite stays so in an average: such tensors are taken from the trained weights, as Ultralytics does."""
    import torch
    from ultralytics.utils.torch_utils import unwrap_model

    trained = unwrap_model(trainer.model).state_dict()
    for key, value in trainer.ema.ema.state_dict().items():
        if isinstance(value, torch.Tensor) and not torch.isfinite(value).all() and torch.isfinite(trained[key]).all():
            value.copy_(trained[key])


def restore_weights(trainer: Trainer, state: dict[str, Any]) -> None:
    """The weights as they were trained, in place of the average from which Ultralytics goes on."""
    from ultralytics.utils.torch_utils import unwrap_model

    if TRAINED in state:
        unwrap_model(trainer.model).load_state_dict(state[TRAINED])


def seed_epoch(trainer: Trainer) -> None:
    """Before each epoch: shuffling and augmentation by seed and epoch, whether or not the training was interrupted."""
    import numpy as np
    import torch

    loader = trainer.train_loader
    if loader.num_workers:
        return  # to restart the processes would cost seconds an epoch; they go on with the numbers they have
    seed = trainer.args.seed + _SEED_STEP * trainer.epoch
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    loader.generator.manual_seed(seed)
    loader.reset()
