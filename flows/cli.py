"""The `trainyard` command: only what `--help` needs. Each command lives in a module that is imported when it is called."""

from __future__ import annotations

import gc
import os
import sys

import click

from flows.cli_lazy import LazyGroup

COMPLETE = "_TRAINYARD_COMPLETE"  # set by the script that `trainyard completion` prints
GARBAGE_THRESHOLD = 50_000  # Python's 700 looks for garbage again and again in what an import has just made

COMMANDS = {
    "demo": ("flows.cli_train", "Train on a small synthetic set: a first look, needs nothing."),
    "train": ("flows.cli_train", "Train on DATASET and wait for the model."),
    "plan": ("flows.cli_train", "Show what a training would send, where and at what cost; sends nothing."),
    "check": ("flows.cli_runs", "Check that a profile can train, free of charge."),
    "runs": ("flows.cli_runs", "List the runs with state, epoch, figures, cost."),
    "status": ("flows.cli_runs", "Show one run."),
    "logs": ("flows.cli_runs", "Print the log of a run."),
    "cancel": ("flows.cli_runs", "Stop a run and wait for proof."),
    "collect": ("flows.cli_collect", "Bring a run's verified model to a folder here."),
    "resume": ("flows.cli_train", "Go on from the checkpoint of a run that failed or was stopped."),
    "dataset": ("flows.cli_dataset", "Check a dataset; stage it to a store, fetch it, list what a store has."),
    "profile": ("flows.cli_profile", "Save where and how to train, under a name."),
    "image": ("flows.cli_image", "The trainer image: build it, push it, list what a registry has."),
    "up": ("flows.cli_server", "Keep a Prefect server and a worker running here, with UI."),
    "down": ("flows.cli_server", "Stop what `trainyard up` keeps running."),
    "install": ("flows.cli_server", "Put what Trainyard needs on your own Prefect server."),
    "completion": ("flows.cli_completion", "Print the completion script for bash, zsh or fish."),
}


def is_completing_word() -> bool:
    """Whether the shell asks to complete a word that is no option: a run's id, say, which needs no command's module."""
    return COMPLETE in os.environ and not os.environ.get("COMP_WORDS", "").rpartition(" ")[2].startswith("-")


class AppGroup(LazyGroup):
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.lazy and is_completing_word():
            from flows.cli_completion import stand_in

            quick = stand_in(cmd_name)
            if quick is not None:
                return quick
        return super().get_command(ctx, cmd_name)


@click.group(cls=AppGroup, lazy=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="trainyard", message="trainyard %(version)s")
def app() -> None:
    """Train vision models on this machine or your own cloud, orchestrated by Prefect.

    A first training:  trainyard demo
    """


def use_colour() -> bool | None:
    """False where NO_COLOR says so (no-color.org); else click decides by what it writes to."""
    return False if os.environ.get("NO_COLOR") else None


def main() -> None:
    """The entry point. Expected failures are told in one screen, with the exit code of their class."""
    gc.set_threshold(GARBAGE_THRESHOLD)
    try:
        app.main(standalone_mode=False, complete_var=COMPLETE, color=use_colour())
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
    finally:
        gc.freeze()  # else all that was imported is looked through for garbage once more, before it goes with the process


def tell(exc: Exception) -> int:
    """Prints an expected failure and returns its exit code; a defect is raised again, with its traceback."""
    from trainer.errors import TrainyardError

    exc = explain_machine(exc)
    if not isinstance(exc, TrainyardError):
        raise exc
    click.secho(f"error: {exc.message}", fg="red", err=True, color=use_colour())
    if exc.hint:
        click.echo(f"next:  {exc.hint}", err=True)
    return int(exc.code)


def explain_machine(exc: Exception) -> Exception:
    """A full disk, or a place that cannot be written, as an expected failure wherever it showed; anything else as it is."""
    import sqlite3

    from trainer.errors import ExitCode, TrainyardError
    from trainer.files import DISK_FULL, READ_ONLY

    sqlite_name = getattr(exc, "sqlite_errorname", "") if isinstance(exc, sqlite3.Error) else ""
    number = exc.errno if isinstance(exc, OSError) else None
    place = f" at {exc.filename}" if isinstance(exc, OSError) and exc.filename else ""
    if number in DISK_FULL or sqlite_name == "SQLITE_FULL":
        hint = "free some space, or set TRAINYARD_HOME to a folder on another disk"
        return TrainyardError(f"the disk is full{place}", hint=hint, code=ExitCode.DISK_FULL)
    if number in READ_ONLY or sqlite_name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN")):
        hint = "mend its permissions, or set TRAINYARD_HOME to a folder that can be written"
        why = exc.strerror if isinstance(exc, OSError) else str(exc)
        return TrainyardError(f"no access{place}: {why}", hint=hint, code=ExitCode.OCCUPIED)
    return exc
