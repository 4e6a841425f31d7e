"""requirements.txt fits uv.lock, and no file of the project names a package host.

Run as a program, this file writes requirements.txt anew: ``uv run python tests/unit/test_requirements.py``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.components import skip_or_fail

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "requirements.txt"
REWRITE = "uv sync && uv run python tests/unit/test_requirements.py"
HEADER = f"""\
# Core and `train`, for the trainer image and for training on one machine; the clouds' SDKs stay out, a job never talks to them.
# Install:  pip install --no-deps -r requirements.txt
#           (complete, so --no-deps loses nothing; without it pip wants a second OpenCV, which would overwrite the first)
# Renew:    {REWRITE}
"""
# In pieces, so that this file passes its own test.
HOSTS = [".".join(parts) for parts in (["pypi", "org"], ["python" + "hosted", "org"], ["npmjs", "org"], ["download", "pytorch", "org"])]
INDEX_OPTION = "index" + "-url"


def export_requirements(uv: str) -> str:
    """The text that requirements.txt should have. Reads uv.lock, and refuses one that no longer fits pyproject; needs no network."""
    command = [uv, "export", "--locked", "--offline", "--quiet", "--python", sys.executable, "--format", "requirements-txt"]
    command += ["--no-dev", "--extra", "train", "--no-emit-project", "--no-header", "--no-annotate"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(f"uv export failed ({done.returncode}): {done.stderr.strip()}")
    return HEADER + done.stdout


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
    """What pyproject itself pins, of what goes into the image."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return pins("\n".join([*project["dependencies"], *project["optional-dependencies"]["train"]]))


def test_requirements_are_those_of_the_lock() -> None:
    """The same packages, and those that pyproject pins in its versions. Others may be older than in a lock made today."""
    uv = find_uv()
    if uv is None:
        skip_or_fail("uv is not installed; `python3 -m pip install uv` gives it")
    if not (ROOT / "uv.lock").is_file():
        skip_or_fail("there is no uv.lock; `uv sync` makes it")
    expected, found, direct = pins(export_requirements(uv)), pins(REQUIREMENTS.read_text()), direct_pins()
    assert len(direct) > 10
    assert found.keys() == expected.keys(), f"requirements.txt is out of date; renew it: {REWRITE}"
    assert {name: found[name] for name in direct} == direct, f"requirements.txt is out of date; renew it: {REWRITE}"


def test_every_requirement_is_pinned_and_hashed() -> None:
    text = REQUIREMENTS.read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if "==" not in line or "--hash=sha256:" not in line] == []
    # Two distributions install the same `cv2` folder; one of them must stay out.
    assert [line.split("==")[0] for line in lines if line.startswith("opencv")] == ["opencv-python"]


def test_no_tracked_file_names_a_package_host() -> None:
    # A clone gets its packages from wherever its user's pip and uv are set up to look.
    forbidden = [word.encode() for word in [*HOSTS, INDEX_OPTION]]
    found = [
        f"{path.relative_to(ROOT)}: {word.decode()}" for path in tracked_files() for word in forbidden if word in path.read_bytes().lower()
    ]
    assert found == []


if __name__ == "__main__":
    REQUIREMENTS.write_text(export_requirements(find_uv() or "uv"))
