"""`trainyard up` in a clean home: UI, worker and command line work; killed parts come back; Ctrl-C spares trainings."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest

from tests.serving import in_thread
from tests.stack import BIN, Stack, free_port, stop, wait_for
from trainer.contract import ExitCode

pytestmark = pytest.mark.e2e

CONFIG: dict[str, Any] = {"model": "yolo11-pico", "epochs": 400, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}
TINY = ["--model", "yolo11-pico", "--batch-size", "4", "--image-size", "64", "--workers", "0", "--device", "cpu"]
READY_SECONDS = 240
TOKEN = "made-up-5d1c"


class Receiver(http.server.BaseHTTPRequestHandler):
    messages: list[dict[str, Any]]

    def do_POST(self) -> None:
        self.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Not into the test's output."""


@pytest.fixture(scope="module")
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    messages: list[dict[str, Any]] = []
    receiver = type("Here", (Receiver,), {"messages": messages})
    with in_thread(http.server.ThreadingHTTPServer(("127.0.0.1", 0), receiver)) as address:
        yield f"{address}/hook/verysecret", messages


def clean_environment(folder: Path) -> dict[str, str]:
    """As on a machine where nobody ever used Prefect."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TRAINYARD_"))}
    (folder / "user").mkdir(exist_ok=True)
    return kept | {"HOME": str(folder / "user"), "TRAINYARD_HOME": str(folder / "home with space")}


class Up:
    """A `trainyard up` in a clean home, and what a test asks of it."""

    def __init__(self, folder: Path, port: int) -> None:
        self.port = port
        self.log = folder / "up.log"
        self.stack = Stack(folder, clean_environment(folder))  # commands find the server by themselves
        self.watched = Stack(folder, {**self.stack.environment, "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"})
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        self.log.write_text("")
        self.process = self.stack.spawn("trainyard", "up", "--port", str(self.port), *options, log="up.log")
        wait_for("`up` is ready", lambda: "\nready: " in self.text() or (self.process and self.process.poll() is not None), READY_SECONDS)
        assert self.process.poll() is None, self.text()

    def text(self) -> str:
        return self.log.read_text()

    def child(self, word: str) -> psutil.Process | None:
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):
                command = child.cmdline()
                if word in command and "start" in command:
                    return child
        return None

    def left(self) -> list[list[str]]:
        """Prefect processes of this home."""
        found: list[list[str]] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("PREFECT_HOME", "").startswith(str(self.stack.folder)) and "trainer" not in process.cmdline():
                    found.append(process.cmdline())
        return [command for command in found if not any(part.startswith("trainer") for part in command)]

    def end(self) -> None:
        self.stack.command("trainyard", "down")
        if self.process is not None and self.process.poll() is None:
            stop(self.process)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, webhook: tuple[str, list[dict[str, Any]]]) -> Iterator[Up]:
    made = Up(tmp_path_factory.mktemp("up"), free_port())
    profile = made.stack.folder / "profile.yaml"
    profile.write_text(f"provider: kubernetes\nnamespace: vision\napi_server: https://cluster\ntoken: {TOKEN}\n")
    saved = made.stack.command("trainyard", "profile", "save", "earlier", "--file", str(profile))
    assert saved.returncode == 0, saved.stderr
    try:
        made.start("--notify", webhook[0])
        yield made
    finally:
        made.end()


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from trainer.shapes import write_shapes

    return write_shapes(tmp_path_factory.mktemp("data") / "shapes", train=8, val=4, test=4, size=64)


def test_one_command_brings_everything(up: Up) -> None:
    assert up.watched.healthy()
    assert up.watched.api("/deployments/name/train/local")["work_pool_name"] == "trainyard-local"
    [schedule] = up.watched.api("/deployments/name/reconcile/local")["schedules"]
    assert schedule["active"] is False, "`up` reconciles by itself"
    wait_for("the worker is online", lambda: up.watched.api("/work_pools/trainyard-local")["status"] == "READY", 60)
    assert up.watched.api("/block_types/slug/trainyard-local")["name"] == "Trainyard Local"
    assert not (Path(up.stack.environment["HOME"]) / ".prefect").exists(), "the user's own Prefect is not touched"
    key = up.stack.home / "prefect" / "encryption.key"
    assert key.stat().st_mode & 0o077 == 0


def test_a_profile_saved_before_up_is_there_and_its_secret_is_not_in_the_database(up: Up) -> None:
    document = up.watched.api("/block_types/slug/trainyard-kubernetes/block_documents/name/earlier?include_secrets=true")
    assert document["data"]["token"] == TOKEN
    found = up.stack.command("trainyard", "profile", "save", "earlier", "--file", str(up.stack.folder / "profile.yaml"))
    assert "temporary" not in found.stderr
    files = list((up.stack.home / "prefect").glob("prefect.db*"))
    assert files
    assert not any(TOKEN.encode() in path.read_bytes() for path in files)


def test_second_up_says_where_the_first_is(up: Up) -> None:
    done = up.stack.command("trainyard", "up", "--port", str(up.port))
    assert done.returncode == 0, done.stderr
    assert up.process is not None
    assert f"http://127.0.0.1:{up.port}" in done.stdout
    assert str(up.process.pid) in done.stdout


def test_port_of_another_is_named(up: Up, tmp_path: Path) -> None:
    done = up.stack.command("trainyard", "up", "--port", str(up.port), TRAINYARD_HOME=str(tmp_path))
    assert done.returncode == ExitCode.OCCUPIED
    assert f"port {up.port}" in done.stderr
    assert "--port" in done.stderr
    assert "Traceback" not in done.stderr


def test_command_line_trains_on_that_server_and_its_news_arrive_once(
    up: Up, shapes: Path, webhook: tuple[str, list[dict[str, Any]]]
) -> None:
    url, messages = webhook
    done = up.stack.command("trainyard", "train", str(shapes), *TINY, "--epochs", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert "temporary" not in done.stderr
    run_id = json.loads(done.stdout)["run_id"]
    names = [run["name"] for run in up.watched.api("/flow_runs/filter", {})]
    assert any(name.endswith(run_id[:6]) for name in names), names

    event = {
        "id": str(uuid4()),
        "event": "trainyard.run.stalled",
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": "trainyard.run.test", "prefect.resource.name": "test"},
        "payload": {"subject": "test stalled", "message": "cause: no step\nnext: look"},
    }
    up.watched.command(
        "python", "-c", f"import httpx; httpx.post({up.watched.environment['PREFECT_API_URL']!r} + '/events', json=[{event!r}])"
    )
    wait_for("the message", lambda: any(message["subject"] == "test stalled" for message in messages), 60)
    wait_for("the run's own news", lambda: any(run_id in message["text"] for message in messages), 60)
    stalled = [message for message in messages if message["subject"] == "test stalled"]
    assert stalled == [{"subject": "test stalled", "text": "cause: no step\nnext: look"}]
    secret = url.rpartition("/")[2]
    logs = (path.read_text(errors="replace") for path in (up.stack.home / "prefect" / "logs").iterdir())
    assert not any(secret in text for text in (*logs, up.text()))
    assert secret not in json.dumps(up.watched.api("/block_documents/filter", {}))


def test_killed_server_and_worker_come_back(up: Up) -> None:
    server, worker = up.child("server"), up.child("worker")
    assert server is not None
    assert worker is not None
    for process in (server, worker):
        process.kill()
    wait_for("the server answers again", up.watched.healthy, 120)

    def new_worker() -> bool:
        found = up.child("worker")
        return found is not None and found.pid != worker.pid

    wait_for("another worker", new_worker, 120)
    assert "the server ended (SIGKILL)" in up.text()
    assert "the worker ended (SIGKILL)" in up.text()


def test_interrupt_stops_server_and_worker_but_not_the_training(up: Up, shapes: Path) -> None:
    flow_run_id = up.watched.start_run(dataset=str(shapes), config=CONFIG)

    def training() -> str:
        rows = json.loads(up.stack.command("trainyard", "runs", "--json").stdout or "[]")
        return next((row["run_id"] for row in rows if row["state"] == "running" and row["epoch"] >= 1), "")

    run_id = wait_for(f"flow run {flow_run_id} trains", training, 180, 2)
    process = up.process
    assert process is not None
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 0
    wait_for("nothing of Prefect is left", lambda: not up.left(), 20)
    assert "still training" in up.text()
    assert run_id in up.text().rpartition("still training")[2]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", up.port)) != 0
    status = json.loads(up.stack.command("trainyard", "status", run_id, "--json").stdout)
    assert status["state"] == "running"

    # Started again, it finds the run, whose own flow run goes on; `down` from elsewhere ends it.
    up.start()
    wait_for("the run has a flow again", lambda: up.watched.flow_run(flow_run_id)["state_type"] == "RUNNING", 120, 1)
    assert up.stack.command("trainyard", "cancel", run_id).returncode == 0
    ended = up.stack.command("trainyard", "down")
    assert ended.returncode == 0, ended.stderr
    assert "stopped the server" in ended.stdout
    assert up.process is not None
    assert up.process.wait(10) == 0
    again = up.stack.command("trainyard", "down")
    assert (again.returncode, again.stdout.strip()) == (0, "nothing runs here: no `trainyard up`")


def test_killed_up_leaves_nothing_that_stands_in_the_way(tmp_path: Path) -> None:
    up = Up(tmp_path, free_port())
    try:
        up.start()
        assert up.process is not None
        up.process.kill()
        up.process.wait()
        assert up.left(), "server and worker outlive it"
        ended = up.stack.command("trainyard", "down")
        assert "was killed" in ended.stdout, ended.stdout + ended.stderr
        wait_for("nothing of Prefect is left", lambda: not up.left(), 20)
    finally:
        up.end()


def test_configured_server_is_left_alone(tmp_path: Path) -> None:
    environment = clean_environment(tmp_path)
    done = subprocess.run(
        [BIN / "trainyard", "up"],
        env={**environment, "PREFECT_API_URL": "http://me:secret@127.0.0.1:9/api"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0
    assert "http://127.0.0.1:9/api" in done.stdout
    assert "trainyard install" in done.stdout
    assert "secret" not in done.stdout
