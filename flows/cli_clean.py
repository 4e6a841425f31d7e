"""`trainyard runs rm | prune`: deletes runs, or what of them nobody needs any more. Shows first, asks, then deletes."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from flows.cli_completion import complete_runs
from flows.staging_text import format_bytes

if TYPE_CHECKING:
    from blocks.pruning import Removal

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


class Age(click.ParamType[timedelta]):
    """`90m`, `12h`, `2d`, `4w`."""

    name = "AGE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        found = re.fullmatch(r"(\d{1,6})([smhdw])", str(value).strip())
        if found is None:
            self.fail(f"{value!r} is no age: a number and one of {' '.join(UNITS)}, such as 12h or 30d", param, ctx)
        return timedelta(seconds=int(found[1]) * UNITS[found[2]])


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", shell_complete=complete_runs)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def rm(runs: tuple[str, ...], yes: bool) -> None:
    """Delete RUNs with their models, figures and records. An open run is refused."""
    from blocks.errors import ConfigError
    from blocks.pruning import whole_run, why_in_use
    from flows.finding import find_run

    removals: dict[str, Removal] = {}
    for name in runs:
        record = find_run(name)
        reason = why_in_use(record)
        if reason:
            hint = f"`trainyard cancel {record.run_id}` first" if "damaged" not in reason else f"look at {record.uri}, delete it by hand"
            raise ConfigError(f"run {record.run_id} cannot be deleted: {reason}", run_id=record.run_id, hint=hint)
        removals[record.uri] = whole_run(record)
    show_and_delete(list(removals.values()), "delete these runs for good, models included?", yes=yes)


@click.command()
@click.option("--older-than", type=Age(), default="0s", help="Only runs that ended longer ago, such as 30d.  [default: all]")
@click.option("--keep-best", is_flag=True, help="Keep the checkpoint of the best epoch.")
@click.option("--failed", is_flag=True, help="Also of runs that failed or were cancelled: `resume` then has nothing to go on from.")
@click.option("--dry-run", is_flag=True, help="Only show.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def prune(older_than: timedelta, keep_best: bool, failed: bool, dry_run: bool, yes: bool) -> None:
    """Delete checkpoints and working files of runs that succeeded; models, figures, reports and records stay."""
    from blocks.outputs import all_runs
    from blocks.pruning import find_leftovers
    from flows import prefect_settings
    from trainer.contract import utc_now

    prefect_settings.apply_defaults()
    removals = find_leftovers(all_runs(), older_than=older_than, failed=failed, keep_best=keep_best, now=utc_now())
    if not removals:
        click.echo("nothing to prune")
    elif dry_run:
        show(removals)
    else:
        show_and_delete(removals, "delete these checkpoints and working files?", yes=yes)


def show(removals: list[Removal]) -> None:
    from flows.display import print_table

    rows = [(r.record.run_id, r.name, r.state, r.files, format_bytes(r.bytes)) for r in removals]
    total = ("in all", "", "", sum(r.files for r in removals), format_bytes(sum(r.bytes for r in removals)))
    print_table("", ("run", "name", "state", "files", "size"), [*rows, total] if len(rows) > 1 else rows)


def show_and_delete(removals: list[Removal], question: str, *, yes: bool) -> None:
    from blocks.pruning import delete

    show(removals)
    if not is_wanted(question, yes=yes):
        return
    freed = 0
    for removal in removals:
        if delete(removal):
            freed += removal.bytes
        else:
            click.echo(f"left alone: run {removal.record.run_id} is in use again", err=True)
    click.echo(f"freed {format_bytes(freed)}")


def is_wanted(question: str, *, yes: bool) -> bool:
    """Whether to delete: asks, where somebody can be asked. Raises UsageError where nobody can."""
    if yes:
        return True
    if not sys.stdin.isatty():
        raise click.UsageError("nothing was deleted: nobody can be asked here; --yes deletes without asking")
    if click.confirm(question):
        return True
    click.echo("nothing was deleted")
    return False
