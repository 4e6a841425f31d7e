"""`trainyard dataset rm | gc`: takes a dataset's name out of a store, and frees what nobody needs. Shows first, asks, then deletes."""

from __future__ import annotations

import dataclasses
import json
import shlex
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import click

from flows.cli_clean import Age, is_wanted
from flows.cli_store import AS_JSON, STORE
from flows.staging_text import describe_number, format_bytes

if TYPE_CHECKING:
    from blocks.garbage import CollectionPlan


@click.command()
@click.argument("name")
@STORE
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def rm(name: str, store_uri: str, yes: bool) -> None:
    """Take the dataset NAME out of a store. `gc` then frees what no other dataset and no run needs."""
    from blocks.refs import delete_ref, list_names, read_refs, require_store
    from trainer.storage import open_store, told_plainly

    require_store(store_uri)
    with told_plainly(store_uri):
        store = open_store(store_uri)
        refs, damaged = read_refs(store, store_uri)
    ref = refs.get(name)
    if ref is not None:
        click.echo(
            f"{name}: version {ref.version[:12]}, {describe_number(ref.files, 'file')}, {format_bytes(ref.bytes)}, "
            f"{describe_number(len(ref.previous), 'version')} before it"
        )
    elif name in damaged:
        click.echo(
            f"{name}: its ref is damaged, so nobody knows its versions; what no other dataset and no run needs of them is garbage then"
        )
    known = ref is not None or name in damaged
    if not known or is_wanted("remove this dataset from the store?", yes=yes):
        with told_plainly(store_uri):
            delete_ref(store, store_uri, name)
            labels = f"{name}.labels" in list_names(store)
        rest = f" ({name}.labels, which were staged with it, stay: `rm` them, too)" if labels else ""
        click.echo(f"removed {name}{rest}; `trainyard dataset gc --store {shlex.quote(store_uri)}` frees its space")


@click.command(name="gc")
@STORE
@click.option("--grace", type=Age(), default="24h", show_default=True, help="Keep what is younger, whether it is needed or not.")
@click.option(
    "--keep-previous", type=click.IntRange(min=0), default=10, show_default=True, help="Versions of a dataset to keep before its newest."
)
@click.option("--keep-previous-for", type=Age(), help="Of those, only the ones that were written within this time, such as 30d.")
@click.option("--drop-damaged", is_flag=True, help="Of those, none whose manifest is damaged: nobody can read it.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@AS_JSON
def gc_command(
    store_uri: str, grace: timedelta, keep_previous: int, keep_previous_for: timedelta | None, drop_damaged: bool, yes: bool, as_json: bool
) -> None:
    """Free what no dataset, run or pin of a store needs. With --json it deletes only with --yes."""
    from blocks.garbage import Policy, collect, occupied_error, open_marker, plan_collection, versions_of_open_runs
    from blocks.refs import require_store
    from trainer.contract import utc_now
    from trainer.storage import told_plainly

    policy = Policy(grace=grace, keep_previous=keep_previous, previous_for=keep_previous_for, drop_damaged=drop_damaged)
    require_store(store_uri)
    runs = versions_of_open_runs()
    with told_plainly(store_uri):
        marker = open_marker(store_uri)
        plan = plan_collection(marker, store_uri, policy, runs, utc_now())
    if not as_json:
        show_plan(plan, store_uri)
    if plan.leases and plan.garbage and not as_json:  # nobody is asked for what would be refused
        raise occupied_error(store_uri, plan.leases)
    wanted = bool(plan.garbage) and (yes if as_json else is_wanted("delete this garbage for good?", yes=yes))
    freed = None
    if wanted:
        with told_plainly(store_uri):
            freed = collect(marker, store_uri, policy, versions_of_open_runs())
    if as_json:
        click.echo(json.dumps({**describe_plan(plan), "freed": dataclasses.asdict(freed) if freed else None}))
    elif freed:
        rest = f"; {describe_number(freed.left, 'object')} left, as there was not enough time: run it again" if freed.left else ""
        click.echo(f"freed {format_bytes(freed.bytes)} in {describe_number(freed.objects, 'object')}{rest}")


def show_plan(plan: CollectionPlan, store_uri: str) -> None:
    from flows.display import print_table

    kept = [(f"kept: {reason.value}", count, format_bytes(size)) for reason, (count, size) in plan.kept.items()]
    garbage = [(kind, count, format_bytes(size)) for kind, (count, size) in plan.by_kind().items()]
    if kept or garbage:
        print_table(f"garbage in {store_uri}", ("what", "objects", "size"), [*garbage, *kept])
    for lease in plan.leases:
        click.echo(f"{lease}; nothing is freed before")
    if not garbage:
        click.echo("nothing to free")


def describe_plan(plan: CollectionPlan) -> dict[str, Any]:
    def told(counts: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
        return {name: {"objects": count, "bytes": size} for name, (count, size) in counts.items()}

    kept = {reason.value: amount for reason, amount in plan.kept.items()}
    leases = [{**dataclasses.asdict(lease), "ends_in_seconds": lease.ends_in_seconds} for lease in plan.leases]
    return {"garbage": told(plan.by_kind()), "kept": told(kept), "leases": leases}
