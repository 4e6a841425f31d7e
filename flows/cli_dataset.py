"""`trainyard dataset`: its commands. A look at a store that nothing changed in takes no longer than what is imported for it."""

from __future__ import annotations

import click

from flows.cli_lazy import LazyGroup

COMMANDS = {
    "check": ("flows.cli_check", "Read a dataset, list its problems, refuse it where a training would."),
    "stage": ("flows.cli_store", "Bring a folder into a store; only what it lacks is sent."),
    "register": ("flows.cli_store_register", "Use images in a bucket where they lie."),
    "list": ("flows.cli_store", "List the datasets of a store."),
    "show": ("flows.cli_store", "Show one version: how much it is, where it lies, and its folders."),
    "fetch": ("flows.cli_store", "Bring a version to a folder, every file's sha256 compared."),
    "verify": ("flows.cli_store", "Read every file of a version in the store and compare its sha256."),
    "rm": ("flows.cli_store_gc", "Take a dataset's name out of a store."),
    "gc": ("flows.cli_store_gc", "Free what no dataset, run or pin of a store needs."),
}


@click.group(cls=LazyGroup, lazy=COMMANDS)
def dataset() -> None:
    """Check a dataset before training; stage it to a store, fetch it from there."""
