"""`trainyard collect`: a run's verified model and figures, in a folder of this machine."""

from __future__ import annotations

import json

import click

from flows.cli_completion import run_argument
from flows.staging_text import format_bytes


@click.command()
@run_argument
@click.option("--to", "folder", type=click.Path(file_okay=False), help="Folder to bring it to.  [default: a folder named as the run]")
@click.option("--partial", is_flag=True, help="Of a run that failed or was stopped: its last good checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def collect(run: str, folder: str | None, partial: bool, as_json: bool) -> None:
    """Bring RUN's model, metrics and evaluation to a folder, each held to its sha256. What is there already stays."""
    from blocks.attempts import provider_of
    from blocks.errors import ConfigError
    from blocks.results import fetch_result
    from flows.finding import find_run
    from trainer.locations import expand_home

    record = find_run(run)
    refs = [ref for ref in map(record.ref, reversed(record.attempts())) if ref is not None]
    if not refs:
        raise ConfigError(f"run {record.run_id} has no job yet", hint=f"`trainyard status {record.run_id}`")
    outcome = record.outcome(refs[0].attempt)
    result = outcome.result if outcome is not None else None
    # A run that is over has its result in the record: then nobody has to reach the cluster or cloud that trained it.
    if result is None or (result.outcome != "complete" and not partial):
        result = provider_of(record).collect(refs[0], allow_partial=partial)
    place = expand_home(folder or record.run().name).absolute()
    model = fetch_result(result, refs[0].output_uri, place, record.access, lambda line: click.echo(line, err=True))
    size = sum(file.bytes for file in result.files.values())
    if as_json:
        files = {name: file.model_dump(mode="json") for name, file in result.files.items()}
        click.echo(json.dumps({"run_id": record.run_id, "outcome": result.outcome, "model": str(model), "files": files}))
    else:
        click.echo(f"{record.run().name}: {len(result.files)} files, {format_bytes(size)}, as the {result.outcome} run's manifest says")
        click.echo(f"  model    {model}")
