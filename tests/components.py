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


def npm_folder(name: str) -> Path:
    """Where `.ci/run` installs what comes from npm, once per machine."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trainyard" / name


def npm_install(package: Path, folder: Path) -> str:
    """The command that brings there what the tests' `package` names."""
    return f"mkdir -p {folder} && cp {package} {folder} && npm install --prefix {folder} --no-package-lock"
