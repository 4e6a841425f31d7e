"""Runs by what people type. Loads Prefect only where a bucket is reached by credentials that are saved there."""

from __future__ import annotations

from blocks import outputs
from blocks.outputs import Listing
from blocks.record import RunRecord
from flows import prefect_settings


def find_run(name: str) -> RunRecord:
    """By the beginning of its id, or the URI of its record. Raises RunNotFound, ServiceUnavailable."""
    prefect_settings.apply_defaults()
    return outputs.find_run(name)


def list_runs() -> Listing:
    prefect_settings.apply_defaults()
    return outputs.list_runs()


def remember_profile(name: str, output: str | None = None) -> None:
    """Notes where runs of the profile are kept, and how that is reached, so that those which others began are found here."""
    prefect_settings.apply_defaults()
    from blocks.profiles import load_profile

    profile = load_profile(name)
    outputs.remember_output(profile.choose_output(output), profile.access)
