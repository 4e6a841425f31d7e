"""`trainyard install` on a team's server: PostgreSQL, a password, a worker elsewhere; and servers that cannot be used."""

from __future__ import annotations

import http.server
import json
import os
import pwd
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.components import skip_or_fail
from tests.serving import in_thread
from tests.stack import BIN, Stack, free_port, stop, wait_for
from trainer.contract import ExitCode

pytestmark = pytest.mark.e2e

CONFIG: dict[str, Any] = {"model": "yolo11-pico", "epochs": 1, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}
PASSWORD = "team:correct horse"
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TRAINYARD_"))}


def find_postgres() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    on_path = shutil.which("initdb")
    folder = found[-1].parent if found else Path(on_path).resolve().parent if on_path else None
    if folder is None or not (folder / "postgres").exists():
        skip_or_fail("PostgreSQL is missing: apt-get install postgresql")
    return folder


def ordinary_user() -> str | None:
    """PostgreSQL refuses to run as root; who is root runs it as `postgres`, or as `nobody`."""
    if os.getuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an empty database on loopback."""
    binaries = find_postgres()
    user = ordinary_user()
    folder = tmp_path_factory.mktemp("postgres")
    data, port = folder / "data", free_port()
    if user is not None:
        shutil.chown(folder, user)
        # pytest's own folders: one more of them where several processes test.
        for parent in folder.parents:
            if parent.stat().st_uid == os.getuid() and parent.is_relative_to(tmp_path_factory.getbasetemp().parents[1]):
                parent.chmod(parent.stat().st_mode | 0o011)

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=folder, user=user, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    run(str(binaries / "initdb"), "-D", str(data), "-U", "trainyard", "--auth=trust", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [str(binaries / "postgres"), "-D", str(data), *options.split(" ")],
            cwd=folder,
            user=user,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
        )
    try:
        ask = [str(binaries / "pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
        wait_for("PostgreSQL", lambda: subprocess.run(ask, capture_output=True, check=False).returncode == 0, 60)
        run(str(binaries / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "trainyard", "prefect")
        yield f"postgresql+asyncpg://trainyard@127.0.0.1:{port}/prefect"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, database: str) -> Iterator[Stack]:
    """A server with a password, on PostgreSQL; the environment is that of a member of the team."""
    folder = tmp_path_factory.mktemp("team")
    port = free_port()
    common = {**ENVIRONMENT, "PREFECT_HOME": str(folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DO_NOT_TRACK": "1"}
    server_side = Stack(
        folder,
        {
            **common,
            "PREFECT_API_DATABASE_CONNECTION_URL": database,
            "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        },
    )
    member = {
        **common,
        "PREFECT_HOME": str(folder / "member"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_API_AUTH_STRING": PASSWORD,
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "TRAINYARD_HOME": str(folder / "home"),
    }
    made = Stack(folder, member)
    server = server_side.spawn("prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), log="server.log")
    try:
        wait_for("the server answers", lambda: made.command("trainyard", "install", timeout=60).returncode != ExitCode.UNAVAILABLE, 240, 1)
        yield made
    finally:
        for process in [*made.workers, server]:
            stop(process)


def outcomes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(line.rsplit(": ", 1) for line in done.stdout.splitlines() if ": " in line and "done." not in line)


def count_automations(team: Stack) -> int:
    done = team.command("prefect", "automation", "ls", COLUMNS="200")
    assert done.returncode == 0, done.stderr
    return done.stdout.count("trainyard:")


def test_installed_twice_it_is_there_once_and_trains(team: Stack, tmp_path: Path) -> None:
    notify = ("--notify", "http://127.0.0.1:9/verysecret")
    first = team.command("trainyard", "install", *notify)
    assert outcomes(first)["automation   trainyard: a run failed"] in ("made", "unchanged")
    second = team.command("trainyard", "install", *notify)
    assert set(outcomes(second).values()) == {"unchanged"}, second.stdout
    assert "verysecret" not in first.stdout + first.stderr + second.stdout + second.stderr
    assert count_automations(team) == 4
    inspected = team.command("prefect", "deployment", "inspect", "reconcile/local", "--output", "json")
    assert '"active": true' in inspected.stdout, "nobody else looks after open runs here"

    from trainer.shapes import write_shapes

    shapes = write_shapes(tmp_path / "shapes", train=8, val=4, test=4, size=64)
    team.start_worker()
    trained = team.command(
        *(
            "prefect",
            "deployment",
            "run",
            "train/local",
            "--watch",
            "--param",
            f"dataset={shapes}",
            "--param",
            f"config={json.dumps(CONFIG)}",
        ),
        cwd=tmp_path,
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert list(team.home.glob("runs/*/attempts/1/model/model.pt"))


def test_webhook_of_another_kind_takes_the_place_of_the_first(team: Stack) -> None:
    slack = "https://hooks.slack.com/services/T1AAAAAAA/B1AAAAAAA/AAAAAAAAAAAAAAAAAAAAAAAA"
    team.command("trainyard", "install", "--notify", "http://127.0.0.1:9/verysecret")
    changed = team.command("trainyard", "install", TRAINYARD_NOTIFY=slack)
    assert outcomes(changed)["webhook      SlackWebhook"] == "updated"
    assert outcomes(changed)["automation   trainyard: a run failed"] == "updated"
    assert count_automations(team) == 4
    listed = team.command("prefect", "block", "ls", COLUMNS="200")
    assert listed.stdout.count("webhook/trainyard-notify") == 1, listed.stdout


def test_without_the_password_it_is_asked_for(team: Stack) -> None:
    for given in ("", "team:wrong"):
        done = team.command("trainyard", "install", PREFECT_API_AUTH_STRING=given)
        assert done.returncode == ExitCode.PERMISSION, done.stderr
        assert "PREFECT_API_AUTH_STRING" in done.stderr
        assert "Traceback" not in done.stderr


# --- Servers that cannot be used ------------------------------------------------------------------------------------------


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """Something on loopback that answers every question so."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Not into the test's output."""

    with in_thread(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as address:
        yield f"{address}/api"


def try_install(folder: Path, url: str | None) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "HOME": str(folder), "TRAINYARD_HOME": str(folder / "home")} | ({"PREFECT_API_URL": url} if url else {})
    done = subprocess.run([BIN / "trainyard", "install"], env=environment, capture_output=True, text=True, check=False, timeout=90)
    assert "Traceback" not in done.stderr, done.stderr
    assert "error: " in done.stderr
    assert "next: " in done.stderr
    assert len(done.stderr.splitlines()) <= 6
    return done


@pytest.mark.parametrize(
    ("status", "body", "code", "word"),
    [
        (401, '{"exception_message": "Unauthorized"}', ExitCode.PERMISSION, "PREFECT_API_AUTH_STRING"),
        (200, '"2.20.3"', ExitCode.CONFIG, "too old"),
        (200, '"4.0.0"', ExitCode.CONFIG, "too new"),
        (200, "<html>a page</html>", ExitCode.CONFIG, "not as a Prefect server"),
        (404, "", ExitCode.CONFIG, "/api"),
        (500, "", ExitCode.UNAVAILABLE, "500"),
    ],
)
def test_unusable_server_is_told_in_one_screen(tmp_path: Path, status: int, body: str, code: ExitCode, word: str) -> None:
    with answering(status, body) as url:
        done = try_install(tmp_path, url)
    assert done.returncode == code, done.stderr
    assert word in done.stderr


def test_server_that_does_not_answer_is_named_without_its_password(tmp_path: Path) -> None:
    done = try_install(tmp_path, "http://me:hidden@127.0.0.1:9/api")
    assert done.returncode == ExitCode.UNAVAILABLE
    assert "http://127.0.0.1:9/api" in done.stderr
    assert "hidden" not in done.stderr + done.stdout


def test_without_a_server_it_says_how_to_name_one(tmp_path: Path) -> None:
    done = try_install(tmp_path, None)
    assert done.returncode == ExitCode.CONFIG
    assert "PREFECT_API_URL" in done.stderr
    assert "trainyard up" in done.stderr
