"""Object detection with Ultralytics YOLO."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.checkpoint import Checkpoint, adopt_checkpoint, find_best
from trainer.contract import AttemptLayout, ExitCode, TrainerError
from trainer.frameworks import Box, Evaluation, FitContext, yolo_model as models, yolo_resume as resuming
from trainer.frameworks.yolo_arguments import build_arguments, choose_amp, choose_device
from trainer.frameworks.yolo_callbacks import TrainingCallbacks, rename_metrics
from trainer.frameworks.yolo_weights import adopt_weights, restrict_loading
from trainer.progress import finite

if TYPE_CHECKING:
    from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator

log = logging.getLogger("trainer")

CONFUSION_CONFIDENCE = 0.25
CONFUSION_IOU = 0.5
SAMPLE_CONFIDENCE = 0.25
CURVE_POINTS = 101
BACKGROUND = "background"


class YoloDetection:
    """Implements FrameworkTrainer. Everything Ultralytics writes goes below the attempt's work folder."""

    def __init__(self, context: FitContext) -> None:
        self._context = context
        self._device = ""
        self._model: Path | None = None
        self._data: Path | None = None
        self._arguments: dict[str, Any] = {}

    def import_framework(self) -> None:
        models.import_ultralytics(self._context.work / "config")
        import ultralytics.models.yolo.detect  # noqa: F401  (the slow part, timed as importing)

    def prepare(self) -> None:
        """Checks the configuration, finds or downloads the weights, and lays the data out as Ultralytics reads it."""
        from trainer.dataset import write_yolo_layout

        config, work = self._context.config, self._context.work
        restrict_loading(restricted=not config.trust_weights)
        self._device = choose_device(config.device)
        self._arguments = build_arguments(config, self._device)
        if config.weights:
            self._model = adopt_weights(models.resolve_weights(config.weights), work / "weights", trust=config.trust_weights)
        else:
            self._model = models.resolve_model(config.model, work / "model")
            self._check_architecture(self._model)
        self._data = write_yolo_layout(self._context.index, self._context.data_root, work / "data")

    def _check_architecture(self, model: Path) -> None:
        """Builds the model once: a YAML file of the user's may name modules that do not exist or do not fit."""
        if Path(self._context.config.model).suffix not in (".yaml", ".yml"):
            return
        from ultralytics.nn.tasks import DetectionModel

        try:
            DetectionModel(str(model), nc=len(self._context.index.classes), verbose=False)
        except Exception as exc:  # whatever Ultralytics' parser stumbles over
            message = f"no model can be built from {model}: {type(exc).__name__}: {exc}"
            raise TrainerError(message, hint="compare it with Ultralytics' cfg/models", code=ExitCode.CONFIG) from exc

    def versions(self) -> dict[str, str]:
        import torch
        import ultralytics

        found = {"python": platform.python_version(), "torch": str(torch.__version__), "ultralytics": ultralytics.__version__}
        try:
            import albumentations
        except ImportError:
            return found
        return {**found, "albumentations": albumentations.__version__}

    def load_checkpoint(self, path: Path) -> dict[str, Any]:
        return models.load_state(path)

    # --- Training --------------------------------------------------------------------------------

    def train(self, start: Checkpoint | None) -> None:
        """Trains to the last epoch, or until patience ends it, from `start` or from the beginning."""
        best = self._keep_best(start) if start else None
        if start is not None:  # verified and then read several times: from a place where nobody else writes
            start = adopt_checkpoint(start, self._context.work / "resume")
        trainer = self._build_trainer(start)
        TrainingCallbacks(self._context, start, best.record if best else None).attach(trainer)
        trainer.add_callback("on_train_epoch_start", resuming.seed_epoch)
        if start is not None:
            state = self.load_checkpoint(start.path)
            trainer.add_callback("on_train_start", lambda trainer: resuming.restore_weights(trainer, state))
        trainer.train()

    def _keep_best(self, start: Checkpoint) -> Checkpoint:
        """The best epoch so far, copied into this attempt, so that it stays with the epochs that follow."""
        best = find_best(self._context.layout, start)
        if best is None:
            record = start.record
            log.warning("the checkpoint of the best epoch %d is lost; epoch %d takes its place", record.best_epoch, record.epoch)
            best = start
        return adopt_checkpoint(best, self._context.layout / AttemptLayout.CHECKPOINTS)

    def _build_trainer(self, start: Checkpoint | None) -> DetectionTrainer:
        from ultralytics.models.yolo.detect import DetectionTrainer

        class FitTrainer(DetectionTrainer):
            def final_eval(self) -> None:
                """Nothing: the fit evaluates the best epoch itself."""

            def save_model(self) -> bool:
                resuming.save_state(self)
                return True

        place = {"data": str(self._data), "save_dir": str(self._context.work / "train")}
        if start is None:
            return FitTrainer(overrides={**self._arguments, **place, "model": str(self._model)})
        # The checkpoint brings its own arguments; only the machine's are replaced.
        machine = {key: self._arguments[key] for key in ("task", "mode", "device", "workers", "augmentations") if key in self._arguments}
        trainer = FitTrainer(overrides={**machine, **place, "model": str(start.path), "resume": str(start.path)})
        trainer.args.amp = choose_amp(self._device, self._context.config.model_params.get("amp"))
        return trainer

    # --- Evaluating --------------------------------------------------------------------------------

    def evaluate(self, checkpoint: Path, split: str) -> Evaluation:
        """The model's figures on `split`, at the training's image size, in full precision."""
        validator = self._build_validator(checkpoint, split)
        results = validator()
        box = validator.metrics.box
        classes = describe_classes(validator, list(self._context.index.classes))
        return Evaluation(
            split=split,
            images=validator.seen,
            instances=sum(row["instances"] for row in classes),
            metrics=rename_metrics(results),
            classes=classes,
            confusion_names=[*self._context.index.classes, BACKGROUND],
            confusion=validator.confusion_matrix.matrix.T.astype(int).tolist(),
            thresholds={
                "best_f1_confidence": best_confidence(box),
                "confusion_confidence": CONFUSION_CONFIDENCE,
                "confusion_iou": CONFUSION_IOU,
                "pr_curve_iou": 0.5,
                "sample_confidence": SAMPLE_CONFIDENCE,
                "evaluation_confidence": validator.args.conf,
                "nms_iou": validator.args.iou,
            },
        )

    def _build_validator(self, checkpoint: Path, split: str) -> DetectionValidator:
        from ultralytics.models.yolo.detect import DetectionValidator

        class FitValidator(DetectionValidator):
            """Fills the confusion matrix, which Ultralytics does only where it draws plots, and then at confidence 0.001."""

            def update_metrics(self, preds: list[dict[str, Any]], batch: dict[str, Any]) -> None:
                super().update_metrics(preds, batch)
                for position, pred in enumerate(preds):
                    truth = self._prepare_batch(position, batch)
                    self.confusion_matrix.process_batch(self._prepare_pred(pred), truth, CONFUSION_CONFIDENCE, CONFUSION_IOU)

        kept = ("iou", "max_det", "conf", "agnostic_nms", "single_cls", "imgsz", "workers")
        arguments = {key: self._arguments[key] for key in kept if key in self._arguments}
        batch = self._arguments["batch"]
        validator = FitValidator(
            save_dir=self._context.work / "evaluation",
            args={
                **arguments,
                "task": "detect",
                "mode": "val",
                "model": str(checkpoint),
                "data": str(self._data),
                "split": split,
                "batch": batch if batch > 0 else 16,
                "device": self._device,
                "rect": True,
                "plots": False,
                "verbose": False,
            },
        )
        validator.add_callback("on_val_batch_end", lambda _validator: self._context.stopper.check())
        validator.add_callback("on_val_batch_end", lambda _validator: self._context.progress.beat())
        return validator

    def predict(self, model: Path, images: Sequence[Path]) -> list[list[Box]]:
        """Boxes of confidence 0.25 and above, per image."""
        from ultralytics import YOLO

        if not images:
            return []
        yolo: Any = YOLO(str(model))
        found: list[list[Box]] = []
        for path in images:
            self._context.stopper.check()
            self._context.progress.beat()
            result = yolo.predict(
                str(path),
                conf=SAMPLE_CONFIDENCE,
                imgsz=self._context.config.image_size,
                device=self._device,
                verbose=False,
                save=False,
                project=str(self._context.work),
            )[0]
            rows = zip(result.boxes.xyxyn.tolist(), result.boxes.conf.tolist(), result.boxes.cls.tolist(), strict=True)
            found.append(
                [Box(name=result.names[int(c)], left=x0, top=y0, right=x1, bottom=y1, confidence=p) for (x0, y0, x1, y1), p, c in rows]
            )
        return found

    def export(self, checkpoint: Path, target: Path) -> None:
        models.export_model(checkpoint, target)


def best_confidence(box: Any) -> float:
    """The confidence with the best mean F1, where Ultralytics reads precision and recall."""
    from ultralytics.utils.metrics import smooth

    if not len(box.ap_class_index):
        return 0.0
    return round(float(box.px[smooth(box.f1_curve.mean(0), 0.1).argmax()]), 4)


def describe_classes(validator: DetectionValidator, names: list[str]) -> list[dict[str, Any]]:
    """One row per class of the dataset; figures are None for a class that the split does not show."""
    metrics: Any = validator.metrics
    rows = {int(index): position for position, index in enumerate(metrics.ap_class_index)}
    described: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        row: dict[str, Any] = {
            "name": name,
            "images": int(metrics.nt_per_image[index]),
            "instances": int(metrics.nt_per_class[index]),
            **dict.fromkeys(("precision", "recall", "map50", "map50_95", "pr_curve")),
        }
        if index in rows:
            figures = [finite(float(value)) for value in metrics.class_result(rows[index])]
            row.update(zip(("precision", "recall", "map50", "map50_95"), figures, strict=True))
            row["pr_curve"] = sample_curve(metrics.box.px, metrics.box.prec_values[rows[index]])
        described.append(row)
    return described


def sample_curve(recall: Any, precision: Any) -> dict[str, list[float]]:
    """At most 101 points of a precision-recall curve, evenly spread over recall 0 to 1."""
    import numpy as np

    points = np.linspace(0, 1, CURVE_POINTS)
    return {"recall": points.round(4).tolist(), "precision": np.interp(points, recall, precision).round(5).tolist()}
