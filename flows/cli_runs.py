"""`trainyard runs | status | logs | cancel | check`: from the record and the provider.

No Prefect server, and no import of Prefect but to check a saved profile.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import click
from pydantic import ValidationError

from blocks import load_provider
from blocks.attempt_objects import read_progress
from blocks.attempts import Action, next_step_of, provider_of, take_back_resumes
from blocks.errors import ConfigError, MissingExtra, ProviderError, ServiceUnavailable
from blocks.job import JobRef, JobState, JobStatus
from blocks.lost import stop_run
from blocks.outputs import Listing, in_parallel
from blocks.places import user_name
from blocks.record import RunFile, RunRecord
from blocks.spending import run_cost
from flows.cli_clean import Age, prune, rm
from flows.cli_completion import run_argument
from flows.display import print_table
from flows.finding import find_run, list_runs, remember_profile
from flows.reporting_text import describe_status, format_cost, format_seconds
from trainer.contract import ExitCode, TrainyardError, utc_now
from trainer.storage import ObjectFolder

FOLLOW_SECONDS = 1.0
# From the end of a job to its outcome in the record: a result is collected in between.
CLOSE_PATIENCE_SECONDS = 60.0


class Seen(NamedTuple):
    """A run's state and its latest attempt (0: none yet). `failure`: why nobody could look at the job."""

    status: JobStatus
    attempt: int
    failure: TrainyardError | None = None


def observe(record: RunRecord) -> Seen:
    """The run's state now: the stored outcome, or one look at the job."""
    attempts = record.attempts()
    if not attempts:
        return Seen(JobStatus(state=JobState.STARTING, message="no attempt yet: the flow prepares it, or ended before"), 0)
    attempt = attempts[-1]
    outcome = record.outcome(attempt)
    if outcome is not None and outcome.status is not None:
        return Seen(outcome.status, attempt)
    ref = record.ref(attempt)
    if ref is None:
        return Seen(JobStatus(state=JobState.STARTING, message="planned, not yet submitted"), attempt)
    try:
        return Seen(provider_of(record).poll(ref), attempt)
    except (ProviderError, MissingExtra) as exc:  # what is recorded is told all the same
        progress = read_progress(ObjectFolder(record.attempt_uri(attempt), record.access.resolve(record.uri)))
        return Seen(JobStatus(state=JobState.UNKNOWN, message=exc.message, hint=exc.hint, progress=progress), attempt, exc)


def summarize(record: RunRecord, seen: Seen | None = None) -> dict[str, Any]:
    run = record.run()
    status, attempt, _ = seen or observe(record)
    outcome = record.outcome(attempt) if attempt else None
    result = outcome.result if outcome else None
    progress = status.progress
    cost = run_cost(record, attempt, status)
    return {
        "run_id": record.run_id,
        "name": run.name,
        "state": status.state.value,
        "attempt": attempt,
        "epoch": progress.epoch if progress else 0,
        "epochs": progress.epochs if progress else None,
        "metrics": result.metrics if result else (progress.metrics if progress else {}),
        "metrics_split": result.metrics_split if result else "val",
        "model_uri": result.model_uri if result else None,
        "manifest_uri": result.manifest_uri if result else None,
        "cost_usd": cost.usd,
        "cost_at_least": cost.at_least,
        "duration_seconds": result.duration_seconds if result else None,
        "provider": run.provider,
        "owner": run.owner,
        "created_at": run.created_at.isoformat(),
        "reason": status.reason.value if status.reason else None,
        "message": status.message,
        "hint": status.hint,
        "record_uri": record.uri,
    }


@click.group(invoke_without_command=True)
@click.option("--state", "states", multiple=True, type=click.Choice([state.value for state in JobState]), help="Only runs in this state.")
@click.option("--name", default="", help="Only runs with this in their name.")
@click.option("--owner", help="Only runs of this person.")
@click.option("--provider", help="Only runs on this provider.")
@click.option("--since", type=Age(), help="Only runs begun in this time, such as 12h or 2d.")
@click.option("--limit", type=click.IntRange(min=1), help="At most so many, the newest.")
@click.option("--profile", help="Look where this profile keeps its runs too, now and from now on.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
@click.pass_context
def runs(ctx: click.Context, as_json: bool, states: tuple[str, ...], limit: int | None, profile: str | None, **filters: Any) -> None:
    """List the runs of the known output folders and buckets, newest first; `rm` and `prune` delete."""
    if ctx.invoked_subcommand is not None:
        return
    if profile:
        remember_profile(profile)
    listing = list_runs()
    wanted = [record for record, run in reversed(listing.runs) if fits(run, **filters)]
    rows: list[dict[str, Any]] = []
    # As many at a time as are shown, since each is a look at its job.
    step = limit or max(1, len(wanted))
    for start in range(0, len(wanted), step):
        rows += [row for row in in_parallel(lambda record: row_of(record, listing), wanted[start : start + step]) if row]
        rows = [row for row in rows if not states or row["state"] in states]
        if limit is not None and len(rows) >= limit:
            break
    rows = rows[:limit]
    for uri, exc in listing.damaged.items():
        click.echo(f"damaged: {uri} ({exc.title}: {exc.error_count()} problem(s), the first: {exc.errors()[0]['msg']})", err=True)
    for uri, silent in listing.silent.items():
        click.echo(f"not looked at: {uri}: {silent}", err=True)
    if as_json:
        click.echo(json.dumps(rows))
    elif rows:
        print_table("", ("run", "name", "state", "epoch", "mAP50", "age", "cost", "owner"), [table_row(row) for row in rows])
    else:
        click.echo("no such runs" if listing.runs else "no runs yet; a first one:  trainyard demo")


runs.add_command(rm)
runs.add_command(prune)


def row_of(record: RunRecord, listing: Listing) -> dict[str, Any] | None:
    """None of a run that cannot be read now, which the listing then says, as it does of one whose job cannot be looked at."""
    try:
        seen = observe(record)
        if seen.failure is not None:
            listing.silent[record.uri] = seen.failure
        return summarize(record, seen)
    except ValidationError as exc:
        listing.damaged[record.uri] = exc
    except (TrainyardError, OSError) as exc:
        listing.silent[record.uri] = exc
    return None


def fits(run: RunFile, *, name: str, owner: str | None, provider: str | None, since: timedelta | None) -> bool:
    return (
        name.lower() in run.name.lower()
        and owner in (None, run.owner)
        and provider in (None, run.provider)
        and (since is None or run.created_at >= utc_now() - since)
    )


def table_row(row: dict[str, Any]) -> tuple[str, ...]:
    age = (utc_now() - datetime.fromisoformat(row["created_at"])).total_seconds()
    map50 = row["metrics"].get("map50")
    state = f"{row['state']} ({row['reason']})" if row["reason"] else row["state"]
    return (
        row["run_id"],
        row["name"],
        state,
        f"{row['epoch']}/{row['epochs'] or '?'}",
        "" if map50 is None else f"{map50:.3f} {row['metrics_split']}",
        format_seconds(age),
        format_cost(row["cost_usd"], at_least=row["cost_at_least"]),
        row["owner"],
    )


@click.command()
@run_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(run: str, as_json: bool) -> None:
    """Show RUN: state, figures, cause and next step, and where its files lie."""
    record = find_run(run)
    seen = observe(record)
    row = summarize(record, seen)
    click.echo(json.dumps(row) if as_json else "\n".join(status_lines(record, row, seen.status)))
    if seen.failure is not None:
        raise SystemExit(seen.failure.code)


def status_lines(record: RunRecord, row: dict[str, Any], seen: JobStatus) -> Iterator[str]:
    yield f"{row['name']}  {record.run_id}  {describe_status(seen)}"
    if row["reason"]:
        yield f"  reason   {row['reason']}: {row['message']}"
    if row["reason"] or row["hint"]:
        yield f"  next     {row['hint'] or f'trainyard logs {record.run_id}'}"
    if row["model_uri"]:
        figures = row["metrics"]
        yield f"  figures  mAP50 {figures['map50']:.3f}, mAP50-95 {figures['map50_95']:.3f} on the {row['metrics_split']} split"
    for name in ("model_uri", "record_uri"):
        if row[name]:
            yield f"  {name.removesuffix('_uri'):8} {row[name]}"
    for event in record.events()[-5:]:
        yield f"  {event.at:%m-%d %H:%M:%S}  {event.kind}: {event.message}"


@click.command()
@run_argument
@click.option("--follow", "-f", is_flag=True, help="Go on until the run ends, over all its attempts.")
def logs(run: str, follow: bool) -> None:
    """Print the log of RUN's latest attempt."""
    record = find_run(run)
    if follow:
        follow_run(record)
        return
    ref = latest_ref(record)
    if ref is None:
        raise ConfigError(f"run {record.run_id} has no job yet", hint=f"`trainyard status {record.run_id}`")
    print_log(record, ref, until_end=False)


def follow_run(record: RunRecord) -> None:
    """The log of the latest attempt and of those that follow it, to the end of the run."""
    if latest_ref(record) is None and not is_over(record):
        click.echo(f"run {record.run_id} has no job yet; waiting for it", err=True)
    shown = 0
    idle_since = time.monotonic()
    while True:
        ref = latest_ref(record)
        if ref is not None and ref.attempt > shown:
            if shown:
                click.echo(f"--- attempt {ref.attempt} ---")
            print_log(record, ref, until_end=True)
            shown, idle_since = ref.attempt, time.monotonic()
        elif is_over(record):
            return
        elif shown and time.monotonic() - idle_since > CLOSE_PATIENCE_SECONDS:
            message = f"attempt {shown} of run {record.run_id} ended {CLOSE_PATIENCE_SECONDS:.0f} s ago, and nobody goes on with the run"
            raise ServiceUnavailable(
                message, hint=f"`trainyard resume {record.run_id}` goes on; `trainyard cancel {record.run_id}` ends it"
            )
        else:
            time.sleep(FOLLOW_SECONDS)


def print_log(record: RunRecord, ref: JobRef, *, until_end: bool) -> None:
    provider, cursor = provider_of(record), ""
    while True:
        batch = provider.logs(ref, cursor)
        for line in batch.lines:
            click.echo(line)
        cursor = batch.cursor
        if batch.ended or not (until_end or batch.lines):
            return
        if not batch.lines:
            time.sleep(FOLLOW_SECONDS)


def latest_ref(record: RunRecord) -> JobRef | None:
    refs = [ref for ref in map(record.ref, record.attempts()) if ref is not None]
    return refs[-1] if refs else None


@click.command()
@run_argument
@click.option("--why", default="", help="A word for the receipt.")
@click.option("--lost", is_flag=True, help="Close RUN even where its cluster or cloud cannot be asked any more.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def cancel(run: str, why: str, lost: bool, as_json: bool) -> None:
    """Stop RUN, and wait until it is over (at most 20 s)."""
    record = find_run(run)
    resumed = take_back_resumes(record)
    if is_over(record) and not resumed:
        click.echo(json.dumps(summarize(record)) if as_json else f"run {record.run_id} is over: {describe_status(observe(record).status)}")
        return
    outcome = stop_run(record, asked_by=f"{user_name()}@{socket.gethostname()}", why=why, lost=lost)
    attempts = record.attempts()
    if as_json:
        click.echo(json.dumps(summarize(record)))
    if outcome is None:
        still = f"is still {observe(record).status.state.value}" if attempts else "will not start"
        click.echo(f"asked; run {record.run_id} {still}: `trainyard status {record.run_id}` tells when it is over", err=True)
        raise SystemExit(int(ExitCode.UNAVAILABLE if attempts else ExitCode.OK))
    if not as_json:
        also = "; a `trainyard resume` that was starting does not begin" if resumed else ""
        click.echo(f"run {record.run_id} is {outcome.state.value}, after epoch {outcome.epoch}{also}")
        if record.receipt(attempts[-1]) is not None:
            click.echo(f"  receipt  {record.attempt_uri(attempts[-1])}/receipt.json")
        elif lost:
            click.echo("\n".join(f"  {name:8} {text}" for name, text in {"cause": outcome.message, "next": outcome.hint}.items() if text))


def is_over(record: RunRecord) -> bool:
    """Whether nothing runs and, with the attempts that the run's request allows, nothing follows."""
    request = record.run().asked()
    return next_step_of(record, max_attempts=request.max_attempts).action is Action.DONE


@click.command()
@click.argument("profile", default="local")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(profile: str, as_json: bool) -> None:
    """Check, free of charge, that PROFILE can train: software, disk, access."""
    output_uri = ""
    if profile == "local":
        provider, profiled = load_provider("local"), None
    else:
        remember_profile(profile)
        from blocks.profiles import load_profile

        profiled = load_profile(profile)
        provider, output_uri = profiled.provider(), profiled.choose_output(None)
    report = provider.check(output_uri)
    if profiled is not None and provider.CAPABILITIES.needs_image:
        from blocks.image import check_image
        from blocks.profiles import image_settings

        report = report.model_copy(update={"lines": (*report.lines, check_image(image_settings(profiled)))})
    if as_json:
        click.echo(json.dumps(report.answer()))
    else:
        for line in report.lines:
            click.echo(
                f"{'ok     ' if line.ok else 'PROBLEM'} {line.name:10} {line.message}"
                + (f"\n        fix: {line.fix}" if not line.ok else "")
            )
    if not report.ok:
        raise SystemExit(report.exit_code)
