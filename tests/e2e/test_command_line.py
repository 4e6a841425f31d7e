"""The `trainyard` command as a person uses it: bad input told in one screen, cancel and resume, the queue, profiles."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.stack import BIN, Stack, stop, wait_for
from trainer.contract import ExitCode

pytestmark = pytest.mark.e2e

TINY = ["--model", "yolo11-pico", "--batch-size", "4", "--image-size", "64", "--workers", "0", "--device", "cpu"]


def run_folders(stack: Stack) -> set[Path]:
    folder = stack.home / "runs"
    return set(folder.iterdir()) if folder.exists() else set()


def told(done: subprocess.CompletedProcess[str]) -> str:
    """The one screen: cause and next step, no traceback."""
    text = done.stderr
    assert "Traceback" not in text, text
    assert "error: " in text
    assert len(text.splitlines()) <= 24, text
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        (["train", "{missing}"], ExitCode.NOT_FOUND, "missing"),
        (["train", "{shapes}", "--weights", "{missing}/best.pt"], ExitCode.NOT_FOUND, "no file"),
        (["train", "{shapes}", "--augmentations", "no-such.json"], ExitCode.CONFIG, "neither JSON nor a file"),
        (["train", "{shapes}", "--model-param", "mosaic={{"], ExitCode.CONFIG, "is no value"),
        (["train", "{empty}"], ExitCode.DATA, "empty"),
        (["train", "{polygons}"], ExitCode.DATA, "instance-segmentation"),
        (["train", "{shapes}", "--epochs", "0"], ExitCode.CONFIG, "epochs: Input should be greater"),
        (["train", "{shapes}", "--image-size", "100"], ExitCode.CONFIG, "image_size"),
        (["train", "{shapes}", "--device", "gpu"], ExitCode.CONFIG, "device"),
        (["train", "{shapes}", "--file", "{unknown_field}"], ExitCode.CONFIG, "did you mean 'epochs'"),
        (["train", "{shapes}", "--output", "{a_file}/runs"], ExitCode.OCCUPIED, "cannot write"),
        (["train", "{shapes}", "--profile", "nobody"], ExitCode.CONFIG, "no profile"),
        (["train", "{shapes}", "--task", "pose-estimation"], ExitCode.CONFIG, "pose-estimation"),
        (["dataset", "check", "{missing}"], ExitCode.NOT_FOUND, "missing"),
        (["status", "zzzz"], ExitCode.NOT_FOUND, "no run begins"),
        (["logs", "../../etc"], ExitCode.NOT_FOUND, "not a run id"),
    ],
)
def test_bad_input_is_refused_in_one_screen(
    stack: Stack, shapes: Path, tmp_path: Path, arguments: list[str], code: ExitCode, cause: str
) -> None:
    places = make_bad_places(tmp_path) | {"shapes": shapes}
    before = run_folders(stack)
    done = stack.command("trainyard", *(argument.format(**places) for argument in arguments))
    assert done.returncode == code, done.stderr
    assert cause in told(done)
    assert "next: " in done.stderr
    assert run_folders(stack) == before, "nothing half-written"


def make_bad_places(folder: Path) -> dict[str, Path]:
    from trainer.shapes import write_shapes

    (folder / "empty").mkdir()
    polygons = write_shapes(folder / "polygons", train=4, val=2, test=2, size=64)
    for label in polygons.rglob("labels/**/*.txt"):
        label.write_text("0 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n")
    (folder / "unknown.yaml").write_text("epoch: 3\n")
    (folder / "file").write_text("")
    return {
        "missing": folder / "missing",
        "empty": folder / "empty",
        "polygons": polygons,
        "unknown_field": folder / "unknown.yaml",
        "a_file": folder / "file",
    }


def test_unknown_model_setting_is_refused_before_training(stack: Stack, shapes: Path) -> None:
    done = stack.command("trainyard", "train", str(shapes), *TINY, "--epochs", "1", "--model-param", "mosaik=0.5")
    assert done.returncode == ExitCode.CONFIG, done.stderr
    assert "mosaic" in done.stderr


def test_cancel_keeps_a_receipt_and_resume_goes_on(stack: Stack, shapes: Path) -> None:
    """Cancelled without a flow alive; then resumed: a second attempt that goes on from the checkpoint, to the end."""
    before = run_folders(stack)
    arguments = ["train", str(shapes), *TINY, "--epochs", "40", "--name", "to-resume"]
    first = stack.spawn("trainyard", *arguments, log="cancel.log")
    [folder] = wait_for("the run's folder", lambda: run_folders(stack) - before, 120)
    progress = folder / "attempts/1/progress.jsonl"
    wait_for("three epochs", lambda: progress.exists() and len(progress.read_text().splitlines()) >= 3, 120)
    stop(first)
    done = stack.command("trainyard", "cancel", folder.name, "--why", "test", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "cancelled"
    receipt = json.loads((folder / "attempts/1/receipt.json").read_text())
    assert receipt["state"] == "cancelled"
    assert receipt["why"] == "test"
    outcome = json.loads((folder / "attempts/1/outcome.json").read_text())
    assert outcome["result"]["outcome"] == "partial"
    assert stack.command("trainyard", "cancel", folder.name).returncode == 0, "cancelling twice is fine"

    resumed = stack.command("trainyard", "resume", folder.name, "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["run_id"] == folder.name
    epochs = [json.loads(line)["epoch"] for line in (folder / "attempts/2/progress.jsonl").read_text().splitlines()]
    assert epochs[0] == outcome["result"]["epochs"] + 1
    assert epochs[-1] == 40


def test_second_training_waits_visibly_and_both_end(stack: Stack, shapes: Path) -> None:
    before = run_folders(stack)
    first = stack.spawn("trainyard", "train", str(shapes), *TINY, "--epochs", "60", log="queue.log")
    [holder] = wait_for("the first run's folder", lambda: run_folders(stack) - before, 120)
    wait_for("the first trains", (holder / "attempts/1/progress.jsonl").exists, 120)
    second = stack.spawn("trainyard", "train", str(shapes), *TINY, "--epochs", "1", log="queue.log")
    [waiter] = wait_for("the second run's folder", lambda: run_folders(stack) - before - {holder}, 120)

    def queued() -> dict[str, Any] | None:
        seen = stack.command("trainyard", "status", waiter.name, "--json")
        row = json.loads(seen.stdout) if seen.returncode == 0 else {}
        return row if row.get("state") == "queued" else None

    row = wait_for("the second is queued", queued, 60)
    assert holder.name in row["message"]
    assert first.wait(120) == 0
    assert second.wait(120) == 0


def test_interrupt_detaches_and_says_how_to_go_on(stack: Stack, shapes: Path) -> None:
    before = run_folders(stack)
    first = stack.spawn("trainyard", "train", str(shapes), *TINY, "--epochs", "41", log="interrupt.log")
    [folder] = wait_for("the run's folder", lambda: run_folders(stack) - before, 120)
    wait_for("training", (folder / "attempts/1/progress.jsonl").exists, 120)
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == ExitCode.CANCELLED
    text = (stack.folder / "interrupt.log").read_text()
    assert f"trainyard cancel {folder.name}" in text
    assert not (folder / "attempts/1/exit.json").exists(), "the training goes on"
    assert stack.command("trainyard", "cancel", folder.name).returncode == 0


@pytest.mark.usefixtures("worker")
def test_profile_saved_in_prefect_is_used_by_name(stack: Stack, shapes: Path, tmp_path: Path) -> None:
    """Blocks register, a profile is saved through the API as the UI does, and a run of the deployment names it."""
    assert stack.command("prefect", "block", "register", "-m", "blocks.profiles").returncode == 0
    kind = stack.api("/block_types/slug/trainyard-local")
    schema = stack.api("/block_schemas/filter", {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}})[0]
    document = {"name": "roomy", "block_type_id": kind["id"], "block_schema_id": schema["id"]}
    stack.api("/block_documents/", document | {"data": {"slots": 2, "output": str(tmp_path / "elsewhere"), "min_free_gib": 0.5}})
    stack.api("/block_documents/", document | {"name": "full", "data": {"slots": 1, "min_free_gib": 1e9}})

    config = {"model": "yolo11-pico", "epochs": 1, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}
    good = stack.start_run(dataset=str(shapes), config=config, profile="roomy")
    assert stack.wait_final(good)["state_type"] == "COMPLETED"
    assert list((tmp_path / "elsewhere").glob("*/attempts/1/model/model.pt"))

    checked = stack.command("trainyard", "check", "full")
    assert checked.returncode == ExitCode.CONFIG
    assert "GiB free" in checked.stdout
    bad = stack.start_run(dataset=str(shapes), config=config, profile="full")
    final = stack.wait_final(bad)
    assert final["state_type"] == "FAILED"
    assert "GiB free" in final["state"]["message"]


def test_listing_needs_neither_server_nor_prefect(stack: Stack) -> None:
    script = "import sys; from flows.cli import app; app(['runs'], standalone_mode=False); sys.exit('prefect' in sys.modules)"
    dead = {**stack.environment, "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run([sys.executable, "-P", "-c", script], env=dead, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (BIN / "trainyard").exists()
