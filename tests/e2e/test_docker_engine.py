"""The tests' own engine: shared by test runs, found again after one was killed, and with data that outlives its registry's port."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.components import cache_folder
from tests.docker_engine import Engine, engine_answers, engine_pid, mounts_below, require_engine, rig_folder, running_engine
from tests.docker_registry import running_registry
from tests.stack import REPOSITORY, wait_for

USER = """
import time
from tests.docker_engine import running_engine
with running_engine() as engine:
    print(engine.base, flush=True)
    time.sleep(600)
"""


def start_user() -> tuple[subprocess.Popen[str], str]:
    """Another test run that uses the engine; the base image as it sees it."""
    process = subprocess.Popen([sys.executable, "-c", USER], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str], how: signal.Signals) -> None:
    process.send_signal(how)
    process.communicate(timeout=60)


def test_an_image_is_built_with_a_secret_pushed_and_run(docker_engine: Engine, tmp_path: Path) -> None:
    secret, name = tmp_path / "secret", f"{docker_engine.registry.host}/trainyard-test/engine:1"
    secret.write_text("hidden")
    (tmp_path / "Dockerfile").write_text(
        f"FROM {docker_engine.base}\nRUN --mount=type=secret,id=word test -s /run/secrets/word && python -c 'print(1)' > /made\n"
    )
    docker_engine.docker("build", "--network", "host", "--secret", f"id=word,src={secret}", "--tag", name, str(tmp_path))
    docker_engine.docker("push", name)
    assert docker_engine.registry.digest("trainyard-test/engine", "1") in docker_engine.inspect(name)["RepoDigests"][0]
    done = docker_engine.docker("run", "--rm", "--user", "1000", "--read-only", name, "sh", "-c", "cat /made; exit 3", check=False)
    assert (done.returncode, done.stdout) == (3, "1\n")
    docker_engine.docker("rmi", name)


def test_a_registry_with_a_password_refuses_a_wrong_one(docker_engine: Engine, tmp_path: Path) -> None:
    with running_registry(tmp_path / "registry", users={"ada": "right"}) as registry:
        login = ["login", "--username", "ada", "--password-stdin", registry.host]
        for password, accepted in (("wrong", False), ("right", True)):
            done = subprocess.run(
                ["docker", "--config", str(tmp_path / "client"), *login],
                env={**os.environ, **docker_engine.environment},
                input=password,
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode == 0) == accepted, done.stderr
    assert not registry.alive()


def test_the_last_user_stops_the_engine(rig: Path) -> None:
    first, seen_by_first = start_user()
    second, seen_by_second = start_user()
    assert seen_by_first == seen_by_second
    end(first, signal.SIGINT)
    assert engine_answers(rig)
    end(second, signal.SIGINT)
    assert engine_pid(rig) is None


def test_an_engine_left_by_a_killed_run_is_taken_over_or_replaced(rig: Path) -> None:
    killed, seen = start_user()
    end(killed, signal.SIGKILL)
    left = engine_pid(rig)
    assert left is not None
    with running_engine() as engine:
        assert (engine.base, engine_pid(rig)) == (seen, left)
        psutil.Process(left).kill()
        wait_for("the engine's end", lambda: engine_pid(rig) is None, 10)
        engine.registry.stop()
        with running_engine() as fresh:
            assert engine_pid(rig) not in (None, left)
            # Another port, the same image.
            assert fresh.registry.host != engine.registry.host
            assert fresh.base.rpartition("@")[2] == seen.rpartition("@")[2]
            fresh.docker("pull", "--quiet", fresh.base)
    assert engine_pid(rig) is None
    assert mounts_below(rig) == [], "else the folder cannot be removed"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of its own, with this machine's packages: nobody else uses that engine."""
    require_engine()
    mine = tmp_path_factory.mktemp("cache")
    (mine / "trainyard").mkdir()
    (mine / "trainyard/debian").symlink_to(cache_folder("debian"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(mine))
        yield rig_folder()
