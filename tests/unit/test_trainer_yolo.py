from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.fit_rig import TINY, epochs_of, make_attempt, make_dataset
from trainer import task
from trainer.contract import ENV_HOME, AttemptLayout, ExitCode, Framework, SplitConfig, Task, TrainConfig, TrainerError
from trainer.frameworks import get_trainer, yolo_model
from trainer.frameworks.yolo_arguments import (
    build_arguments,
    build_augmentations,
    check_params,
    choose_batch,
    choose_device,
    choose_workers,
    known_params,
)
from trainer.stopping import Stopper

# Not importorskip: an import here would come before a fit sets where Ultralytics keeps its settings, and ask the network.
pytestmark = pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra `train`: uv sync --extra train")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ultralytics imported as a fit does, with a home of its own; the environment as it was afterwards."""
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("home")
    os.environ[ENV_HOME] = str(folder)
    yolo_model.import_ultralytics(folder)
    yield folder
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> AttemptLayout:
    """An attempt that was trained for one epoch."""
    layout = make_attempt(tmp_path_factory.mktemp("trained"), epochs=1)
    task.fit(layout)
    return layout


def config(**changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**TINY, **changes})


def refusal(call: Any, *arguments: Any) -> str:
    """Message and hint of the CONFIG error that the call raises."""
    with pytest.raises(TrainerError) as caught:
        call(*arguments)
    assert caught.value.code == ExitCode.CONFIG
    return f"{caught.value.message} | {caught.value.hint}"


# --- Names -----------------------------------------------------------------------------------------------


def test_a_task_that_no_framework_does_is_refused() -> None:
    assert "object-detection" in refusal(get_trainer, Framework.YOLO, Task.POSE_ESTIMATION)
    assert get_trainer(Framework.YOLO, Task.OBJECT_DETECTION).__name__ == "YoloDetection"


def test_models_are_known_by_ultralytics_names_and_as_pico() -> None:
    known = yolo_model.list_models()
    assert {"yolo11n", "yolo26s", "yolo12x", "yolov8n-p2", "yolov10n", "yolov9c", "yolo11-pico", "yolo26-pico"} <= known.keys()
    assert not [name for name in known if "seg" in name or "pose" in name]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("yolo11nn", "'yolo11n'"),
        ("yolo11-piko", "'yolo11-pico'"),
        ("yolo-11n", "'yolo11n'"),
        ("yolo11n-seg", "'yolo11n'"),
        ("yolo11n.pt", "field weights"),
    ],
)
def test_an_unknown_model_names_the_nearest(tmp_path: Path, name: str, near: str) -> None:
    assert near in refusal(yolo_model.resolve_model, name, tmp_path)


@pytest.mark.parametrize("name", ["yolo11n", "yolo26-pico", "yolov10n"])
def test_a_known_model_can_be_built(tmp_path: Path, name: str) -> None:
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(str(yolo_model.resolve_model(name, tmp_path)), nc=2, verbose=False)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size < (1e6 if name.endswith("pico") else 3e6)


def test_a_model_file_must_describe_a_model(tmp_path: Path) -> None:
    assert "does not exist" in refusal(yolo_model.resolve_model, str(tmp_path / "none.yaml"), tmp_path)
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "does not describe a YOLO model" in refusal(yolo_model.resolve_model, str(tmp_path / "list.yaml"), tmp_path)


def test_a_model_file_with_an_unknown_module_is_refused_before_training(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("nc: 2\nbackbone:\n  - [-1, 1, Konv, [16, 3, 2]]\nhead:\n  - [[0], 1, Detect, [nc]]\n")
    layout = make_attempt(tmp_path, model=str(file))
    assert task.run(layout, Stopper()) == ExitCode.CONFIG
    assert "Konv" in (layout / AttemptLayout.FAILURE).read_text()


# --- Settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"mosaik": 1.0}, "did you mean 'mosaic'"),
        ({"close_mosiac": 1}, "did you mean 'close_mosaic'"),
        ({"imgsz": 64}, "use the field image_size"),
        ({"lr0": 0.1}, "use the field learning_rate"),
        ({"data": "coco8.yaml"}, "Trainyard sets it itself"),
        ({"time": 1}, "Trainyard sets it itself"),
        ({"format": "onnx"}, "has no effect"),
        ({"mosaic": 2.0}, "mosaic"),
        ({"close_mosaic": "many"}, "close_mosaic"),
    ],
)
def test_a_wrong_model_param_is_refused(params: dict[str, Any], words: str) -> None:
    assert words in refusal(build_arguments, config(model_params=params), "cpu")


def test_all_settings_of_training_are_known() -> None:
    assert {"mosaic", "warmup_epochs", "lrf", "freeze", "cos_lr", "nbs", "hsv_h", "box", "cls", "dfl", "multi_scale", "cache"} <= set(
        known_params()
    )
    check_params({"mosaic": 0.0, "nbs": 16})


def test_a_learning_rate_is_never_ignored() -> None:
    assert build_arguments(config(learning_rate=0.01), "cpu")["optimizer"] == "AdamW"
    assert build_arguments(config(learning_rate=0.01, optimizer="SGD"), "cpu")["optimizer"] == "SGD"
    arguments = build_arguments(config(learning_rate=None), "cpu")
    assert arguments["optimizer"] == "auto"
    assert "lr0" not in arguments


def test_settings_are_named_as_ultralytics_names_them() -> None:
    arguments = build_arguments(config(seed=7, workers=3, patience=None), "cpu")
    expected = {"seed": 7, "workers": 3, "patience": 0, "amp": False, "deterministic": True, "imgsz": 64, "batch": 8, "plots": False}
    assert expected.items() <= arguments.items()
    assert build_arguments(config(patience=5), "cpu")["patience"] == 5


@pytest.mark.parametrize(("free_mb", "wished", "workers"), [(64, None, 0), (500, None, 2), (2000, None, 4), (None, None, 4), (64, 3, 3)])
def test_loading_processes_find_room_for_their_batches(
    monkeypatch: pytest.MonkeyPatch, free_mb: int | None, wished: int | None, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    wanted = config(workers=wished, batch_size=16, image_size=640)
    assert choose_workers(wanted, free_mb and free_mb * 10**6) == workers


def test_an_automatic_batch_is_measured_on_a_gpu_only() -> None:
    assert (choose_batch("auto", "0"), choose_batch("auto", "cpu"), choose_batch(4, "0")) == (-1, 16, 4)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "use device auto or cpu" in refusal(choose_device, "cuda:0")
    assert choose_device("auto") in ("cpu", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert (choose_device("auto"), choose_device("cuda"), choose_device("cuda:1")) == ("0", "0", "1")
    assert "this machine has 2 GPU(s)" in refusal(choose_device, "cuda:2")
    assert "not supported yet" in refusal(choose_device, "cuda:0,1")


# --- Augmentations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"transform": "HorizontalFlipp"}, "did you mean 'HorizontalFlip'"),
        ({"transform": "Blur", "blur_limits": 3}, "did you mean 'blur_limit'"),
        ({"transform": "Blur", "p": 7}, "Blur refuses its arguments"),
        ({"transform": "Lambda"}, "unknown transform 'Lambda'"),
        ({"transform": "Resize", "height": 32, "width": 32}, "changes the image's shape"),
        ({"transform": "ToFloat"}, "is not 8-bit"),
        ({"p": 0.5}, "needs a transform"),
        ({"transform": "OneOf", "transforms": [{"transform": "Blurr"}]}, "did you mean 'Blur'"),
    ],
)
def test_a_wrong_augmentation_is_refused(spec: dict[str, Any], words: str) -> None:
    assert words in refusal(build_augmentations, [spec], 64)


def test_augmentations_are_built_as_asked() -> None:
    specs: list[dict[str, Any]] = [
        {"transform": "HorizontalFlip", "p": 0.25},
        {"transform": "OneOf", "transforms": [{"transform": "Blur", "blur_limit": [3, 5]}, {"transform": "ToGray"}], "p": 0.5},
    ]
    flip, one_of = build_augmentations(specs, 64)
    assert (flip.p, one_of.p, one_of.transforms[0].blur_limit) == (0.25, 0.5, (3, 5))


# --- Weights ---------------------------------------------------------------------------------------------------


def test_unknown_weights_are_refused_without_the_network() -> None:
    assert "does not exist" in refusal(yolo_model.resolve_weights, "/nowhere/best.pt")
    assert "did you mean 'yolo11n.pt'" in refusal(yolo_model.resolve_weights, "yolo11nn.pt")


def test_published_weights_are_downloaded_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.utils import downloads

    def fail(*_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(downloads, "attempt_download_asset", fail)
    with pytest.raises(TrainerError, match="no route to host") as caught:
        yolo_model.resolve_weights("yolo11n.pt")
    cached = home / "cache" / "weights" / "yolo11n.pt"
    assert caught.value.code == ExitCode.UNAVAILABLE
    assert str(cached) in caught.value.hint
    assert not list(cached.parent.iterdir())
    assert os.environ["YOLO_OFFLINE"] == "true"

    monkeypatch.setattr(downloads, "attempt_download_asset", lambda path: Path(path).write_bytes(b"weights"))
    assert yolo_model.resolve_weights("yolo11n.pt") == cached
    monkeypatch.setattr(downloads, "attempt_download_asset", fail)
    assert yolo_model.resolve_weights("yolo11n.pt").read_bytes() == b"weights"
    cached.unlink()


# --- The model ---------------------------------------------------------------------------------------------------


def test_the_model_predicts_and_knows_its_classes(trained: AttemptLayout) -> None:
    from ultralytics import YOLO

    model: Any = YOLO(str(trained / AttemptLayout.MODEL))
    assert list(model.names.values()) == ["circle", "square", "triangle"]
    image = next((trained.folder.parents[2] / "data").rglob("*.jpg"), None) or next((trained.folder.parents[2] / "data").rglob("*.png"))
    assert len(model.predict(str(image), imgsz=64, verbose=False, save=False)) == 1


def test_the_model_tells_nothing_about_where_it_was_made(trained: AttemptLayout) -> None:
    import torch

    path = trained / AttemptLayout.MODEL
    with zipfile.ZipFile(path) as archive:
        contents = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".pkl"))
    root = Path(__file__).parents[2]
    for place in (str(root), str(trained.folder.parents[2]), str(Path.home()), tempfile.gettempdir() + "/", "site-packages"):
        assert place.encode() not in contents, place
    state = torch.load(path, map_location="cpu", weights_only=False)
    assert "git" not in state
    assert not [value for value in state["train_args"].values() if isinstance(value, str) and "/" in value]
    assert (state["optimizer"], state["ema"]) == (None, None)


def test_a_model_of_ours_is_fine_tuned_on_other_classes_with_other_augmentations(
    trained: AttemptLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import albumentations as A
    from ultralytics import YOLO

    data = make_dataset(tmp_path / "data", train=8, val=4, test=0)
    description = data / "data.yaml"
    text = description.read_text().replace("square", "box").replace("triangle", "tent")
    description.write_text(text)
    applied: list[str] = []
    apply = A.VerticalFlip.apply

    def note(self: Any, *arguments: Any, **named: Any) -> Any:
        applied.append("flip")
        return apply(self, *arguments, **named)

    monkeypatch.setattr(A.VerticalFlip, "apply", note)
    weights = tmp_path / "start.weights"  # any name will do
    weights.write_bytes((trained / AttemptLayout.MODEL).read_bytes())
    layout = make_attempt(
        tmp_path,
        data=data,
        split=SplitConfig.model_validate({"test": 0}),
        epochs=1,
        weights=str(weights),
        augmentations=[{"transform": "VerticalFlip", "p": 1.0}],
        batch_size=4,
    )
    manifest = task.fit(layout)
    assert (manifest.metrics_split, manifest.model) == ("val", "start.weights")
    model: Any = YOLO(str(layout / AttemptLayout.MODEL))
    assert list(model.names.values()) == ["circle", "box", "tent"]
    assert len(applied) > 8


def test_patience_ends_the_training_early_and_the_best_epoch_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics.models.yolo.detect import DetectionTrainer

    validate = DetectionTrainer.validate

    def worsen(self: Any) -> Any:
        metrics, _ = validate(self)
        fitness = 1.0 / (self.epoch + 1)
        self.best_fitness = max(fitness, self.best_fitness or 0.0) if self.epoch else fitness
        return metrics, fitness

    monkeypatch.setattr(DetectionTrainer, "validate", worsen)
    layout = make_attempt(tmp_path, epochs=9, patience=3)
    manifest = task.fit(layout)
    assert (manifest.best_epoch, manifest.epochs) == (1, 4)
    assert epochs_of(layout) == [1, 2, 3, 4]
    assert sorted(path.stem for path in (layout / "checkpoints").glob("*.pt")) == ["epoch-0001", "epoch-0003", "epoch-0004"]
    # A later attempt has nothing left to train, though epochs remain.
    monkeypatch.setattr(task, "train", lambda *_: pytest.fail("it trained"))
    (layout / AttemptLayout.MANIFEST).unlink()
    again = make_attempt(tmp_path, 2, epochs=9, patience=3)
    assert task.fit(again).best_epoch == 1
