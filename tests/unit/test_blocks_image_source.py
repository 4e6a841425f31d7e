"""The hash of what the trainer image is made of, and the names of images."""

from __future__ import annotations

import os
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from blocks import image_source
from blocks.errors import ConfigError
from blocks.image import ImageSettings
from blocks.image_ref import ImageRef, is_loopback
from blocks.image_source import (
    BuildInput,
    copied_paths,
    declared_arguments,
    find_revision,
    find_root,
    hash_source,
    list_sources,
    source_tag,
)
from tests.images import DOCKERFILE, write_project

DIGEST = "sha256:" + "a" * 64
ROOT = Path(__file__).parents[2]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path / "project")


def test_what_is_not_in_the_image_does_not_change_its_hash(project: Path) -> None:
    before = hash_source(BuildInput(project))
    (project / "flows/train.py").write_text("# another comment\n")
    (project / "docker/flow-runner.Dockerfile").write_text("FROM other\n")
    (project / "trainer/__pycache__").mkdir()
    (project / "trainer/__pycache__/task.cpython-311.pyc").write_bytes(b"compiled")
    for path in project.rglob("*"):
        os.utime(path, (1, 1))
    assert hash_source(BuildInput(project)) == before
    assert hash_source(BuildInput(write_project(project.parent / "elsewhere"))) == before


def test_what_lies_beside_the_sources_goes_into_no_image_and_changes_no_hash(project: Path) -> None:
    before = hash_source(BuildInput(project))
    for name in ("id_rsa", "credentials.json", "key.pem", ".env", "task.pyo", "img/1.jpg"):
        path = project / "trainer" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("secret")
    assert hash_source(BuildInput(project)) == before


def test_docker_is_told_to_take_every_source_and_nothing_else() -> None:
    """The patterns are of the simplest kind, a folder and an ending, which docker and pathlib read alike."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    taken = {path for line in lines if line.startswith("!") for path in ROOT.glob(line[1:])}
    sources = {path for folder in ("blocks", "flows", "trainer") for path in (ROOT / folder).rglob("*.py")}
    assert sources <= taken
    assert {path.suffix for path in taken if path.is_relative_to(ROOT / "trainer")} == {".py"}
    assert {path for path in list_sources(ROOT) if path.is_relative_to(ROOT / "trainer")} <= taken


@pytest.mark.parametrize("name", ["trainer/task.py", "docker/trainer.Dockerfile", "docker/trainer-requirements.txt", ".dockerignore"])
def test_a_line_in_what_it_is_made_of_changes_the_hash(project: Path, name: str) -> None:
    before = hash_source(BuildInput(project))
    with (project / name).open("a") as file:
        file.write("\n")
    assert hash_source(BuildInput(project)) != before


def test_names_modes_and_arguments_count(project: Path) -> None:
    hashes = {hash_source(BuildInput(project))}
    hashes.add(hash_source(BuildInput(project, base=f"python@{DIGEST}")))
    hashes.add(hash_source(BuildInput(project, arguments={"VARIANT": "cpu"})))
    hashes.add(hash_source(BuildInput(project, platform="linux/arm64")))
    (project / "trainer/task.py").chmod(0o755)
    hashes.add(hash_source(BuildInput(project)))
    (project / "trainer/task.py").rename(project / "trainer/tasks.py")
    hashes.add(hash_source(BuildInput(project)))
    assert len(hashes) == 6
    assert all(ImageRef.parse(f"localhost/x:{source_tag(one)}").tag == f"src-{one[:16]}" for one in hashes)


def test_a_base_by_digest_counts_by_it_alone(project: Path) -> None:
    """A mirror has the same one."""
    bases = [
        f"python@{DIGEST}",
        f"mirror.example.com/python:3.12@{DIGEST}",
        f"python@{DIGEST[:-1]}b",
        "python:3.12",
        "mirror.example.com/python:3.12",
    ]
    hashes = [hash_source(BuildInput(project, base=base)) for base in bases]
    assert hashes[0] == hashes[1] == hash_source(BuildInput(project, arguments={"BASE_IMAGE": bases[0]}))
    assert len(set(hashes)) == 4


def test_the_revision_is_that_of_the_sources_alone(project: Path) -> None:
    assert find_revision(project) == ""

    def commit() -> str:
        for argv in (["add", "--all"], ["-c", "user.name=t", "-c", "user.email=t@example.com", "commit", "--quiet", "--message", "x"]):
            subprocess.run(["git", "-C", str(project), *argv], check=True)
        return subprocess.run(["git", "-C", str(project), "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()

    subprocess.run(["git", "init", "--quiet", str(project)], check=True)
    assert find_revision(project) == "", "no commit yet"
    first = commit()
    (project / "flows/train.py").write_text("# another comment\n")
    assert find_revision(project) == first
    commit()
    assert find_revision(project) == first
    (project / "trainer/task.py").write_text("print('trains better')\n")
    assert find_revision(project) == f"{first}-dirty"
    second = commit()
    assert find_revision(project) == second != first
    (project / "trainer/new.py").write_text("")
    assert find_revision(project) == f"{second}-dirty"


def test_where_there_are_no_sources_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_source, "__file__", str(tmp_path / "site-packages/blocks/image_source.py"))
    with pytest.raises(ConfigError, match=r"installed without its sources.*name its digest as `image`"):
        find_root()
    with pytest.raises(ConfigError, match=r"no docker/trainer\.Dockerfile"):
        hash_source(BuildInput(tmp_path))


def test_what_a_dockerfile_takes_from_the_project_is_read() -> None:
    text = DOCKERFILE + "COPY --from=build /x /y\nADD --chown=1:1 a \\\n  b/ /c/\nRUN --mount=type=bind,source=d,target=/d pip\n"
    assert copied_paths(text) == ["docker/trainer-requirements.txt", "trainer", "a", "b/", "d"]
    assert declared_arguments(text) == {"BASE_IMAGE", "VERSION"}


def test_all_that_the_dockerfile_copies_is_hashed() -> None:
    dockerfile = ROOT / image_source.DOCKERFILE
    hashed = [path.relative_to(ROOT).as_posix() for path in list_sources(ROOT)]
    assert image_source.DOCKERFILE in hashed
    for path in copied_paths(dockerfile.read_text()):
        wanted = path.strip("/").removeprefix("./")
        assert any(name == wanted or name.startswith(f"{wanted}/") or fnmatch(name, wanted) for name in hashed), path


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ubuntu", ("docker.io", "library/ubuntu", "", "")),
        ("team/trainer:1", ("docker.io", "team/trainer", "1", "")),
        ("localhost/trainer", ("localhost", "trainer", "", "")),
        ("127.0.0.1:5000/a/b:src-1", ("127.0.0.1:5000", "a/b", "src-1", "")),
        (f"ghcr.io/a/b:1@{DIGEST}", ("ghcr.io", "a/b", "1", DIGEST)),
    ],
)
def test_names_are_read_as_docker_reads_them(text: str, parts: tuple[str, str, str, str]) -> None:
    ref = ImageRef.parse(text)
    assert (ref.registry, ref.repository, ref.tag, ref.digest) == parts
    assert ImageRef.parse(str(ref)) == (ref if not ref.digest else ref.pinned(ref.digest))


@pytest.mark.parametrize(
    "text", ["", "https://ghcr.io/a", "ghcr.io/UPPER", "a b", "ghcr.io/a@sha256:12", "ghcr.io/a:b:c", "-x.io/a", "ghcr.io/"]
)
def test_what_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not the name of an image"):
        ImageRef.parse(text)


def test_plain_http_is_for_this_machine_only() -> None:
    assert all(is_loopback(name) for name in ("localhost", "localhost:5000", "127.0.0.1:5000", "127.8.8.8", "[::1]:5000"))
    assert not any(
        is_loopback(name) for name in ("ghcr.io", "10.0.0.1:5000", "localhost.example.com", "127.0.0.1.example.com:80", "[fe80::1]:5000")
    )


@pytest.mark.parametrize(
    "login", ["builder:hunter2", "builder:hun@hunter2", "builder:hun/hunter2", ":hunter2", "hunter2", "https://u:hunter2"]
)
def test_a_login_in_a_name_is_not_told(login: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ImageRef.parse(f"{login}@127.0.0.1:5000/trainer")
    assert "hunter2" not in f"{caught.value}"
    assert "***@127.0.0.1:5000/trainer" in f"{caught.value}"


@pytest.mark.parametrize("repository", ["team/trainer:v1", f"trainer@{DIGEST}"])
def test_a_repository_has_no_tag(repository: str) -> None:
    with pytest.raises(ConfigError, match="more than a repository"):
        ImageSettings(registry="ghcr.io", repository=repository).place()
