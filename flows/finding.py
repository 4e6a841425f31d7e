"""Runs by what people type. Loads Prefect only where a bucket is reached by credentials that are saved there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blocks import outputs
from blocks.outputs import Listing
from blocks.record import RunRecord
from flows import prefect_settings
from trainer.contract import TrainyardError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import BlockDocument


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


_learned: set[tuple[str, str]] = set()


def learn_outputs(client: SyncPrefectClient) -> list[str]:
    """Notes where the runs of every saved profile are kept: a machine that looks after runs may never have begun one.

    Returns a line for each profile that says nothing of use.
    """
    from blocks.profiles import PROFILES

    lines: list[str] = []
    for kind in PROFILES:
        for document in _documents(client, kind.get_block_type_slug()):
            state = (str(document.id), str(document.updated))
            if document.name is None or state in _learned:
                continue
            try:
                remember_profile(document.name)
            except TrainyardError as exc:
                lines.append(f"profile {document.name}: {exc}")
            _learned.add(state)
    return lines


def _documents(client: SyncPrefectClient, slug: str) -> list[BlockDocument]:
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        return client.read_block_documents_by_type(slug, include_secrets=False)
    except PrefectHTTPStatusError as exc:
        if exc.response.status_code != 404:
            raise
        return []  # nobody has saved one, nor run `trainyard install`
