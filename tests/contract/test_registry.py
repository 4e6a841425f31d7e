"""A real image registry: what is found, copied and refused. No Docker Engine is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from blocks import image as images
from blocks.errors import AuthError, ConfigError, QuotaError, ServiceUnavailable
from blocks.image import ImageSettings, Told, check_image, choose_image, ensure_image, look_up_image, resolve_image
from blocks.image_listing import list_registry
from blocks.image_ref import ImageRef
from blocks.image_source import BuildInput, hash_source, source_tag
from blocks.registry import Repository
from blocks.registry_errors import explain_answer, is_disk_full
from blocks.registry_login import Identity, Login, find_login
from tests.docker_registry import Registry, running_registry
from tests.images import Uploader, trainer_labels, write_project
from trainer.contract import CONTRACT_VERSION, ExitCode

NAME = "team/trainer"
USER, PASSWORD = "builder", "hunter2-very-secret"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("guarded"), users={USER: PASSWORD}) as running:
        yield running


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No login of this machine's user, and no Docker Engine."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))


@pytest.fixture
def source(tmp_path: Path) -> BuildInput:
    return BuildInput(write_project(tmp_path / "project"))


def settings_for(registry: Registry, repository: str = NAME, **fields: object) -> ImageSettings:
    return replace(ImageSettings(registry=registry.host, repository=repository), **fields)  # type: ignore[arg-type]


# --- One digest ----------------------------------------------------------------------------------------------


def test_a_tag_becomes_the_digest_of_the_bytes_that_lie_there(registry: Registry) -> None:
    digest = Uploader(registry.host, NAME).image("v1", labels=trainer_labels())
    for reference in (":v1", f"@{digest}", f":v1@{digest}"):
        ref = resolve_image(ImageSettings(image=f"{registry.host}/{NAME}{reference}"))
        assert str(ref) == f"{registry.host}/{NAME}@{digest}"


def test_of_an_index_the_part_for_the_platform_is_taken(registry: Registry) -> None:
    uploader = Uploader(registry.host, NAME)
    mine = uploader.image(labels=trainer_labels(), payload=b"amd64")
    other = uploader.image(platform="linux/arm64", labels=trainer_labels(), payload=b"arm64")
    uploader.index("both", amd64=mine, arm64=other)
    uploader.index("other", arm64=other)
    both = ImageSettings(image=f"{registry.host}/{NAME}:both")
    assert resolve_image(both).digest == mine
    assert resolve_image(replace(both, platform="linux/arm64")).digest == other
    with pytest.raises(ConfigError, match=r"not for linux/amd64 \(it is for linux/arm64\)"):
        resolve_image(ImageSettings(image=f"{registry.host}/{NAME}:other"))


@pytest.mark.parametrize(
    ("platform", "labels", "message"),
    [
        ("linux/arm64", trainer_labels(), r"for linux/arm64, and linux/amd64 is needed.*--platform linux/amd64"),
        ("linux/amd64", trainer_labels(contract=CONTRACT_VERSION + 1), "a newer Trainyard.*update Trainyard here"),
        ("linux/amd64", trainer_labels(contract=CONTRACT_VERSION - 1), "an older Trainyard.*trainyard image build"),
        ("linux/amd64", {}, "no trainer image: it has no label"),
    ],
)
def test_what_cannot_train_is_refused_with_the_fix(registry: Registry, platform: str, labels: dict[str, str], message: str) -> None:
    digest = Uploader(registry.host, NAME).image(platform=platform, labels=labels)
    settings = ImageSettings(image=f"{registry.host}/{NAME}@{digest}")
    with pytest.raises(ConfigError, match=message):
        look_up_image(settings)
    line = check_image(settings)
    assert not line.ok
    assert line.fix


def test_what_is_not_there_is_told(registry: Registry) -> None:
    with pytest.raises(ConfigError, match=r"there is no image .*team/missing:v1"):
        resolve_image(ImageSettings(image=f"{registry.host}/team/missing:v1"))
    with pytest.raises(ConfigError, match=r"neither which image trains nor where.*give it a registry"):
        look_up_image(ImageSettings())


# --- Found by what it is made of -----------------------------------------------------------------------------


def test_where_every_registry_has_it_nothing_is_built_and_no_docker_is_needed(registry: Registry, source: BuildInput) -> None:
    source_hash = hash_source(source)
    digest = Uploader(registry.host, "found/trainer").image(source_tag(source_hash), labels=trainer_labels(source_hash))
    ensured = ensure_image(source, [settings_for(registry, "found/trainer")], Told())
    assert [str(ref) for ref in ensured.refs] == [f"{registry.host}/found/trainer@{digest}"]
    assert (ensured.built, ensured.sent_bytes) == (False, 0)
    assert "nothing that it is made of has changed" in ensured.why


def test_another_image_under_the_tag_does_not_count(registry: Registry, source: BuildInput) -> None:
    Uploader(registry.host, "taken/trainer").image(source_tag(hash_source(source)), labels=trainer_labels("0" * 64))
    with pytest.raises(Exception, match="the Docker daemon does not run"):
        ensure_image(source, [settings_for(registry, "taken/trainer")], Told())


def test_another_registry_gets_the_same_digest_by_a_copy(registry: Registry, guarded: Registry, source: BuildInput) -> None:
    source_hash = hash_source(source)
    payload = bytes(range(256)) * 4096
    digest = Uploader(registry.host, "copy/trainer").image(source_tag(source_hash), payload=payload, labels=trainer_labels(source_hash))
    targets = [
        settings_for(guarded, "copied/trainer", identity=Identity(USER, PASSWORD)),
        settings_for(registry, "copy/trainer"),
        settings_for(registry, "mounted/trainer"),
    ]
    before = registry.stored_bytes()
    told: list[tuple[int, int]] = []
    ensured = ensure_image(source, targets, Told(sent=lambda *sizes: told.append(sizes)))
    assert [ref.digest for ref in ensured.refs] == [digest] * 3
    assert not ensured.built
    assert told[-1][0] == told[-1][1]
    assert registry.stored_bytes() == before  # within one registry, layers are mounted
    again = ensure_image(source, targets, Told())
    assert again.refs == ensured.refs
    with Repository(guarded.host, "copied/trainer", Login(USER, PASSWORD)) as repository:
        manifest = repository.find(digest)
        assert manifest is not None
        assert b"".join(repository.read_blob(manifest.blobs[1][0]))[:2] == b"\x1f\x8b"


def test_a_copy_that_breaks_off_leaves_no_image(
    registry: Registry, guarded: Registry, source: BuildInput, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_hash = hash_source(source)
    tag = source_tag(source_hash)
    Uploader(registry.host, "broken/trainer").image(tag, payload=bytes(range(256)), labels=trainer_labels(source_hash))

    def breaks_off(_self: Repository, _digest: str) -> Iterator[bytes]:
        yield b"\x1f"
        raise httpx.ReadError("connection reset by peer")

    monkeypatch.setattr(Repository, "read_blob", breaks_off)
    targets = [settings_for(registry, "broken/trainer"), settings_for(guarded, "broken/trainer", identity=Identity(USER, PASSWORD))]
    with pytest.raises(ServiceUnavailable, match=r"broke off.*try again"):
        ensure_image(source, targets, Told())
    with Repository(guarded.host, "broken/trainer", Login(USER, PASSWORD)) as repository:
        assert repository.find(tag) is None
    monkeypatch.undo()
    monkeypatch.setenv("DOCKER_CONFIG", str(source.root))
    assert len(ensure_image(source, targets, Told()).refs) == 2


def test_images_are_listed_with_the_one_of_these_sources_marked(registry: Registry) -> None:
    uploader = Uploader(registry.host, "listed/trainer")
    uploader.image("src-old", labels=trainer_labels("0" * 64), payload=b"old")
    digest = uploader.image("src-new", labels=trainer_labels("1" * 64), payload=b"new")
    found = list_registry(ImageRef(registry.host, "listed/trainer"), Identity(), "1" * 64)
    assert {one.tag: one.current for one in found} == {"src-old": False, "src-new": True}
    new = next(one for one in found if one.current)
    assert (new.digest, new.platform, new.bytes > 0) == (digest, "linux/amd64", True)
    assert list_registry(ImageRef(registry.host, "listed/none"), Identity(), "") == []


def test_the_command_lists_and_finds_in_a_registry(registry: Registry) -> None:
    """Without Docker, and from what is really here."""
    Uploader(registry.host, "told/trainer").image("src-old", labels=trainer_labels("0" * 64))
    command = [sys.executable, "-m", "flows.cli", "image", "list", "--registry", registry.host, "--repository", "told/trainer"]
    program = "import sys; from flows.cli import main; sys.argv = sys.argv[1:]; main()"
    done = subprocess.run([sys.executable, "-c", program, "trainyard", *command[3:], "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert [one["tag"] for one in told["images"]] == ["src-old"]
    assert "daemon" in told["note"]
    done = subprocess.run(
        [sys.executable, "-c", program, "trainyard", "image", "push", "--registry", "127.0.0.1:1"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (ExitCode.UNAVAILABLE, ExitCode.CONFIG), done.stderr
    assert "Traceback" not in done.stderr
    assert "next:" in done.stderr


# --- Logins and refusals -------------------------------------------------------------------------------------


def test_a_wrong_and_a_missing_password_are_told_apart_and_never_shown(guarded: Registry, source: BuildInput) -> None:
    wrong = settings_for(guarded, identity=Identity(USER, "wrong-secret"))
    with pytest.raises(AuthError, match="refuses the user or the password") as caught:
        ensure_image(source, [wrong], Told())
    assert "wrong-secret" not in str(caught.value) + repr(wrong)
    with pytest.raises(AuthError, match=r"wants a login to pull .*docker login"):
        choose_image(ImageSettings(image=f"{guarded.host}/{NAME}:v1"), Told())


def test_what_docker_login_stored_is_used(guarded: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    answer = json.dumps({"Username": USER, "Secret": PASSWORD, "ServerURL": guarded.host})
    helper.write_text(f"#!/bin/sh\ncat > /dev/null\necho '{answer}'\n")
    helper.chmod(0o755)
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/config.json").write_text(json.dumps({"credHelpers": {guarded.host: "test"}}))
    monkeypatch.setenv("PATH", f"{helper.parent}:/usr/bin:/bin")
    assert find_login(guarded.host, Identity()) == Login(USER, PASSWORD)
    with Repository(guarded.host, NAME, find_login(guarded.host, Identity())) as repository:
        repository.require_push()
    assert find_login("127.0.0.1:1", Identity()) is None


def test_a_registry_that_is_down_is_told_before_anything_is_built(source: BuildInput) -> None:
    settings = ImageSettings(registry="127.0.0.1:1", repository=NAME)
    with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:1 does not answer"):
        ensure_image(source, [settings], Told())
    assert not check_image(replace(settings, image="127.0.0.1:1/x:1")).ok


def test_a_registry_without_disk_space_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    detail = {"DriverName": "filesystem", "Enclosed": {"Op": "write", "Path": "/x", "Err": 28}}  # as Debian's registry tells it
    body = json.dumps({"errors": [{"code": "UNKNOWN", "message": "unknown error", "detail": detail}]}).encode()
    assert is_disk_full(500, body)
    assert not is_disk_full(500, body.replace(b"28", b"2"))
    error = explain_answer("ghcr.io", NAME, "push", httpx.Response(500, content=body), known=True)
    assert isinstance(error, QuotaError)
    assert error.code == ExitCode.DISK_FULL


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "DENIED", AuthError),
        (404, "NAME_UNKNOWN", ConfigError),
        (503, "UNAVAILABLE", ServiceUnavailable),
        (400, "TAG_INVALID", ConfigError),
    ],
)
def test_a_refused_push_is_told_by_its_cause(status: int, code: str, kind: type[Exception]) -> None:
    body = json.dumps({"errors": [{"code": code, "message": "no"}]}).encode()
    error = explain_answer("ghcr.io", NAME, "push", httpx.Response(status, content=body), known=True)
    assert type(error) is kind
    assert error.hint
    assert code in str(error)


def test_a_build_is_not_begun_where_the_push_is_refused(guarded: Registry, source: BuildInput, monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not(*_: object, **__: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(images, "run_build", must_not)
    with pytest.raises(AuthError):
        ensure_image(source, [settings_for(guarded)], Told())
