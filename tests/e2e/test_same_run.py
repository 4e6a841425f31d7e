"""The same request twice within a second, and run keys: one run, one job, and everybody gets its result."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import time
from contextlib import suppress
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


def claims(stack: Stack) -> set[Path]:
    return set((stack.home / "claims").glob("*.json"))


def start_two(stack: Stack, *arguments: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [str(BIN / "trainyard"), *arguments],
            cwd=stack.folder,
            env=stack.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]


def results_of(pair: list[subprocess.Popen[str]]) -> list[dict[str, Any]]:
    """Both end well, each with the one object on its standard output."""
    told = [process.communicate(timeout=240) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], told
    return [json.loads(output) for output, _ in told]


def one_job(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "attempts").iterdir()) == ["1"]
    events = [json.loads(path.read_text()) for path in (folder / "events").iterdir()]
    assert len({event["data"]["native_id"] for event in events if event["kind"] == "submitted"}) == 1
    log = (folder / "attempts/1/progress.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == list(range(1, len(log) + 1))


def test_the_same_command_twice_at_once_is_one_run(stack: Stack, shapes: Path) -> None:
    before = run_folders(stack)
    claims_before = claims(stack)  # of commands that other tests have killed
    arguments = ("train", str(shapes), *TINY, "--epochs", "3", "--seed", "11", "--json")
    first, second = results_of(start_two(stack, *arguments))
    assert first == second
    [folder] = run_folders(stack) - before
    assert first["run_id"] == folder.name
    one_job(folder)
    assert claims(stack) <= claims_before, "nobody claims this request any more"
    third = stack.command("trainyard", *arguments)
    assert json.loads(third.stdout)["run_id"] != folder.name, "that run is over: the same command trains anew"


def test_a_run_key_is_one_run_for_ever(stack: Stack, shapes: Path, tmp_path: Path) -> None:
    dataset = shutil.copytree(shapes, tmp_path / "keyed")
    before = run_folders(stack)
    arguments = ("train", str(dataset), *TINY, "--epochs", "2", "--run-key", "commit-1", "--json")
    first, second = results_of(start_two(stack, *arguments))
    assert first == second
    [folder] = run_folders(stack) - before
    one_job(folder)
    # Over: told from the record, so that not even a server is asked.
    again = stack.command("trainyard", *arguments, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == first

    other = stack.command("trainyard", "train", str(dataset), *TINY, "--epochs", "3", "--run-key", "commit-1")
    assert other.returncode == ExitCode.CONFIG
    assert "config.epochs: 2 -> 3" in " ".join(other.stderr.split())
    elsewhere = stack.command("trainyard", "train", str(shapes), *TINY, "--epochs", "2", "--run-key", "commit-1")
    assert elsewhere.returncode == ExitCode.CONFIG
    assert f"dataset: '{dataset}' -> '{shapes}'" in " ".join(elsewhere.stderr.split())
    both = stack.command("trainyard", *arguments, "--new")
    assert both.returncode == ExitCode.USAGE

    image = next(dataset.rglob("images/train/*.jpg"))
    shutil.copy(image, image.with_name("one-more.jpg"))
    more = stack.command("trainyard", *arguments)
    assert more.returncode == ExitCode.CONFIG
    assert "images/train/one-more.jpg came to the dataset" in " ".join(more.stderr.split())
    image.with_name("one-more.jpg").unlink()
    image.write_bytes(next(dataset.rglob("images/val/*.jpg")).read_bytes())
    changed = stack.command("trainyard", *arguments)
    assert changed.returncode == ExitCode.CONFIG
    assert f"{image.relative_to(dataset)} changed" in " ".join(changed.stderr.split())
    assert run_folders(stack) - before == {folder}


class Terminal:
    """A command in a terminal of its own, and what it showed there."""

    def __init__(self, stack: Stack, *arguments: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.chdir(stack.folder)
            os.execve(BIN / "trainyard", ["trainyard", *arguments], {**stack.environment, "TERM": "xterm"})
        os.set_blocking(self.descriptor, False)
        self.shown = b""

    def read(self) -> str:
        with suppress(OSError):  # nothing new, or its end
            while data := os.read(self.descriptor, 65536):
                self.shown += data
        return self.shown.decode(errors="replace")

    def type(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)

    def wait_for_text(self, text: str, seconds: float = 60) -> None:
        wait_for(repr(text), lambda: text in self.read(), seconds, 0.1)

    def end(self, seconds: float = 60) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.read()
                os.close(self.descriptor)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        raise AssertionError(f"it did not end: {self.read()}")


@pytest.mark.parametrize(("seed", "keys", "cancelled"), [("21", b"c\n", True), ("22", b"\n", False), ("23", b"\x03", False)])
def test_ctrl_c_in_a_terminal_asks_once(stack: Stack, shapes: Path, seed: str, keys: bytes, cancelled: bool) -> None:
    before = run_folders(stack)
    terminal = Terminal(stack, "train", str(shapes), *TINY, "--epochs", "500", "--seed", seed)
    [folder] = wait_for("the run's folder", lambda: (terminal.read(), run_folders(stack) - before)[1], 120)
    wait_for("training", lambda: (terminal.read(), (folder / "attempts/1/progress.jsonl").exists())[1], 120)
    terminal.type(b"\x03")
    terminal.wait_for_text("[c]ancel it?")
    terminal.type(keys)
    assert terminal.end() == ExitCode.CANCELLED
    shown = terminal.read()
    assert "Traceback" not in shown
    if cancelled:
        assert f"run {folder.name} is cancelled, after epoch" in shown
        assert json.loads((folder / "attempts/1/receipt.json").read_text())["why"] == "Ctrl-C"
    else:
        assert f"trainyard cancel {folder.name}" in shown
        assert not (folder / "attempts/1/exit.json").exists(), "the training goes on"
        assert stack.command("trainyard", "cancel", folder.name).returncode == 0


def test_log_is_followed_over_attempts_to_the_end_of_the_run(stack: Stack, shapes: Path) -> None:
    """The trainer is killed, the flow goes on with a second attempt, and so does `logs -f`."""
    import psutil

    before = run_folders(stack)
    training = stack.spawn("trainyard", "train", str(shapes), *TINY, "--epochs", "60", "--seed", "31", log="follow.log")
    [folder] = wait_for("the run's folder", lambda: run_folders(stack) - before, 120)
    wait_for("training", (folder / "attempts/1/progress.jsonl").exists, 120)
    follower = stack.spawn("trainyard", "logs", "-f", folder.name, log="followed.log")
    followed = stack.folder / "followed.log"
    wait_for("the log", lambda: followed.stat().st_size > 0, 60)
    mine = [p for p in psutil.process_iter(["cmdline"]) if str(folder) in " ".join(p.info["cmdline"] or [])]
    for process in mine:
        process.kill()
    assert training.wait(180) == 0
    assert follower.wait(60) == 0
    text = followed.read_text()
    assert "--- attempt 2 ---" in text
    assert (folder / "attempts/2/logs/trainer.log").read_text().splitlines()[-1] == text.splitlines()[-1]


@pytest.mark.full
def test_a_server_that_dies_is_told_and_the_training_goes_on(stack: Stack, shapes: Path, tmp_path: Path) -> None:
    """A server of this test's own; the command line survives it without a traceback."""
    from tests.stack import free_port

    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    quick = {"PREFECT_CLIENT_MAX_RETRIES": "1"}
    own = Stack(tmp_path, {**stack.environment, "PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": url, **quick})
    server = own.spawn("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), log="server.log")
    try:
        wait_for("the server answers", own.healthy, 180)
        before = run_folders(stack)
        command = own.spawn("trainyard", "train", str(shapes), *TINY, "--epochs", "25", "--seed", "41", log="orphan.log")
        [folder] = wait_for("the run's folder", lambda: run_folders(stack) - before, 120)
        wait_for("training", (folder / "attempts/1/progress.jsonl").exists, 120)
    finally:
        stop(server)
    code = command.wait(240)
    text = (tmp_path / "orphan.log").read_text()
    assert "Traceback" not in text, text
    assert "EventsWorker" not in text, text
    assert (folder / "attempts/1/exit.json").exists() or code == ExitCode.UNAVAILABLE
    assert code in (ExitCode.OK, ExitCode.UNAVAILABLE), text
    if code == ExitCode.UNAVAILABLE:
        assert f"trainyard logs -f {folder.name}" in text
        assert stack.command("trainyard", "cancel", folder.name).returncode == 0
