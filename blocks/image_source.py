"""What the trainer image is made of, and one hash over it. Nothing else of the project changes the image, or its tag.

The hash covers the paths, contents and executable bits of the Dockerfile, its requirements, what docker is told to
ignore, and the trainer's sources, and the build's arguments, the base among them: by its digest alone where it has one, wherever it
lies. Never a time, nor what Python caches.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from blocks.errors import ConfigError

DOCKERFILE = "docker/trainer.Dockerfile"
# Of the project's folder; a test holds them against what the Dockerfile copies.
SOURCES = (".dockerignore", "docker/trainer.Dockerfile", "docker/trainer-requirements.txt", "trainer/*.py", "trainer/frameworks/*.py")
CACHES = ("__pycache__", ".ruff_cache", ".pytest_cache", ".DS_Store")
DEFAULT_PLATFORM = "linux/amd64"
TAG_LENGTH = 16


@dataclass(frozen=True)
class BuildInput:
    """A build, but for where it goes. `base` overrides the Dockerfile's own; a digest there pins it."""

    root: Path
    base: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict[str, str])
    platform: str = DEFAULT_PLATFORM

    def build_arguments(self) -> dict[str, str]:
        return {**self.arguments, **({"BASE_IMAGE": self.base} if self.base else {})}


def find_root() -> Path:
    """The project's folder. Raises ConfigError where only the installed packages are there, as in the flow runner's image."""
    root = Path(__file__).resolve().parents[1]
    if not (root / DOCKERFILE).is_file():
        raise ConfigError(
            f"the trainer image cannot be built here: this Trainyard is installed without its sources ({DOCKERFILE} is missing)",
            hint="build it in a clone (`trainyard image build --registry ...`) and name its digest as `image` in the profile",
        )
    return root


def list_sources(root: Path) -> list[Path]:
    """The files that the image is made of, sorted by path."""
    found = {path for pattern in SOURCES for path in root.glob(pattern) if path.is_file()}
    kept = [path for path in found if not set(path.relative_to(root).parts) & set(CACHES) and path.suffix != ".pyc"]
    return sorted(kept, key=lambda path: path.relative_to(root).as_posix())


def hash_source(source: BuildInput) -> str:
    """sha256, as hex. Raises ConfigError where there is no Dockerfile."""
    if not (source.root / DOCKERFILE).is_file():
        raise ConfigError(f"there is no {DOCKERFILE} in {source.root}", hint="build in a clone of the project")
    files = [_describe(path, source.root) for path in list_sources(source.root)]
    arguments = source.build_arguments()
    if "@sha256:" in (base := arguments.get("BASE_IMAGE", "")):
        arguments["BASE_IMAGE"] = base.rpartition("@")[2]
    whole = {"files": files, "arguments": arguments, "platform": source.platform}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _describe(path: Path, root: Path) -> tuple[str, bool, str]:
    return path.relative_to(root).as_posix(), os.access(path, os.X_OK), hashlib.sha256(path.read_bytes()).hexdigest()


def source_tag(source_hash: str) -> str:
    return f"src-{source_hash[:TAG_LENGTH]}"


def find_revision(root: Path) -> str:
    """The git commit that last changed what the image is made of, so that the same sources have the same one; empty where none is known."""
    sources = ["--", *(f":(glob){pattern}" for pattern in SOURCES)]

    def ask(*argv: str) -> str:
        command = ["git", "-C", str(root), *argv, *sources]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if shutil.which("git") is None or not (commit := ask("log", "-1", "--format=%H")):
        return ""
    return f"{commit}-dirty" if ask("status", "--porcelain") else commit


def declared_arguments(dockerfile: str) -> set[str]:
    """The names that a Dockerfile takes by ARG: docker warns of others."""
    return set(re.findall(r"^\s*ARG\s+([A-Za-z_][A-Za-z0-9_]*)", dockerfile, flags=re.MULTILINE | re.IGNORECASE))


def copied_paths(dockerfile: str) -> list[str]:
    """What a Dockerfile takes from the project by COPY, ADD or a bind mount; not what it takes from another stage."""
    text = re.sub(r"\\\s*\n", " ", dockerfile)
    paths: list[str] = []
    for line in re.findall(r"^\s*(?:COPY|ADD)\s+(.*)$", text, flags=re.MULTILINE | re.IGNORECASE):
        if "--from=" not in line:
            paths += [word for word in line.split() if not word.startswith("--")][:-1]
    for options in re.findall(r"--mount=(type=bind\S*)", text):
        paths += [] if "from=" in options else re.findall(r"(?:source|src)=([^,]+)", options)
    return paths
