"""Where this machine keeps what is its own."""

from __future__ import annotations

import os
from pathlib import Path

from trainer.files import ENV_HOME


def home() -> Path:
    """Where this machine keeps runs, caches and locks: $TRAINYARD_HOME, else ~/trainyard."""
    return Path(os.environ.get(ENV_HOME) or "~/trainyard").expanduser().absolute()
