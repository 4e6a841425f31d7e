"""TrainConfig → the arguments of Ultralytics' trainer, and every reason why it would refuse them, before it starts."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from typing import Any

from pydantic import JsonValue

from trainer.contract import ExitCode, TrainConfig, TrainerError, unknown_name_message

log = logging.getLogger("trainer")

DEFAULT_BATCH = 16
MAX_WORKERS = 8
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - nothing is written there by name
# On their way at most: 4 for training, and 2 for each of twice as many processes, of twice the size, for validation.
BATCHES_PER_WORKER = 4 + 2 * 2 * 2
# Ultralytics' names for what has a field of its own here.
FIELDS = {
    "epochs": "epochs",
    "batch": "batch_size",
    "imgsz": "image_size",
    "lr0": "learning_rate",
    "optimizer": "optimizer",
    "workers": "workers",
    "seed": "seed",
    "patience": "patience",
    "device": "device",
    "model": "model",
    "pretrained": "weights",
    "task": "task",
    "augmentations": "augmentations",
}
# fmt: off
OWNED = frozenset(
    {
        "mode", "data", "project", "name", "exist_ok", "resume", "save", "save_period", "save_dir", "plots", "verbose",
        "deterministic", "val", "split", "time", "cfg", "profile",
    }
)
# Settings of prediction, drawing, export and other tasks: accepted by Ultralytics in a training, and without effect.
FOREIGN = frozenset(
    {
        "source", "vid_stride", "stream_buffer", "visualize", "embed", "retina_masks", "show", "save_frames", "save_txt",
        "save_conf", "save_crop", "show_labels", "show_conf", "show_boxes", "line_width", "format", "optimize", "dynamic",
        "simplify", "opset", "workspace", "dnn", "nms", "tracker", "classes", "augment", "save_json", "overlap_mask", "mask_ratio",
        "dropout", "pose", "kobj", "rle", "angle", "dlog", "dgrad", "dlam", "copy_paste", "copy_paste_mode", "auto_augment",
        "erasing", "quantize", "distill_model", "dis",
    }
)
# fmt: on


def config_error(message: str, hint: str = "") -> TrainerError:
    return TrainerError(message, hint=hint, code=ExitCode.CONFIG)


def known_params() -> list[str]:
    """Names that `model_params` may hold."""
    from ultralytics.utils import DEFAULT_CFG_KEYS

    return sorted(set(DEFAULT_CFG_KEYS) - FIELDS.keys() - OWNED - FOREIGN)


def check_params(params: dict[str, JsonValue]) -> None:
    """Raises TrainerError (CONFIG) for a name in `model_params` that is unknown or not the user's to set."""
    known = known_params()
    for name in params:
        if name in FIELDS:
            raise config_error(f"model_params cannot hold {name!r}", f"use the field {FIELDS[name]}")
        if name in OWNED:
            raise config_error(f"model_params cannot hold {name!r}: Trainyard sets it itself", "leave it out")
        if name in FOREIGN:
            raise config_error(f"{name!r} in model_params has no effect on training object detection", "leave it out")
        if name not in known:
            raise config_error(unknown_name_message("model_params", name, known), "Ultralytics' documentation lists them")


def choose_device(device: str) -> str:
    """Ultralytics' word for the device: ``cpu``, ``mps`` or the GPU's number. Raises TrainerError (CONFIG) where it is absent."""
    import torch

    if device == "auto":
        return "0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device == "cpu":
        return device
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise config_error("device mps is not available on this machine", "use device auto or cpu")
        return device
    numbers = device.partition(":")[2] or "0"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        why = "no NVIDIA GPU or driver was found (see nvidia-smi)" if torch.version.cuda else "this torch was built without CUDA"
        hint = "use device auto or cpu, or a machine with a GPU"
        raise config_error(f"device {device} was asked for, but CUDA is not available: {why}", hint)
    if max(int(number) for number in numbers.split(",")) >= count:
        message = f"device {device} was asked for, but this machine has {count} GPU(s), counted from 0"
        raise config_error(message, f"use cuda:0 to cuda:{count - 1}")
    if "," in numbers:
        raise config_error("training on several GPUs at once is not supported yet", "use one, such as cuda:0")
    return numbers


def choose_amp(device: str, wanted: JsonValue) -> bool | str:
    """Mixed precision on a GPU that has bfloat16, else full precision.

    Ultralytics checks 16-bit floats with a model that it downloads, and bfloat16 needs no such check.
    """
    if device in ("cpu", "mps") or wanted in (False, "fp32"):
        return False
    import torch

    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    log.info("this GPU has no bfloat16: training in full precision")
    return False


def choose_workers(config: TrainConfig, shared_bytes: int | None) -> int:
    """As wished; else by cores, and no more than the memory that processes share has room for: 64 MB where a container got none."""
    if config.workers is not None:
        return config.workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = min(MAX_WORKERS, cores)
    if shared_bytes is None:
        return chosen
    batch = DEFAULT_BATCH if config.batch_size == "auto" else config.batch_size
    room = shared_bytes // (BATCHES_PER_WORKER * batch * 3 * config.image_size**2)
    if room < chosen:
        log.warning("%d data-loading processes, not %d: %s has %d MB free", room, chosen, SHARED_MEMORY, shared_bytes // 10**6)
    return min(chosen, room)


def read_shared_memory() -> int | None:
    """Bytes that are free for what processes share; None where the system has no such folder."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except FileNotFoundError:
        return None
    return found.f_bavail * found.f_frsize


def choose_batch(batch: int | str, device: str) -> int:
    if batch != "auto":
        return int(batch)
    if device in ("cpu", "mps"):
        log.info("batch_size auto: %d, because only a CUDA GPU's memory can be measured", DEFAULT_BATCH)
        return DEFAULT_BATCH
    return -1


def build_arguments(config: TrainConfig, device: str) -> dict[str, Any]:
    """Arguments for Ultralytics' trainer without model, data and folders.

    Raises TrainerError (CONFIG) for unknown names and impossible values in `model_params` and `augmentations`.
    """
    check_params(config.model_params)
    # Ultralytics' "auto" picks its own learning rate and ignores a given one without a word.
    optimizer = config.optimizer or ("AdamW" if config.learning_rate is not None else "auto")
    if optimizer == "auto" and "momentum" in config.model_params:
        raise config_error("momentum has no effect while the framework chooses the optimizer", "set optimizer or learning_rate as well")
    arguments: dict[str, Any] = {
        **config.model_params,
        "task": "detect",
        "mode": "train",
        "epochs": config.epochs,
        "batch": choose_batch(config.batch_size, device),
        "imgsz": config.image_size,
        "optimizer": optimizer,
        "workers": choose_workers(config, read_shared_memory()),
        "seed": config.seed,
        "patience": config.patience or 0,  # 0: never stop early
        "device": device,
        "amp": choose_amp(device, config.model_params.get("amp")),
        "deterministic": True,
        "plots": False,
        "save": True,
        "val": True,
    }
    if config.learning_rate is not None:
        arguments["lr0"] = config.learning_rate
    if config.augmentations is not None:
        arguments["augmentations"] = build_augmentations(config.augmentations, config.image_size)
    _check_values(arguments)
    return arguments


def _check_values(arguments: dict[str, Any]) -> None:
    from ultralytics.cfg import get_cfg

    checked = {key: value for key, value in arguments.items() if key != "augmentations"}
    try:
        get_cfg(overrides=checked)
    except (TypeError, ValueError, SyntaxError) as exc:
        raise config_error(f"Ultralytics refuses a setting: {' '.join(str(exc).split())}", "correct the value in model_params") from exc


# --- Augmentations -------------------------------------------------------------------------------------


def build_augmentations(specs: list[dict[str, JsonValue]], image_size: int) -> list[Any]:
    """Albumentations transforms from ``[{"transform": "Blur", "p": 0.5}, …]``; ``transforms`` nests, as in OneOf.

    Each is tried on an image of the training's size. Raises TrainerError (CONFIG) for an unknown
    name or argument, an impossible value, and a transform that changes the size or the kind of the image.
    """
    try:
        import albumentations as A
    except ImportError as exc:
        raise config_error("augmentations need the package albumentations", "install it, or leave augmentations empty") from exc
    known = {
        name: value
        for name, value in vars(A).items()
        if inspect.isclass(value) and issubclass(value, (A.BasicTransform, A.BaseCompose)) and not inspect.isabstract(value)
    }
    known = {name: value for name, value in known.items() if name not in ("Lambda", "Compose", "BasicTransform", "BaseCompose")}
    built = [_build_transform(spec, known) for spec in specs]
    for transform, spec in zip(built, specs, strict=True):
        _try_transform(transform, str(spec["transform"]), image_size)
    return built


def _build_transform(spec: JsonValue, known: dict[str, type]) -> Any:
    if not isinstance(spec, dict) or not isinstance(spec.get("transform"), str):
        raise config_error(f"an augmentation needs a transform: {spec!r}", 'write {"transform": "HorizontalFlip", "p": 0.5}')
    name = str(spec["transform"])
    if name not in known:
        raise config_error(unknown_name_message("transform", name, sorted(known)), "Albumentations' documentation lists them")
    arguments = {key: value for key, value in spec.items() if key != "transform"}
    accepted = [key for key in inspect.signature(known[name]).parameters if key != "self"]
    for key in arguments:
        # Albumentations only warns, and trains without it.
        if key not in accepted:
            raise config_error(unknown_name_message(f"argument of {name}", key, accepted), "correct it in augmentations")
    nested = arguments.get("transforms")
    values = {key: _as_tuple(value) for key, value in arguments.items()}
    if isinstance(nested, list):
        values["transforms"] = [_build_transform(item, known) for item in nested]
    try:
        return known[name](**values)
    except (TypeError, ValueError, KeyError) as exc:
        raise config_error(f"{name} refuses its arguments: {_shorten(exc)}", "correct them in augmentations") from exc


def _as_tuple(value: JsonValue) -> Any:
    return tuple(_as_tuple(item) for item in value) if isinstance(value, list) else value


def _shorten(exc: Exception) -> str:
    return " ".join(str(exc).split())[:300]


def _try_transform(transform: Any, name: str, image_size: int) -> None:
    import albumentations as A
    import numpy as np

    image = np.random.default_rng(0).integers(0, 255, (image_size, image_size, 3), dtype=np.uint8)
    probability = transform.p
    transform.p = 1.0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are boxes which a change of colour leaves alone
            pipeline = A.Compose([transform], bbox_params=A.BboxParams(format="yolo", label_fields=["labels"]))
            result = pipeline(image=image, bboxes=np.array([[0.5, 0.5, 0.2, 0.2]]), labels=np.array([0]))["image"]
    except Exception as exc:  # whatever a transform raises that cannot work here
        raise config_error(f"{name} fails on an image with a box: {_shorten(exc)}", "leave it out, or correct its arguments") from exc
    finally:
        transform.p = probability
    if getattr(result, "dtype", None) != np.uint8:
        raise config_error(f"{name} returns an image that is not 8-bit", "leave it out: the framework scales pixel values itself")
    if result.shape != image.shape:
        message = f"{name} changes the image's shape to {tuple(result.shape)}"
        raise config_error(message, "leave it out: the framework sets the size by image_size")
