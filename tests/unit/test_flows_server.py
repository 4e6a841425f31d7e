"""What `trainyard up` decides: which server is configured, what its children are started with, when they are started again."""

from __future__ import annotations

import json
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from blocks.errors import AuthError, ConfigError, ServiceUnavailable
from flows import prefect_settings, server
from trainer.contract import ENV_HOME, ExitCode
from trainer.locks import try_lock

PROFILES = """
active = "team"
[profiles.team]
PREFECT_API_URL = "http://team:4200/api"
[profiles.alone]
PREFECT_LOGGING_LEVEL = "DEBUG"
"""


@pytest.fixture
def user(tmp_path: Path) -> dict[str, str]:
    """An environment with a Prefect home of its own."""
    return {"PREFECT_HOME": str(tmp_path)}


def test_environment_wins_over_the_profile(user: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "profiles.toml").write_text(PROFILES)
    assert prefect_settings.configured_server(user) == "http://team:4200/api"
    assert prefect_settings.configured_server(user | {"PREFECT_API_URL": "http://other/api"}) == "http://other/api"
    assert prefect_settings.configured_server(user | {"PREFECT_PROFILE": "alone"}) is None


def test_without_profiles_no_server_is_configured_but_by_the_profile_that_prefect_brings(user: dict[str, str]) -> None:
    assert prefect_settings.configured_server(user) is None
    assert prefect_settings.configured_server(user | {"PREFECT_PROFILE": "local"}) == "http://127.0.0.1:4200/api"


def test_damaged_profiles_are_named(user: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "profiles.toml").write_text("active = ")
    with pytest.raises(ConfigError, match=r"profiles\.toml"):
        prefect_settings.configured_server(user)


@pytest.fixture
def nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The process's environment as that of a person who never used Prefect; Trainyard's home. What is set in it is taken back."""
    for name in (*prefect_settings.DEFAULTS, "PREFECT_API_URL", "PREFECT_HOME", prefect_settings.ENV_ENCRYPTION_KEY):
        monkeypatch.setenv(name, "")
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(ENV_HOME, str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_PROFILES_PATH", str(tmp_path / "profiles.toml"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_command_finds_the_server_of_a_living_up_only(nobodys: Path) -> None:
    prefect_settings.details_path().write_text(json.dumps({"url": "http://127.0.0.1:1/api", "ready": True}))
    prefect_settings.apply_defaults()
    assert "PREFECT_API_URL" not in os.environ, "nobody holds the lock"

    lock = try_lock(prefect_settings.lock_path())
    assert lock is not None
    try:
        prefect_settings.apply_defaults()
        assert os.environ["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
        assert os.environ["PREFECT_HOME"] == str(nobodys / "prefect")
    finally:
        os.close(lock)


def test_without_a_server_a_command_uses_the_database_of_up_and_its_key(nobodys: Path) -> None:
    (nobodys.parent / "profiles.toml").write_text(PROFILES.replace("team", "alone", 1))
    prefect_settings.apply_defaults()
    assert os.environ["PREFECT_HOME"] == server.build_environment({}, nobodys, 4200, "token")["PREFECT_HOME"]
    assert os.environ["PREFECT_PROFILES_PATH"] == str(nobodys.parent / "profiles.toml"), "the user's other settings stay"
    assert not list((nobodys / "prefect").iterdir()), "a command that only reads makes no key"
    prefect_settings.prepare_temporary()
    assert os.environ["PREFECT_SERVER_ENCRYPTION_KEY"] == prefect_settings.encryption_key()


@pytest.mark.parametrize("command", ["plan {} --profile team", "train {} --profile team", "check team", "image build --profile team"])
def test_which_server_is_settled_before_prefect_reads_its_settings(command: str, tmp_path: Path) -> None:
    code = (
        "import sys; from flows import prefect_settings; from flows.cli import app\n"
        "def settle(): print('prefect' in sys.modules); raise SystemExit\n"
        f"prefect_settings.apply_defaults = settle; app({command.format(tmp_path).split()!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


def test_while_up_starts_no_other_server_is_started_on_its_database(nobodys: Path) -> None:
    prefect_settings.apply_defaults()
    lock = try_lock(prefect_settings.lock_path())
    assert lock is not None
    prefect_settings.details_path().write_text(json.dumps({"url": "http://127.0.0.1:1/api", "ready": False}))
    try:
        with pytest.raises(ServiceUnavailable, match="just starting") as refusal:
            prefect_settings.prepare_temporary()
        assert "ready" in refusal.value.hint
    finally:
        os.close(lock)


@pytest.mark.parametrize("name", ["PREFECT_HOME", "PREFECT_SERVER_DATABASE_CONNECTION_URL", "PREFECT_API_DATABASE_CONNECTION_URL"])
def test_a_database_that_the_user_has_set_stays(nobodys: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, f"{nobodys}/theirs")
    prefect_settings.apply_defaults()
    prefect_settings.prepare_temporary()
    assert os.environ[name] == f"{nobodys}/theirs"
    assert not prefect_settings.has_own_database()
    assert "PREFECT_SERVER_ENCRYPTION_KEY" not in os.environ


@pytest.mark.parametrize(
    ("status", "kind", "word"),
    [
        (401, AuthError, "PREFECT_API_AUTH_STRING"),
        (403, AuthError, "PREFECT_API_AUTH_STRING"),
        (503, ServiceUnavailable, "log"),
        (404, ConfigError, "/api"),
    ],
)
def test_refusals_say_what_to_do(status: int, kind: type[Exception], word: str) -> None:
    refusal = prefect_settings.refused("http://s/api", status)
    assert isinstance(refusal, kind)
    assert word in refusal.hint


@pytest.mark.parametrize(
    ("theirs", "word"), [("3.8.8", ""), ("3.1.0", ""), ("3.9.1+build", ""), ("2.20.3", "too old"), ("4.0.0", "too new"), (None, "version")]
)
def test_versions_are_refused_where_the_client_refuses_them(theirs: str | None, word: str) -> None:
    problem = prefect_settings.version_problem(theirs, "3.8.8")
    assert word in problem
    assert bool(problem) == bool(word)


def test_shown_address_has_no_password() -> None:
    assert prefect_settings.without_password("http://me:secret@host:4200/api") == "http://host:4200/api"


def test_children_get_a_home_and_a_server_of_their_own_and_no_webhook(tmp_path: Path) -> None:
    theirs = {
        "PATH": "/bin",
        "PREFECT_HOME": "/home/me/.prefect",
        "PREFECT_PROFILE": "team",
        "PREFECT_API_AUTH_STRING": "me:secret",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": "postgresql://theirs",
        "PREFECT_WORKER_QUERY_SECONDS": "7",
        "TRAINYARD_NOTIFY": "https://secret",
    }
    made = server.build_environment(theirs, tmp_path, 4300, "token")
    assert made["PREFECT_API_URL"] == "http://127.0.0.1:4300/api"
    assert made["PREFECT_HOME"] == str(tmp_path / "prefect")
    assert (made["PATH"], made["PREFECT_WORKER_QUERY_SECONDS"]) == ("/bin", "7")
    assert not {"PREFECT_PROFILE", "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_DATABASE_CONNECTION_URL", "TRAINYARD_NOTIFY"} & made.keys()
    assert "PREFECT_SERVER_ENCRYPTION_KEY" not in made, "only the server needs the key"
    assert server.build_server_environment(made, "key")["PREFECT_SERVER_ENCRYPTION_KEY"] == "key"


def test_encryption_key_is_made_once_and_nobody_else_reads_it(nobodys: Path) -> None:
    from cryptography.fernet import Fernet

    key = prefect_settings.encryption_key()
    assert prefect_settings.encryption_key() == key
    [path] = (nobodys / "prefect").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    Fernet(key.encode())


def test_lease_storage_is_a_module_of_the_installed_prefect(tmp_path: Path) -> None:
    from importlib.util import find_spec

    name = server.build_server_environment({}, "")["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    assert find_spec(name) is not None


def test_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)) as caught:
            server.require_free_port(port)
    assert caught.value.code is ExitCode.OCCUPIED
    assert "--port" in caught.value.hint


def test_pauses_grow_to_a_minute() -> None:
    assert [server.pause_before_start(failures) for failures in (1, 2, 3, 7, 999)] == [1, 2, 4, 60, 60]


def test_service_that_ends_is_told_once_and_started_again_after_its_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_HOME, str(tmp_path))
    service = server.Service("worker", (), {})
    started: list[float] = []
    monkeypatch.setattr(server.Service, "start", lambda _self: started.append(1))
    service.process = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    service.process.wait()
    assert "exit code 3" in service.look(10.0)
    assert service.look(10.5) == ""
    assert started == []
    assert service.look(11.1) == ""
    assert started == [1]


def test_only_prefect_processes_of_this_up_are_ended() -> None:
    mine = {server.MARKER: "token"}
    flow = ["python", "-m", "prefect.engine"]
    assert server.is_ours(flow, mine, "token")
    assert server.is_ours(["python", "-P", "-m", "prefect", "worker", "start"], mine, "token")
    assert not server.is_ours(flow, {server.MARKER: "another"}, "token")
    assert not server.is_ours(flow, {}, "")
    assert not server.is_ours(["python", "-P", "-m", "trainer", "--attempt-dir", "/x/prefect"], mine, "token")
    assert not server.is_ours(["python", "-c", "from multiprocessing.spawn import spawn_main"], mine, "token")
    assert not server.is_ours(flow, mine | {server.SUPERVISED: "12"}, "token")
