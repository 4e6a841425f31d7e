"""The `trainyard` command: only what `--help` needs. Each command lives in a module that is imported when it is called."""

from __future__ import annotations

import sys
from importlib import import_module

import click

COMMANDS = {
    "demo": ("flows.cli_train", "Train on a small synthetic set: a first look, needs nothing."),
    "train": ("flows.cli_train", "Train on DATASET and wait for the model."),
    "plan": ("flows.cli_train", "Show what a training would send, where and at what cost; sends nothing."),
    "check": ("flows.cli_runs", "Check that a profile can train, free of charge."),
    "runs": ("flows.cli_runs", "List the runs with state, epoch, figures, cost."),
    "status": ("flows.cli_runs", "Show one run."),
    "logs": ("flows.cli_runs", "Print the log of a run."),
    "cancel": ("flows.cli_runs", "Stop a run and wait for proof."),
    "resume": ("flows.cli_train", "Go on from the checkpoint of a run that failed or was stopped."),
    "dataset": ("flows.cli_dataset", "Check a dataset before training."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps, and imports a command when it is wanted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return getattr(import_module(COMMANDS[cmd_name][0]), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="trainyard", message="trainyard %(version)s")
def app() -> None:
    """Train vision models on this machine or your own cloud, orchestrated by Prefect.

    A first training:  trainyard demo
    """


def main() -> None:
    """The entry point. Expected failures are told in one screen, with the exit code of their class."""
    try:
        app.main(standalone_mode=False)
    except click.ClickException as exc:
        exc.show()
        sys.exit(exc.exit_code)
    except click.exceptions.Exit as exc:
        sys.exit(exc.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(130)
    except Exception as exc:
        sys.exit(tell(exc))


def tell(exc: Exception) -> int:
    """Prints an expected failure and returns its exit code; a defect is raised again, with its traceback."""
    from trainer.contract import TrainyardError

    if not isinstance(exc, TrainyardError):
        raise exc
    click.secho(f"error: {exc.message}", fg="red", err=True)
    if exc.hint:
        click.echo(f"next:  {exc.hint}", err=True)
    return int(exc.code)
