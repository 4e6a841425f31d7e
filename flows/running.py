"""Which run a request goes on with, and that run's flow in this process, to its result on the screen."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from pathlib import Path
from typing import Any, cast

import click
from pydantic import ValidationError

from blocks.attempts import Action, next_step_of, result_of
from blocks.claims import claim_run, release
from blocks.errors import PlanChanged, ServiceUnavailable
from blocks.job import JobState, TrainRequest
from blocks.lost import stop_run
from blocks.naming import run_id_of_key
from blocks.outputs import all_runs, look_everywhere
from blocks.places import user_name
from blocks.record import RunRecord, describe_dataset_change, describe_difference, request_hash
from flows import prefect_settings
from flows.display import TrainingDisplay, stderr_console
from flows.finding import remember_profile
from flows.reporting_text import format_cost, format_figure, format_seconds, place
from trainer.contract import AttemptLayout, ExitCode, RunLayout, TrainyardError
from trainer.storage import is_bucket, to_path

TEMPORARY_SERVER = "starting a temporary Prefect server for this run: about half a minute (`trainyard up` keeps one running)"
SUMMARY = (
    *("run_id", "name", "state", "model_uri", "manifest_uri", "metrics", "metrics_split"),
    *("cost_usd", "cost_at_least", "duration_seconds"),
)


# --- Which run --------------------------------------------------------------------------------------------


def learn_output(request: TrainRequest) -> None:
    """Where the profile keeps its runs: an open one of this request, which another machine began, is then found here."""
    if request.profile != "local":
        prefect_settings.apply_defaults()
        if prefect_settings.require_server() is None:
            stderr_console().print(TEMPORARY_SERVER, markup=False, soft_wrap=True)
        remember_profile(request.profile, request.output)


def run_claimed(request: TrainRequest, as_json: bool) -> None:
    """The run of this request that is open or begins at this moment, else a new one; however many ask at once."""
    wanted = request_hash(request)
    claimed = claim_run(wanted, lambda: find_open_run(request))
    if not claimed.is_new:
        stderr_console().print(f"attaches to the open run {claimed.run_id} (--new starts another)", highlight=False)
    try:
        run_and_print(request, as_json, run_id=claimed.run_id)
    finally:
        release(wanted)


def find_open_run(request: TrainRequest) -> str | None:
    """The newest run of this very request that is not over."""
    wanted = request_hash(request)
    for record in reversed(all_runs()):
        try:
            if record.run().current_hash() != wanted or next_step_of(record, max_attempts=request.max_attempts).action is Action.DONE:
                continue
            change = describe_dataset_change(record, Path(request.dataset))
        except ValidationError:  # damage, which `trainyard runs` names
            continue
        if not change:
            return record.run_id
        stderr_console().print(f"does not attach to run {record.run_id}: {change} since; this is a new run", markup=False)
    return None


def run_keyed(request: TrainRequest, run_key: str, as_json: bool) -> None:
    """The run of the key. Raises PlanChanged where the key stands for another request, or for other files under the same path."""
    for record in find_records(run_id_of_key(run_key)):
        run = record.run()
        change = describe_dataset_change(record, Path(request.dataset))
        if run.current_hash() != request_hash(request):
            change = describe_difference(run.request, request.model_dump(mode="json"))
        if change:
            raise PlanChanged(
                f"the run key {run_key!r} is that of run {record.run_id}, which trained something else: {change}",
                run_id=record.run_id,
                hint="use another run key, or the same request and dataset",
            )
        if record.folder.get(RunLayout.REPORT) is not None and (summary := read_summary(record)) is not None:
            print_result(summary, as_json)
            return
    run_and_print(request, as_json, run_key=run_key)


def read_summary(record: RunRecord) -> dict[str, Any] | None:
    """What the flow of a run that succeeded has returned, from the record; None of any other run."""
    from flows.cli_runs import summarize

    row = summarize(record)
    return {name: row[name] for name in SUMMARY} if row["state"] == JobState.SUCCEEDED and row["manifest_uri"] else None


# --- The flow ---------------------------------------------------------------------------------------------


def run_and_print(
    request: TrainRequest, as_json: bool, *, run_id: str | None = None, run_key: str | None = None, resume_wish: str = ""
) -> None:
    prefect_settings.apply_defaults()
    # A server that is gone is told once, at the end, and not by a page of internals for each event that it does not take.
    os.environ.setdefault("PREFECT_LOGGING_INTERNAL_LEVEL", "CRITICAL")
    display = TrainingDisplay()
    display.say("loading Prefect ...")
    import httpx

    try:
        if prefect_settings.require_server() is None:
            display.say(TEMPORARY_SERVER)
        from flows.job_tasks import ON_RETRY
        from flows.train import LISTENER, RESUME_WISH, train

        # Log lines that Prefect's server does not take: the record has all, and the end tells.
        logging.raiseExceptions = False
        parameters = {name: getattr(request, name) for name in TrainRequest.model_fields}
        LISTENER.set(display.on_status)
        ON_RETRY.set(display.say)
        RESUME_WISH.set(resume_wish)
        with display:
            # Prefect types a call as if it could return a state; with return_state unset it cannot.
            summary = cast("dict[str, Any]", train(**parameters, run_id=run_id, run_key=run_key, resume=bool(resume_wish)))
    except KeyboardInterrupt:
        ask_what_to_do(display.record)
        raise
    except TrainyardError as exc:
        if as_json:
            print_failure(exc, recorded(display.record.run_id if display.record else run_id))
        tell_left(display.record or next(iter(find_records(run_id) if run_id else []), None))
        raise
    except (httpx.HTTPError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and "Failed to reach API" not in str(exc):
            raise
        found = find_without_server(exc, display.record, request)
        if isinstance(found, TrainyardError):
            if as_json:
                print_failure(found, recorded(display.record.run_id if display.record else run_id))
            raise found from exc
        summary = found
    print_result(summary, as_json)


def find_without_server(exc: Exception, record: RunRecord | None, request: TrainRequest) -> dict[str, Any] | TrainyardError:
    """What the record says where Prefect's server left in the middle: the result, how the run ended, or that it goes on."""
    message = f"the Prefect server does not answer ({type(exc).__name__})"
    if record is None:
        return ServiceUnavailable(f"{message}; nothing was started", hint="see that it runs, then the same command again")
    step = next_step_of(record, max_attempts=request.max_attempts)
    if step.action is Action.DONE:
        try:
            result_of(record, step)
        except TrainyardError as ended:
            return ended
        if summary := read_summary(record):
            return summary
    tell_detached(record)
    hint = "start the server, then the same command again"
    return ServiceUnavailable(f"{message}; run {record.run_id} goes on without it", hint=hint, run_id=record.run_id)


# --- Ctrl-C -----------------------------------------------------------------------------------------------


def ask_what_to_do(record: RunRecord | None) -> None:
    """After Ctrl-C: the training goes on, unless somebody at the terminal wants it stopped. A second Ctrl-C leaves it alone."""
    if record is None:
        return
    answer = "d"
    if sys.stdin.isatty() and sys.stderr.isatty():
        try:
            answer = click.prompt(
                f"\nrun {record.run_id}: [d]etach and let it train, or [c]ancel it?",
                type=click.Choice(["d", "c"]),
                default="d",
                show_choices=False,
                err=True,
            )
        except (click.Abort, KeyboardInterrupt):
            answer = "d"
    if answer == "c":
        outcome = stop_run(record, asked_by=who_asks(), why="Ctrl-C")
        told = f"is {outcome.state.value}, after epoch {outcome.epoch}" if outcome else "was asked to stop, and is not over yet"
        click.echo(f"run {record.run_id} {told}; `trainyard status {record.run_id}` tells more", err=True)
    else:
        tell_detached(record)


def who_asks() -> str:
    return f"{user_name()}@{socket.gethostname()}"


def tell_detached(record: RunRecord) -> None:
    click.echo(
        "\nstopped watching; the training goes on.\n"
        f"  again:  trainyard logs -f {record.run_id}\n"
        f"  stop:   trainyard cancel {record.run_id}",
        err=True,
    )


def tell_left(record: RunRecord | None) -> None:
    """After an error, a login that has expired, say: a job that was submitted and is not known to be over goes on."""
    try:
        attempts = record.attempts() if record is not None else []
        if record is not None and attempts and record.outcome(attempts[-1]) is None and record.ref(attempts[-1]) is not None:
            tell_detached(record)
    except TrainyardError as exc:
        click.echo(f"whether the training goes on is not known: {exc.message}", err=True)


# --- The result -------------------------------------------------------------------------------------------


def recorded(run_id: str | None) -> str | None:
    """The id where such a run was written down: what is refused before that is no run."""
    return run_id if run_id and find_records(run_id) else None


def find_records(run_id: str) -> list[RunRecord]:
    """In the known outputs that answer: one as a rule."""
    return look_everywhere(lambda output: [record] if (record := output.record(run_id)).exists() else [])


def print_failure(exc: TrainyardError, run_id: str | None) -> None:
    state = "unknown" if exc.code == ExitCode.UNAVAILABLE else "failed"
    failed = {"run_id": run_id, "state": state, "error": exc.message, "hint": exc.hint, "exit_code": int(exc.code)}
    click.echo(json.dumps(failed))


def print_result(summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary))
        return
    metrics = summary["metrics"]
    attempt = summary["manifest_uri"].rpartition("/")[0]
    map50, map50_95 = (format_figure(metrics.get(name)) for name in ("map50", "map50_95"))
    figures = f"mAP50 {map50}, mAP50-95 {map50_95} on the {summary['metrics_split']} split"
    click.secho(f"{summary['name']} trained in {format_seconds(summary['duration_seconds'])}: {figures}", fg="green")
    click.echo(f"  model    {place(summary['model_uri'])}")
    run_uri = attempt.rsplit("/", 2)[0]
    click.echo(f"  report   {place(f'{run_uri}/{RunLayout.REPORT}')}")
    picture = f"{attempt}/{AttemptLayout.SAMPLES}/grid.jpg"
    if not is_bucket(picture) and to_path(picture).exists():
        click.echo(f"  picture  {place(picture)}")
    click.echo(f"  cost     {format_cost(summary['cost_usd'], at_least=summary['cost_at_least'])}")
    if is_bucket(summary["model_uri"]):
        click.echo(f"  next     trainyard collect {summary['run_id']}   (brings the model here)")
