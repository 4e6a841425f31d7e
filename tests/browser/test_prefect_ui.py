"""Prefect's own UI in a real browser: the form refuses and submits, the page tells how far and how good, Cancel stops the job."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from blocks.naming import run_id_of_flow_run
from tests.components import npm_folder, npm_install, skip_or_fail
from tests.stack import Stack, running_stack, wait_for

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parent
PACKAGE = Path("tests/browser/package.json")
CACHE = npm_folder("browser")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    """Path of a browser that can be driven; without one the tests skip, or fail where components are required."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    lacking = [name for name, there in (("chromium", found), ("node", shutil.which("node"))) if not there]
    if not (CACHE / "node_modules" / "playwright-core").is_dir():
        lacking.append(f"playwright-core ({npm_install(Path('tests/browser/package.json'), CACHE)})")
    if lacking:
        skip_or_fail(f"not here: {', '.join(lacking)}")
    assert found is not None
    return found


@pytest.fixture(scope="module")
def stack(browser: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("ui")) as made:
        made.start_worker()
        yield made


@pytest.fixture(scope="module")
def shapes(stack: Stack) -> Path:
    from trainer.shapes import write_shapes

    return write_shapes(stack.folder / "data" / "shapes", train=8, val=4, test=4, size=64)


def drive(stack: Stack, browser: str, shapes: Path, folder: Path, *steps: str, epochs: int = 30) -> dict[str, dict[str, Any]]:
    """What the browser told of each step. Its pictures lie in the test's folder."""
    given = {
        "url": stack.environment["PREFECT_API_URL"].removesuffix("/api"),
        "deployment": stack.api("/deployments/name/train/local")["id"],
        "modules": str(CACHE),
        "chromium": browser,
        "profile": str(folder / "profile"),
        "pictures": str(folder),
        "steps": steps,
        "fields": {"Dataset": str(shapes), "Model": "yolo11-pico", "Epochs": epochs, "Image Size": 64, "Batch Size": 4},
    }
    done = subprocess.run(
        ["node", str(HERE / "prefect_ui.mjs"), json.dumps(given)], capture_output=True, text=True, timeout=400, check=False
    )
    told = {line["step"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}\npictures: {folder}"
    return told


def processes_of(run_id: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if run_id in " ".join(process.info["cmdline"] or [])]


def test_form_refuses_submits_and_the_page_tells(stack: Stack, browser: str, shapes: Path, tmp_path: Path) -> None:
    told = drive(stack, browser, shapes, tmp_path, "refuse", "train", epochs=60)
    assert "config.epochs" in told["refused"]["text"]
    assert "minimum of 1" in told["refused"]["text"]
    assert told["refused"]["url"].endswith("/run"), "the form stays, with what was typed"

    flow_run_id = told["submitted"]["id"]
    flow_run = stack.flow_run(flow_run_id)
    assert flow_run["state_type"] == "COMPLETED"
    assert flow_run["parameters"]["config"]["epochs"] == 60
    assert any(tag.startswith("test mAP50 ") for tag in flow_run["tags"])
    artifacts = stack.api("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}}})
    keys = sorted(artifact["key"] for artifact in artifacts)
    assert keys == ["trained-model", "training-metrics", "training-progress", "training-report"], "one of each, however many epochs"
    table = next(json.loads(artifact["data"]) for artifact in artifacts if artifact["key"] == "training-metrics")
    assert [row["epoch"] for row in table] == list(range(60, 0, -1))


def test_cancel_button_stops_the_job(stack: Stack, browser: str, shapes: Path, tmp_path: Path) -> None:
    told = drive(stack, browser, shapes, tmp_path, "cancel")
    flow_run_id = told["submitted-long"]["id"]
    run_id = run_id_of_flow_run(flow_run_id)
    assert stack.wait_final(flow_run_id)["state_type"] == "CANCELLED"
    exit_record = stack.run_file(run_id, "attempts/1/exit.json")
    wait_for("the job's processes are gone", lambda: not processes_of(run_id), 5)
    assert exit_record.stat().st_mtime - told["cancelled"]["at"] < 15, "stopped within 15 s of the click"
    receipt = json.loads(stack.run_file(run_id, "attempts/1/receipt.json").read_text())
    assert receipt["state"] == "cancelled"
    [report] = stack.api("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}, "key": {"any_": ["training-report"]}}})
    for word in ("cancelled", "Cause", "Next", "trainyard resume", "Cost", "epoch-"):
        assert word in report["data"]


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"max_problem_share": 2}, "max_problem_share"),
        ({"max_runtime_seconds": 1}, "max_runtime_seconds"),
        ({"config": {"epochs": "many"}}, "config.epochs"),
        ({"resources": {"accelerator_count": -1}}, "resources.accelerator_count"),
    ],
)
def test_wrong_values_make_no_run(stack: Stack, shapes: Path, parameters: dict[str, Any], named: str) -> None:
    import urllib.error

    with pytest.raises(urllib.error.HTTPError) as refused:
        stack.start_run(dataset=str(shapes), **parameters)
    assert 400 <= refused.value.code < 500
    assert named in refused.value.read().decode()
    refused.value.close()
