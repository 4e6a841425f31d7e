"""Optional components of the tests: what is missing skips with the reason, or fails where every component must be there (CI)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest


def skip_or_fail(reason: str) -> NoReturn:
    if os.environ.get("TRAINYARD_REQUIRE_COMPONENTS") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def cache_folder(name: str) -> Path:
    """What is kept on this machine between test runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trainyard" / name


def npm_folder(name: str) -> Path:
    """Where `.ci/run` installs what comes from npm, once per machine."""
    return cache_folder(name)


def npm_install(package: Path, folder: Path) -> str:
    """The command that brings there what the tests' `package` names."""
    return f"mkdir -p {folder} && cp {package} {folder} && npm install --prefix {folder} --no-package-lock"


def unpacked_program(name: str) -> str:
    """A program of the Debian packages that `.ci/run` unpacks, once per machine."""
    folder = cache_folder("debian")
    for place in ("usr/bin", "usr/sbin"):
        if (program := folder / place / name).is_file():
            return str(program)
    packages = "docker.io containerd runc docker-registry"
    skip_or_fail(
        f"not here: {name} (mkdir -p {folder} && cd {folder} && apt-get download {packages} && for p in *.deb; do dpkg-deb -x $p .; done)"
    )
