"""Where this machine keeps what is its own, and who asks on it."""

from __future__ import annotations

import getpass
import hashlib
import os
from pathlib import Path

from trainer.files import ENV_HOME


def home() -> Path:
    """Where this machine keeps runs, caches and locks: $TRAINYARD_HOME, else ~/trainyard."""
    return Path(os.environ.get(ENV_HOME) or "~/trainyard").expanduser().absolute()


def verified_path(folder: Path) -> Path:
    """Where it is remembered what was verified of a folder that a dataset was fetched to."""
    name = hashlib.sha256(os.fsencode(os.path.realpath(folder))).hexdigest()[:24]
    return home() / "fetched" / name


def user_name() -> str:
    """Who runs this: $LOGNAME or $USER, else the account's name. In a container the account may have none; then its number is told."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError since Python 3.13
        return f"uid-{os.getuid()}"
