"""Prefect's settings for a process of ours, set before Prefect is imported; whatever the user has set stays."""

from __future__ import annotations

import os

DEFAULTS = {
    # A temporary server needs about half a minute on a cold machine; Prefect gives up after 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # The command line shows progress and errors itself.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}


def apply_defaults() -> None:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)


def server_url() -> str | None:
    """The address of the server that flows will use, or None where a temporary one must be started. Imports Prefect."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value()
