"""`trainyard completion`: the shell's own completion of commands, options and run ids. Imports nothing that is slow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import click

SHELLS = ("bash", "zsh", "fish")
MOST_RUNS = 200
RUN_COMMANDS = ("status", "logs", "cancel", "collect", "resume")
LENIENT = {"ignore_unknown_options": True, "allow_extra_args": True}


def complete_runs(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[Any]:
    """The ids of the runs, with their names where the shell shows them."""
    from click.shell_completion import CompletionItem

    if incomplete and not incomplete.isalnum():
        return []
    files = [file for folder in output_folders() for file in sorted(folder.glob(f"{incomplete}*/run.json"))[:MOST_RUNS]]
    found = {file.parent.name: _read_name(file) for file in files}
    # What was last seen in buckets, which take too long to ask.
    noted = sorted((own_home() / "seen").glob(f"*/{incomplete}*"))[:MOST_RUNS]
    found |= {file.name: file.read_text(errors="replace") for file in noted}
    return [CompletionItem(run_id, help=name) for run_id, name in found.items()]


def own_home() -> Path:
    """`blocks.places.home`, without its import."""
    return Path(os.environ.get("TRAINYARD_HOME") or "~/trainyard").expanduser().absolute()


def output_folders() -> list[Path]:
    """`blocks.record.known_outputs` without the half second that its imports take; a test holds the two together."""
    home = own_home()
    noted = [file.read_text() for file in (home / "outputs").glob("*")]
    return sorted({home / "runs", *(Path(unquote(uri.removeprefix("file://"))) for uri in noted if uri.startswith("file://"))})


def _read_name(file: Path) -> str:
    try:
        return str(json.loads(file.read_bytes())["name"])
    except (OSError, ValueError, KeyError, TypeError):  # damaged: its id is all there is to say
        return ""


run_argument = click.argument("run", shell_complete=complete_runs)
# A path for the shell to complete; what is wrong with it is said where it is read.
dataset_argument = click.argument("dataset", type=click.Path())


def stand_in(name: str) -> click.Command | None:
    """For the command `name` while one of its words is completed that is no option; None where the command itself must answer."""
    if name in RUN_COMMANDS:
        return click.Command(name, params=_run_parameters(), context_settings=LENIENT)
    if name == "runs":
        inner = {"rm": click.Command("rm", params=_run_parameters(), context_settings=LENIENT), "prune": click.Command("prune")}
        return click.Group(name, commands=inner, context_settings=LENIENT)
    return None


def _run_parameters() -> list[click.Parameter]:
    return [click.Argument(["run"], nargs=-1, shell_complete=complete_runs)]


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    bash: put  eval "$(trainyard completion bash)"  into ~/.bashrc;
    zsh: the same with zsh into ~/.zshrc;
    fish: trainyard completion fish > ~/.config/fish/completions/trainyard.fish
    """
    from click.shell_completion import BashComplete, FishComplete, ZshComplete

    from flows.cli import app

    kinds = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
    click.echo(kinds[shell](app, {}, "trainyard", "_TRAINYARD_COMPLETE").source())
