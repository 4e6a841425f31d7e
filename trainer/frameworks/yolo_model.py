"""Ultralytics made quiet and offline, its architectures by name, weights in, ``model.pt`` out."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from trainer.contract import ENV_HOME, ExitCode, TrainerError, unknown_name_message
from trainer.files import write_atomic

log = logging.getLogger("trainer")

PICO_SCALE = [0.5, 0.125, 1024]  # depth, width, most channels
PICO = "pico"
INTEGRATIONS = ("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb")
FONTS = ("Arial.ttf", "Arial.Unicode.ttf")
_TOO_WIDE_FOR_PICO = frozenset({"yolo12"})  # its attention needs multiples of 32 channels
_NAMES_ITS_SCALE = re.compile(r"yolov?\d+[a-z]")
_OTHER_TASKS = re.compile(r"-(cls|obb|pose|seg|sem|depth)\b|rtdetr|yoloe|world")


# --- The process's environment -------------------------------------------------------------------


def cache_dir() -> Path:
    home = os.environ.get(ENV_HOME)
    return (Path(home) if home else Path.home() / "trainyard") / "cache"


def import_ultralytics(fallback_dir: Path) -> None:
    """Imports torch and Ultralytics so that neither looks up a host, now or later.

    Its settings live in this machine's cache, or in `fallback_dir` where that cannot be written. A process
    that imported Ultralytics before keeps its own: they are changed in memory only, and get a font.
    """
    is_ours = "ultralytics" not in sys.modules
    os.environ["YOLO_OFFLINE"] = "true"
    os.environ["YOLO_AUTOINSTALL"] = "false"
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    # With a key and a project name, Ultralytics sends every training to its platform.
    os.environ.pop("ULTRALYTICS_API_KEY", None)
    if is_ours:
        os.environ["YOLO_CONFIG_DIR"] = str(_writable(cache_dir() / "ultralytics", fallback_dir))
    from ultralytics.utils import SETTINGS, USER_CONFIG_DIR

    quiet = {"sync": False, "api_key": "", "vscode_msg": False, **dict.fromkeys(INTEGRATIONS, False)}
    dict.update(SETTINGS, quiet)
    _place_fonts(Path(USER_CONFIG_DIR))


def _writable(folder: Path, fallback: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = fallback
    if not os.access(folder, os.W_OK):
        folder = fallback
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _place_fonts(folder: Path) -> None:
    """Puts a font where Ultralytics looks before it asks the network for one."""
    missing = [name for name in FONTS if not (folder / name).exists()]
    spec = importlib.util.find_spec("matplotlib")
    if not missing or spec is None or spec.origin is None:
        return
    font = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    for name in missing:
        write_atomic(folder / name, font.read_bytes())  # another fit may be reading the folder


# --- Architectures ---------------------------------------------------------------------------------


def list_families() -> dict[str, Path]:
    """Detection architectures that the installed Ultralytics describes: file stem → YAML file."""
    from ultralytics.utils import ROOT

    files = sorted(Path(ROOT).glob("cfg/models/*/*.yaml"))
    return {file.stem: file for file in files if not _OTHER_TASKS.search(file.stem)}


def scaled_name(stem: str, scale: str) -> str:
    """``yolov8-p2`` and ``n`` → ``yolov8n-p2``, as Ultralytics names it."""
    return re.sub(r"^(yolov?\d+)", rf"\g<1>{scale}", stem)


def list_models() -> dict[str, tuple[Path, str]]:
    """Every model name → its family's YAML file and scale; the scale is empty where the file has only one."""
    from ultralytics.utils import YAML

    models: dict[str, tuple[Path, str]] = {}
    for stem, file in list_families().items():
        scales = YAML.load(str(file)).get("scales") or {}
        if not scales or _NAMES_ITS_SCALE.match(stem):
            models[stem] = (file, "")
            continue
        models |= {scaled_name(stem, scale): (file, scale) for scale in scales}
        if stem not in _TOO_WIDE_FOR_PICO:
            models[f"{stem}-{PICO}"] = (file, PICO)
    return models


def resolve_model(model: str, folder: Path) -> Path:
    """The YAML file that Ultralytics builds `model` from, written to `folder` where it is a name.

    Raises TrainerError (CONFIG) for an unknown name and for a file that describes no model.
    """
    if model.endswith((".yaml", ".yml")):
        return _check_model_file(Path(model).expanduser())
    known = list_models()
    if model not in known:
        raise _unknown_model(model, known)
    from ultralytics.utils import YAML

    file, scale = known[model]
    document = {key: value for key, value in YAML.load(str(file)).items() if key != "yaml_file"}
    if scale == PICO:
        document["scales"] = {PICO: PICO_SCALE}
    # Ultralytics reads the scale from the file's name, and finds none in a pico's: then it takes the first, the only one.
    target = folder / f"{model}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    YAML.save(str(target), document)
    return target


def _unknown_model(model: str, known: Iterable[str]) -> TrainerError:
    hint = "give a name such as yolo11n, yolo26s or yolo11-pico, or the path of a model's YAML file"
    bare = _OTHER_TASKS.sub("", model.removesuffix(".pt"))
    message = unknown_name_message("model", model, sorted(known))
    if bare in known:
        message = f"unknown model {model!r}; did you mean {bare!r}?"
    if model.endswith(".pt"):
        hint = f"a .pt file belongs in the field weights; {hint}"
    return TrainerError(message, hint=hint, code=ExitCode.CONFIG)


def _check_model_file(path: Path) -> Path:
    import yaml

    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError as exc:
        raise TrainerError(f"the model file {path} does not exist", hint="check the path", code=ExitCode.CONFIG) from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise TrainerError(f"the model file {path} is not YAML: {exc}", code=ExitCode.CONFIG) from exc
    if not isinstance(document, dict) or not {"backbone", "head"} <= document.keys():
        hint = "it needs the keys backbone and head, as in Ultralytics' cfg/models"
        raise TrainerError(f"{path} does not describe a YOLO model", hint=hint, code=ExitCode.CONFIG)
    return path.absolute()


# --- Weights -----------------------------------------------------------------------------------------


def resolve_weights(weights: str) -> Path:
    """The local file of `weights`; a published name, or a file in a bucket, is fetched once into this machine's cache.

    Raises TrainerError: CONFIG where there is no such file or name, UNAVAILABLE where the download failed; NOT_FOUND, PERMISSION.
    """
    from trainer.mounts import ENV_MOUNTS, Mounts, parse_mounts
    from trainer.storage import to_path
    from trainer.transfer import fetch_weights

    weights = Mounts(parse_mounts(os.environ.get(ENV_MOUNTS, ""), ENV_MOUNTS)).localize(weights)
    if "://" in weights:
        return fetch_weights(weights, cache_dir() / "weights", log.warning)
    path = to_path(weights).expanduser()
    if path.is_file():
        return path.absolute()
    from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

    if path.name != weights or weights.rpartition(".")[2] != "pt":
        raise TrainerError(
            f"the weights file {weights} does not exist",
            hint="check the path, or give a bucket URI, or a published name such as yolo11n.pt",
            code=ExitCode.CONFIG,
        )
    published = sorted(name for name in GITHUB_ASSETS_NAMES if name.startswith("yolo") and not _OTHER_TASKS.search(name))
    if weights not in published:
        message = unknown_name_message("weights", weights, published)
        raise TrainerError(message, hint="give a published name or the path of a local file", code=ExitCode.CONFIG)
    cached = cache_dir() / "weights" / weights
    if not cached.is_file():
        download_weights(weights, cached)
    return cached


def download_weights(name: str, target: Path) -> None:
    """Fetches published weights. The only place where a fit uses the network."""
    from ultralytics.utils.downloads import attempt_download_asset

    log.info("downloading %s", name)
    partial = target.parent / f".download-{os.getpid()}" / name
    partial.parent.mkdir(parents=True, exist_ok=True)
    os.environ.pop("YOLO_OFFLINE", None)
    try:
        attempt_download_asset(partial)
        partial.replace(target)
    except Exception as exc:  # ConnectionError, URLError, RuntimeError: by the release of Ultralytics
        raise TrainerError(
            f"cannot download the weights {name}: {exc}",
            hint=f"put the file at {target}, or give the path of a local file as weights",
            code=ExitCode.UNAVAILABLE,
        ) from exc
    finally:
        os.environ["YOLO_OFFLINE"] = "true"
        shutil.rmtree(partial.parent, ignore_errors=True)


# --- The model that is handed over -------------------------------------------------------------------

# Of the training's arguments, those that say where things lay.
_PLACES = frozenset({"data", "project", "name", "save_dir", "model", "cfg", "resume", "pretrained", "source", "distill_model", "device"})


def scrub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """The training's arguments without anything that names a place on this machine."""
    from ultralytics.utils import DEFAULT_CFG_KEYS

    kept = {key: value for key, value in arguments.items() if key in DEFAULT_CFG_KEYS}
    scrubbed = {key: None if key in _PLACES else value for key, value in kept.items()}
    return {key: Path(value).name if isinstance(value, str) and os.sep in value else value for key, value in scrubbed.items()}


def load_state(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU, loaded as Ultralytics is set to in this process: restricted, see yolo_weights."""
    from ultralytics.nn.tasks import torch_safe_load

    return torch_safe_load(path)[0]


def export_model(checkpoint: Path, target: Path) -> None:
    """Writes the checkpoint's averaged weights, in half precision, as a file that ``YOLO(target)`` loads.

    Ultralytics embeds the working tree's git origin and absolute paths; they stay behind.
    """
    import io

    import torch
    from ultralytics import __version__

    state = load_state(checkpoint)
    model = state["ema"].half()
    for parameter in model.parameters():
        parameter.requires_grad = False
    arguments = scrub_arguments(dict(state["train_args"]))
    model.args = arguments
    model.criterion = None
    model.yaml = {key: Path(value).name if key == "yaml_file" else value for key, value in model.yaml.items()}
    if hasattr(model, "pt_path"):
        del model.pt_path
    document = {
        "epoch": -1,
        "best_fitness": None,
        "model": model,
        "ema": None,
        "updates": None,
        "optimizer": None,
        "train_args": arguments,
        "train_metrics": {key: float(value) for key, value in state["train_metrics"].items() if value is not None},
        "date": datetime.now().astimezone().isoformat(),
        "version": __version__,
        "license": state.get("license"),
        "docs": state.get("docs"),
    }
    buffer = io.BytesIO()
    torch.save(document, buffer)
    write_atomic(target, buffer.getvalue())
