"""`trainyard profile save`: where and how to train, from a file instead of the form in the Prefect UI."""

from __future__ import annotations

import click

from flows.cli_lazy import LazyGroup

COMMANDS = {"save": ("flows.cli_profile", "Save a profile from a file, or change the one of that name.")}


@click.group(cls=LazyGroup, lazy=COMMANDS)
def profile() -> None:
    """Profiles: where and how to train, saved on the Prefect server under a name."""


@click.command()
@click.argument("name")
@click.option(
    "--file", "-f", "file", required=True, type=click.Path(dir_okay=False), help="YAML file: `provider: kubernetes`, and its fields."
)
def save(name: str, file: str) -> None:
    """Save the profile NAME from a file, in the place of an earlier one. Its secrets are kept encrypted by the server."""
    from blocks.yaml_files import read_fields
    from flows import prefect_settings

    fields = read_fields(file, hint="deployments/kubernetes/profile.yaml is an example")
    prefect_settings.apply_defaults()
    server = prefect_settings.require_server()
    if server is None:
        click.echo("starting a temporary Prefect server to save it: about half a minute (`trainyard up` keeps one running)", err=True)
        if not prefect_settings.has_own_database():
            click.echo("PREFECT_HOME or a database is set for it: `trainyard up` has a database of its own, save it there, too", err=True)
    from blocks.profiles import save_profile

    saved = save_profile(name, str(fields.pop("provider", "")), fields)
    click.echo(f"saved {saved}; is it complete?  trainyard check {name}")
