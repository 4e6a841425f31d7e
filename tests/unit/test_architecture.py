"""What the import contracts in pyproject cannot say: file names, what an import loads, the size of files.

Modules are found by globbing, so a module that does not exist yet is simply not checked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ["flows", "blocks", "trainer"]

SDKS = {"prefect", "prefect_aws", "prefect_azure", "prefect_gcp", "prefect_kubernetes", "boto3", "botocore", "sagemaker", "google"}
SDKS |= {"vertexai", "azure", "kubernetes", "kubernetes_asyncio", "docker"}
FRAMEWORKS = {"torch", "torchvision", "ultralytics", "rfdetr", "albumentations", "cv2", "supervision", "transformers"}
DEPENDENCIES = {"click", "fastapi", "numpy", "obstore", "PIL", "psutil", "pydantic", "pytest", "rich", "yaml"}

# Prefect is at home here. Whatever else is in flows/ (cli*.py) and blocks/ must do without.
WITH_PREFECT = {"blocks.profiles"}
# The training process itself; the rest of trainer/ also serves the control side and must be light.
WITH_FRAMEWORK = ("trainer.task", "trainer.checkpoint", "trainer.frameworks.")

LINE_BUDGET = 400
OVER_BUDGET: dict[str, str] = {}  # path -> why it may be longer


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def light_modules() -> list[str]:
    """Every module that must load neither Prefect nor an SDK nor a training framework."""
    names = [name for path in python_files(*ROOMS) if is_light(name := module_name(path))]
    # The command line goes first, so that what it loads is not hidden by what another module loaded before.
    return sorted(names, key=lambda name: name != "flows.cli")


def is_light(name: str) -> bool:
    if name.startswith("flows."):
        return name.startswith("flows.cli")
    return name not in WITH_PREFECT and not name.startswith(WITH_FRAMEWORK)


PROBE = """
import importlib, json, sys, traceback
names, watched = json.loads(sys.argv[1])
loaded, broken = {}, {}
seen = {module.partition(".")[0] for module in sys.modules}
for name in names:
    try:
        importlib.import_module(name)
    except BaseException:
        broken[name] = traceback.format_exc(limit=-3)
    new = {module.partition(".")[0] for module in sys.modules} & set(watched) - seen
    seen |= new
    if new:
        loaded[name] = sorted(new)
print(json.dumps([loaded, broken]))
"""


@pytest.fixture(scope="module")
def probed() -> tuple[dict[str, list[str]], dict[str, str]]:
    """What importing each light module brought in first, and what did not import; measured in one fresh process."""
    question = json.dumps([light_modules(), sorted(SDKS | FRAMEWORKS)])
    done = subprocess.run([sys.executable, "-c", PROBE, question], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded, broken = json.loads(done.stdout.splitlines()[-1])
    return loaded, broken


def test_light_modules_import(probed: tuple[dict[str, list[str]], dict[str, str]]) -> None:
    _, broken = probed
    assert not broken, "\n\n".join(f"import {name}:\n{trace}" for name, trace in broken.items())


def test_light_modules_load_neither_prefect_nor_an_sdk_nor_a_framework(probed: tuple[dict[str, list[str]], dict[str, str]]) -> None:
    loaded, _ = probed
    assert not loaded, "\n".join(
        f"import {name} loads {', '.join(roots)}: move that import into a function" for name, roots in loaded.items()
    )


@pytest.mark.parametrize("room", ROOMS)
def test_no_file_is_named_like_somebody_elses_module(room: str) -> None:
    # Running a flow by path puts its folder first on sys.path: a queue.py there would be everybody's queue.
    taken = sys.stdlib_module_names | SDKS | FRAMEWORKS | DEPENDENCIES | set(ROOMS)
    names = {path: path.parent.name if path.name == "__init__.py" else path.stem for path in python_files(room)}
    assert [str(path.relative_to(ROOT)) for path, name in names.items() if name in taken and name != room] == []


def test_files_stay_within_the_line_budget() -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files(*ROOMS, "tests", "deployments", "docker")
    }
    over = {name: count for name, count in lines.items() if count > LINE_BUDGET}
    assert {name: count for name, count in over.items() if name not in OVER_BUDGET} == {}, f"split them: at most {LINE_BUDGET} lines"
    assert set(OVER_BUDGET) <= set(over), "these are within the budget again; take them off the list"
