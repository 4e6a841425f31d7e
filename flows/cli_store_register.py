"""`trainyard dataset register`: objects that lie in a bucket become a version of a dataset, in place. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli_store import AS_JSON, STORE, Ticker, format_bytes
from flows.staging_text import describe_missing_labels

if TYPE_CHECKING:
    from blocks.registering import Registered


@click.command()
@click.argument("uri")
@STORE
@click.option("--labels", help="A folder of labels that is laid over the objects, or a COCO .json; only these are sent.")
@click.option("--name", help="Name of the dataset in the store. Default: from the last part of URI.")
@AS_JSON
def register(uri: str, store_uri: str, labels: str | None, name: str | None, as_json: bool) -> None:
    """Use the images below URI (s3://bucket/prefix, az://..., gs://..., or a folder) where they lie: nothing of them is copied."""
    from blocks.registering import register_uri

    ticker = Ticker()
    registered = register_uri(
        uri, store_uri, labels=Path(labels) if labels else None, name=name, on_progress=lambda text: ticker.show(lambda _: text)
    )
    ticker.end()
    if warning := describe_missing_labels(registered):
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(registered)))
        return
    for line in describe_registered(registered):
        click.echo(line)


def describe_registered(registered: Registered) -> list[str]:
    lines = [
        f"{registered.name}: version {registered.version[:12]}, {registered.files} files, {format_bytes(registered.bytes)}; "
        f"{registered.in_place_files} of them, {format_bytes(registered.in_place_bytes)}, in place at {registered.source}; "
        f"{format_bytes(registered.sent_bytes)} sent in {registered.seconds:.1f} s"
    ]
    lines.append(f"labels: {registered.labelled} of {registered.images} images have one")
    if matched := registered.matched:
        if matched.unused:
            lines.append(f"labels without an image: {matched.unused}, such as {matched.unused_example}")
        lines.append(f"layout: {matched.format or matched.problem}")
    lines += [f"left out: {count} {kind}, such as {example}" for kind, (count, example) in registered.left_out.items()]
    return lines
