"""The requirements files fit uv.lock, and no file of the project names a package host.

Run as a program, this file writes them anew: ``uv run python tests/unit/test_requirements.py``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.components import skip_or_fail

ROOT = Path(__file__).resolve().parents[2]
REWRITE = "uv sync && uv run python tests/unit/test_requirements.py"
EXTRAS = ("aws", "gcp", "azure", "kubernetes")


@dataclass(frozen=True)
class Requirements:
    """One generated file: what it is for, and what `uv export` is asked for."""

    path: str
    purpose: str
    options: tuple[str, ...]

    @property
    def file(self) -> Path:
        return ROOT / self.path

    @property
    def header(self) -> str:
        return f"""\
# {self.purpose}
# Install:  pip install --no-deps -r {self.path}
#           (complete, so --no-deps loses nothing; without it pip wants a second OpenCV, which would overwrite the first)
# Renew:    {REWRITE}
"""


FILES = [
    Requirements(
        "requirements.txt",
        "Core and `train`, for training on one machine; the clouds' SDKs stay out, a job never talks to them.",
        ("--no-dev", "--extra", "train"),
    ),
    Requirements(
        "docker/trainer-requirements.txt", "What the trainer image holds: no orchestrator, no SDK.", ("--only-group", "trainer-image")
    ),
    Requirements("docker/flow-runner-requirements.txt", "Core, for the flow runner's image.", ("--no-dev",)),
    Requirements("docker/flow-runner-build-requirements.txt", "What makes the flow runner's wheel.", ("--only-group", "flow-runner-build")),
    *(
        Requirements(
            f"docker/flow-runner-{extra}-requirements.txt",
            f"Core and `{extra}`, for the flow runner's image.",
            ("--no-dev", "--extra", extra),
        )
        for extra in EXTRAS
    ),
]
# In pieces, so that this file passes its own test.
HOSTS = [".".join(parts) for parts in (["pypi", "org"], ["python" + "hosted", "org"], ["npmjs", "org"], ["download", "pytorch", "org"])]
INDEX_OPTION = "index" + "-url"


def export_requirements(uv: str, wanted: Requirements) -> str:
    """The text that the file should have. Reads uv.lock, and refuses one that no longer fits pyproject; needs no network."""
    command = [uv, "export", "--locked", "--offline", "--quiet", "--python", sys.executable, "--format", "requirements-txt"]
    command += [*wanted.options, "--no-emit-project", "--no-header", "--no-annotate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"uv export failed ({done.returncode}): {done.stderr.strip()}")
    return wanted.header + done.stdout


def find_uv() -> str | None:
    # `uv run` leaves its own path in UV, so that it is found even where it is not on PATH.
    return os.environ.get("UV") or shutil.which("uv")


def tracked_files() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        skip_or_fail("git cannot list the files here; run the tests in a clone, with git installed")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def pins(text: str) -> dict[str, str]:
    """Version by name."""
    lines = (line.partition(";")[0] for line in text.replace("\\\n", "").splitlines() if "==" in line and not line.startswith("#"))
    return {name.strip(): version.split()[0] for name, _, version in (line.partition("==") for line in lines)}


def direct_pins() -> dict[str, str]:
    """What pyproject itself pins."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return pins("\n".join([*project["dependencies"], *extras]))


@pytest.mark.parametrize("wanted", FILES, ids=lambda wanted: wanted.path)
def test_requirements_are_those_of_the_lock(wanted: Requirements) -> None:
    """The same packages, and those that pyproject pins in its versions. Others may be older than in a lock made today."""
    uv = find_uv()
    if uv is None:
        skip_or_fail("uv is not installed; `python3 -m pip install uv` gives it")
    if not (ROOT / "uv.lock").is_file():
        skip_or_fail("there is no uv.lock; `uv sync` makes it")
    expected, found = pins(export_requirements(uv, wanted)), pins(wanted.file.read_text())
    direct = {name: version for name, version in direct_pins().items() if name in expected}
    assert len(direct) > 8 or "build" in wanted.path
    assert found.keys() == expected.keys(), f"{wanted.path} is out of date; renew it: {REWRITE}"
    assert {name: found[name] for name in direct} == direct, f"{wanted.path} is out of date; renew it: {REWRITE}"


@pytest.mark.parametrize("wanted", FILES, ids=lambda wanted: wanted.path)
def test_every_requirement_is_pinned_and_hashed(wanted: Requirements) -> None:
    text = wanted.file.read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if "==" not in line or "--hash=sha256:" not in line] == []
    # Two distributions install the same `cv2` folder; one of them must stay out.
    trains = "torch" in pins(text)
    assert [line.split("==")[0] for line in lines if line.startswith("opencv")] == ["opencv-python-headless"] * trains


def test_images_hold_what_their_code_imports_and_no_more() -> None:
    found = {wanted.path: pins(wanted.file.read_text()).keys() for wanted in FILES}
    trainer = found.pop("docker/trainer-requirements.txt")
    assert trainer & {"prefect", "click", "rich", "boto3", "sagemaker", "opencv-python"} == set()
    assert trainer <= found.pop("requirements.txt")
    for names in found.values():
        assert names & {"torch", "ultralytics", "triton"} == set()


def test_no_tracked_file_names_a_package_host() -> None:
    # A clone gets its packages from wherever its user's pip and uv are set up to look.
    forbidden = [word.encode() for word in [*HOSTS, INDEX_OPTION]]
    found = [
        f"{path.relative_to(ROOT)}: {word.decode()}" for path in tracked_files() for word in forbidden if word in path.read_bytes().lower()
    ]
    assert found == []


if __name__ == "__main__":
    for each in FILES:
        each.file.write_text(export_requirements(find_uv() or "uv", each))
