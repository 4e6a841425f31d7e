from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.fit_rig import make_attempt
from trainer import task
from trainer.contract import ENV_HOME, AttemptLayout, ExitCode, TrainerError
from trainer.frameworks import yolo_model, yolo_weights
from trainer.frameworks.yolo_weights import Rehearsal, adopt_weights, restrict_loading
from trainer.stopping import Stopper

pytestmark = pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra `train`: uv sync --extra train")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = dict(os.environ)
    folder = tmp_path_factory.mktemp("home")
    os.environ[ENV_HOME] = str(folder)
    yolo_model.import_ultralytics(folder)
    restrict_loading(restricted=True)
    yield folder
    restrict_loading(restricted=True)
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    return tmp_path / "exploded"


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.makedirs, (os.environ["BOMB"],))


class Getattr:
    """Reaches a function by way of the one call of getattr that older checkpoints need."""

    def __reduce__(self) -> tuple[Any, ...]:
        from ultralytics.nn.tasks import DetectionModel

        return (getattr, (DetectionModel, "load"))


class Built:
    """Calls a model class, which a checkpoint never does: it would read, or fetch, the file it is given."""

    def __reduce__(self) -> tuple[Any, ...]:
        from ultralytics.nn.tasks import DetectionModel

        return (DetectionModel, ("https://example.invalid/model.yaml",))


def detection_model(**changes: Any) -> Any:
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel("yolo11n.yaml", nc=2, verbose=False)
    for name, value in changes.items():
        setattr(model, name, value)
    return model


def save(path: Path, state: Any) -> Path:
    import torch

    torch.save(state, path)
    return path


def refusal(path: Path, folder: Path, *, trust: bool = False) -> str:
    with pytest.raises(TrainerError) as caught:
        adopt_weights(path, folder, trust=trust)
    assert caught.value.code == ExitCode.CONFIG
    assert path.name in caught.value.message
    return f"{caught.value.message} | {caught.value.hint}"


# --- Pickles that run code ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bomb", "named"),
    [(Bomb, "os.makedirs"), (Getattr, "'load'"), (Built, "a call of ultralytics.nn.tasks.DetectionModel")],
)
def test_a_file_that_would_run_code_is_refused_and_the_culprit_named(tmp_path: Path, marker: Path, bomb: type, named: str) -> None:
    text = refusal(save(tmp_path / "evil.pt", {"model": bomb()}), tmp_path / "work")
    assert named in text
    assert "--trust-weights" in text
    assert not marker.exists()
    assert not (tmp_path / "work").exists()


def test_code_beside_a_real_model_is_refused(tmp_path: Path, marker: Path) -> None:
    path = save(tmp_path / "mixed.pt", {"model": detection_model(), "train_args": {"x": [Bomb()]}})
    assert "os.makedirs" in refusal(path, tmp_path / "work")
    assert not marker.exists()


def test_trust_loads_it(tmp_path: Path, marker: Path) -> None:
    path = save(tmp_path / "mine.pt", {"model": detection_model(), "x": Bomb()})
    try:
        restrict_loading(restricted=False)
        adopt_weights(path, tmp_path / "work", trust=True)
    finally:
        restrict_loading(restricted=True)
    assert marker.exists()


def test_a_fit_refuses_the_file_and_with_trust_trains_on_it(tmp_path: Path, marker: Path) -> None:
    weights = save(tmp_path / "mine.pt", {"model": detection_model(), "x": Bomb()})
    layout = make_attempt(tmp_path / "refused", weights=str(weights), epochs=1)
    assert task.run(layout, Stopper()) == ExitCode.CONFIG
    failure = json.loads((layout / AttemptLayout.FAILURE).read_text())
    assert "os.makedirs" in failure["message"]
    assert "--trust-weights" in failure["hint"]
    assert not marker.exists()

    trusted = make_attempt(tmp_path / "trusted", weights=str(weights), epochs=1, trust_weights=True)
    # The file makes the folder once per load, and a second time would fail.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "makedirs", lambda path, *_a, **_k: Path(path).mkdir(parents=True, exist_ok=True))
        assert task.run(trusted, Stopper()) == ExitCode.OK
    assert marker.exists()
    restrict_loading(restricted=True)


def test_the_description_inside_a_model_is_not_evaluated(tmp_path: Path, marker: Path) -> None:
    model = detection_model()
    model.yaml["activation"] = "__import__('os').makedirs(__import__('os').environ['BOMB'])"
    weights = save(tmp_path / "yaml.pt", {"model": model})
    layout = make_attempt(tmp_path, weights=str(weights), epochs=1)
    assert task.run(layout, Stopper()) != ExitCode.OK
    assert not marker.exists()


def test_a_file_swapped_after_the_check_is_not_what_is_loaded(tmp_path: Path, marker: Path) -> None:
    path = save(tmp_path / "good.pt", {"model": detection_model()})
    copy = adopt_weights(path, tmp_path / "work", trust=False)
    save(path, {"model": Bomb()})
    assert yolo_model.load_state(copy)["model"].yaml
    assert copy.stat().st_mode & 0o077 == 0
    assert not marker.exists()


# --- Files that are no weights -------------------------------------------------------------------------------


def test_a_file_that_is_no_checkpoint_is_named_with_what_it_is(tmp_path: Path, marker: Path) -> None:
    import torch

    good = save(tmp_path / "good.pt", {"model": detection_model()}).read_bytes()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("a/readme.txt", "hello")
    wrong = {
        "text.pt": (b"not weights", "no zip archive"),
        "empty.pt": (b"", "no zip archive"),
        "pickle.pt": (pickle.dumps(Bomb()), "no zip archive"),
        "archive.pt": (archive.getvalue(), "without data.pkl"),
        "short.pt": (good[: len(good) // 2], "damaged or cut short"),
    }
    for name, (data, words) in wrong.items():
        (tmp_path / name).write_bytes(data)
        assert words in refusal(tmp_path / name, tmp_path / "work"), name
    assert "no Ultralytics model" in refusal(save(tmp_path / "other.pt", {"weights": torch.zeros(3)}), tmp_path / "work")
    assert "no Ultralytics model" in refusal(save(tmp_path / "state.pt", OrderedDict(a=torch.zeros(3))), tmp_path / "work")
    assert not marker.exists()


def test_weights_of_another_task_are_refused(tmp_path: Path) -> None:
    from ultralytics.nn.tasks import ClassificationModel

    path = save(tmp_path / "cls.pt", {"model": ClassificationModel("yolo11n-cls.yaml", nc=2, verbose=False)})
    assert "task 'classify', not for detection" in refusal(path, tmp_path / "work")


def test_a_model_of_ours_that_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "1" / AttemptLayout.MODEL
    path.parent.mkdir(parents=True)
    save(path, {"model": detection_model()})
    manifest = tmp_path / "1" / AttemptLayout.MANIFEST
    manifest.write_text(json.dumps({"files": {AttemptLayout.MODEL: {"sha256": "0" * 64, "bytes": 1}}}))
    assert "changed since it was written" in refusal(path, tmp_path / "work")
    manifest.write_text("{}")
    assert adopt_weights(path, tmp_path / "work", trust=False).is_file()


# --- What real checkpoints hold --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["yolov8n", "yolo11n", "yolo26n"])
@pytest.mark.parametrize("task_name", ["Detection", "Segmentation", "Classification", "Pose", "OBB"])
def test_models_of_every_task_pass_the_check(tmp_path: Path, family: str, task_name: str) -> None:
    import numpy as np
    from ultralytics.nn import tasks
    from ultralytics.utils import DEFAULT_CFG

    suffix = {"Detection": "", "Segmentation": "-seg", "Classification": "-cls", "Pose": "-pose", "OBB": "-obb"}[task_name]
    model = getattr(tasks, f"{task_name}Model")(f"{family}{suffix}.yaml", verbose=False)
    model.args = DEFAULT_CFG
    model.criterion = model.init_criterion()
    state = {"model": model.half(), "ema": None, "train_metrics": {"fitness": np.float64(0.5)}, "train_args": {"project": Path("/p")}}
    path = save(tmp_path / "model.pt", state)
    rehearsal = Rehearsal()
    rehearsal.play(yolo_weights.read_pickle(path, path.read_bytes()))
    assert rehearsal.find_forbidden() == []
    assert yolo_model.load_state(path)["model"].yaml


@pytest.mark.parametrize("family", ["yolov3-tiny", "yolov5n", "yolov6n", "yolov8n-p2", "yolov9t", "yolov10n", "yolo12n"])
def test_detection_models_of_every_family_are_adopted(tmp_path: Path, family: str) -> None:
    from ultralytics.nn.tasks import DetectionModel

    path = save(tmp_path / f"{family}.pt", {"model": DetectionModel(f"{family}.yaml", verbose=False)})
    assert adopt_weights(path, tmp_path / "work", trust=False).is_file()
