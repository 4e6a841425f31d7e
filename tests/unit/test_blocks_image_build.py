"""The build's command, its progress, and what its failures mean."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from blocks.errors import ConfigError, ServiceUnavailable, TerminalError, TrainyardError
from blocks.image_build import BuildStep, build_command, explain_build_failure, parse_step, run_build
from blocks.image_engine import connect, engine_login, explain_push, read_push
from blocks.image_ref import ImageRef
from blocks.image_source import BuildInput
from blocks.registry_login import Login
from tests.images import write_project
from trainer.contract import ExitCode

TARGET = ImageRef("ghcr.io", "team/trainer", "src-1")
FAILED = """\
#7 [2/3] RUN pip install -r /requirements.txt
#7 1.2 ERROR: something from https://me:hunter2@packages.example.com/simple
#7 ERROR: process "/bin/sh -c pip install" did not complete successfully: exit code: 1
------
 > [2/3] RUN pip install -r /requirements.txt:
#7 1.2 {cause} from https://me:hunter2@packages.example.com/simple
------
error: failed to solve: process "/bin/sh -c pip install" did not complete successfully: exit code: 1"""


@pytest.fixture
def source(tmp_path: Path) -> BuildInput:
    return BuildInput(write_project(tmp_path / "project"), base="python:3.11", arguments={"VARIANT": "cpu"})


def test_the_command_says_all_and_holds_no_secret(source: BuildInput, tmp_path: Path) -> None:
    command = build_command(source, "f" * 64, "trainer:src-1", tmp_path / "id", ca_bundle="/etc/ca.pem", network="host", revision="4f2")
    joined = " ".join(command)
    assert command[:2] == ["docker", "build"]
    assert command[-1] == str(source.root)
    for part in ("--platform linux/amd64", "--secret id=ca,src=/etc/ca.pem", "--network host", "--progress plain", "--iidfile"):
        assert part in joined
    for part in (
        "BASE_IMAGE=python:3.11",
        "VARIANT=cpu",
        f"io.trainyard.source-hash={'f' * 64}",
        "--label org.opencontainers.image.revision=4f2",
    ):
        assert part in joined
    # VERSION is an argument of this Dockerfile; SOURCE_HASH is not, and docker would warn of it.
    assert "--build-arg VERSION=" in joined
    assert "SOURCE_HASH" not in joined
    plain = build_command(BuildInput(source.root), "f" * 64, "trainer:src-1", tmp_path / "id")
    assert not {"--secret", "--network"} & set(plain)
    assert not any(word in " ".join(plain) for word in ("revision", "--pull"))
    assert "--pull" in build_command(source, "f" * 64, "trainer:src-1", tmp_path / "id", pull=True)


def test_steps_are_read_from_what_buildkit_prints() -> None:
    assert parse_step("#5 [2/3] RUN pip install\n") == BuildStep(2, 3, "RUN pip install")
    assert parse_step("#11 [dependencies 4/6] COPY a b") == BuildStep(4, 6, "COPY a b", "dependencies")
    assert [parse_step(line) for line in ("#5 CACHED", "#5 1.2 [2/3] of it", "#1 [internal] load build definition", "")] == [None] * 4


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (FAILED.format(cause="ERROR: No matching distribution"), ExitCode.CONFIG, "a step of the build failed"),
        (FAILED.format(cause="ERROR: THESE PACKAGES DO NOT MATCH THE HASHES"), ExitCode.CONFIG, "pin by hash"),
        (FAILED.format(cause="ERROR: [Errno 28] No space left on device"), ExitCode.DISK_FULL, "no disk space"),
        (FAILED.format(cause="SSLError: CERTIFICATE_VERIFY_FAILED"), ExitCode.CONFIG, "SSL_CERT_FILE"),
        (FAILED.format(cause="Temporary failure in name resolution"), ExitCode.UNAVAILABLE, "--network host"),
        (f"executor failed running [{'x' * 400}]: network bridge not found", ExitCode.UNAVAILABLE, "xxx]: network bridge not found"),
        (
            "#2 [internal] load metadata for x\n#2 ERROR: x: not found\nerror: failed to solve: x: failed to resolve source metadata",
            ExitCode.CONFIG,
            "base image",
        ),
        ("ERROR: BuildKit is enabled but the buildx component is missing or broken.", ExitCode.UNAVAILABLE, "docker-buildx"),
        ("Cannot connect to the Docker daemon at unix:///x. Is the docker daemon running?", ExitCode.UNAVAILABLE, "DOCKER_HOST"),
        ("permission denied while trying to connect to the Docker daemon socket", ExitCode.PERMISSION, "group docker"),
    ],
)
def test_a_failed_build_is_told_by_its_cause(source: BuildInput, text: str, code: ExitCode, message: str) -> None:
    error = explain_build_failure(text.splitlines(), source)
    assert error.code == code
    assert message in str(error)
    assert error.hint
    assert "hunter2" not in str(error)
    assert len(str(error).splitlines()) < 20


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo 'ERROR: BuildKit is enabled but the buildx component is missing or broken.' >&2; exit 1", "has no BuildKit"),
        ("echo '#5 [1/1] RUN false'; exit 1", "a step of the build failed"),
    ],
)
def test_the_docker_on_the_path_is_run(
    source: BuildInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    program = tmp_path / "bin/docker"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    seen: list[BuildStep] = []
    with pytest.raises(TrainyardError, match=message):
        run_build(source, "f" * 64, "trainer:src-1", lambda step, _seconds: seen.append(step))
    assert len(seen) == script.count("#5")


def test_a_docker_that_is_missing_or_asleep_is_told(source: BuildInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TerminalError, match="docker is not installed"):
        run_build(source, "f" * 64, "trainer:src-1", lambda _step, _seconds: None)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(TerminalError, match="daemon does not run") as caught, connect():
        pass
    assert caught.value.code == ExitCode.UNAVAILABLE


def test_a_ca_bundle_that_is_not_there_is_told(source: BuildInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: "docker")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "missing.pem"))
    with pytest.raises(ConfigError, match="no CA bundle"):
        run_build(source, "f" * 64, "trainer:src-1", lambda _step, _seconds: None)


def test_a_push_is_followed_to_its_digest() -> None:
    told: list[tuple[int, int]] = []
    lines = [
        {"status": "Preparing", "id": "a"},
        {"status": "Pushing", "id": "a", "progressDetail": {"current": 5, "total": 10}},
        {"status": "Pushing", "id": "b", "progressDetail": {"current": 30, "total": 20}},
        {"aux": {"Tag": "src-1", "Digest": "sha256:1", "Size": 9}},
    ]
    assert read_push(lines, TARGET, lambda *sizes: told.append(sizes)) == "sha256:1"
    assert told == [(5, 10), (35, 40)]
    with pytest.raises(ServiceUnavailable, match="does not say what it pushed"):
        read_push(lines[:-1], TARGET, lambda *_sizes: None)


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("unauthorized: authentication required", ExitCode.PERMISSION),
        ("denied: requested access to the resource is denied", ExitCode.PERMISSION),
        ("write /var/lib/x: no space left on device", ExitCode.DISK_FULL),
        ("name unknown: The repository does not exist", ExitCode.CONFIG),
        ("Put https://ghcr.io: EOF", ExitCode.UNAVAILABLE),
    ],
)
def test_a_failed_push_is_told_by_its_cause(message: str, code: ExitCode) -> None:
    with pytest.raises(TrainyardError) as caught:
        read_push([{"error": message}], TARGET, lambda *_sizes: None)
    assert caught.value.code == code == explain_push(message, TARGET).code
    assert caught.value.hint


def test_a_password_is_in_no_repr() -> None:
    login = Login("me", "hunter2")
    assert "hunter2" not in repr(login)
    assert engine_login(login) == {"username": "me", "password": "hunter2"}
    assert engine_login(Login("<token>", "hunter2")) == {"identitytoken": "hunter2"}
    assert engine_login(None)["password"] == ""
