"""`trainyard demo | train | plan | resume`: a request from options, run by the flow in this process."""

from __future__ import annotations

import json
from typing import Any

import click
from pydantic import ValidationError

from blocks.errors import ConfigError
from blocks.job import JobState, TrainRequest, canonical_json
from flows.cli_completion import dataset_argument, run_argument
from flows.requesting import build_request, request_options, require_files
from trainer.contract import TrainyardError

DEMO = {
    "config": {
        "model": "yolo11-pico",
        "epochs": 15,
        "batch_size": 8,
        "image_size": 96,
        "learning_rate": 0.008,
        "optimizer": "AdamW",
        "model_params": {
            **{"lrf": 0.05, "warmup_epochs": 0.5, "mosaic": 0.0, "scale": 0.2},
            **{"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0},
        },
    },
    "name": "shapes-demo",
}


@click.command()
@dataset_argument
@request_options
@click.option("--new", is_flag=True, help="Start another run although an equal one is open.")
@click.option("--run-key", help="The same key is the same run, for CI.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def train(dataset: str, new: bool, run_key: str | None, as_json: bool, **options: Any) -> None:
    """Train on DATASET, a folder in YOLO, COCO or Pascal VOC format, and wait for the model.

    Killed or closed, the training goes on; the same command attaches to it again.
    """
    from flows.running import learn_output, print_failure, run_and_print, run_claimed, run_keyed

    if new and run_key:
        raise click.UsageError("--new and --run-key exclude each other: a key stands for one run")
    request = build_request(dataset, options)
    try:
        require_files(request)
        learn_output(request)
    except TrainyardError as exc:
        if as_json:
            print_failure(exc, None)
        raise
    if run_key:
        run_keyed(request, run_key, as_json)
    elif new:
        run_and_print(request, as_json)
    else:
        run_claimed(request, as_json)


@click.command()
@dataset_argument
@request_options
@click.option("--server", is_flag=True, help="Show it to the provider's server, too, which creates nothing (dry run).")
@click.option("--emit", is_flag=True, help="Print only the native request.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON.")
def plan(dataset: str, server: bool, emit: bool, as_json: bool, **options: Any) -> None:
    """Show what a training on DATASET would send, where and at what cost. Starts nothing; without --server, sends nothing."""
    from flows import prefect_settings

    # A profile is read from the server that the other commands use: told before Prefect is imported, which then reads its settings.
    prefect_settings.apply_defaults()
    from flows.drafting import ask_server, describe_draft_dataset, draft_plan
    from flows.reporting_text import describe_worst_case

    draft = draft_plan(build_request(dataset, options))
    drafted = draft.plan
    answer = ask_server(draft) if server else None
    if emit:
        click.echo(json.dumps(drafted.request, indent=2, sort_keys=True))
    elif as_json:
        told = {"server": answer.report(drafted.provider).answer()} if answer is not None else {}
        click.echo(json.dumps({**drafted.model_dump(mode="json"), **told}, indent=2))
    else:
        click.echo(f"dataset   {describe_draft_dataset(draft.dataset, drafted.spec.dataset)}")
        click.echo(f"provider  {drafted.provider}, {drafted.instance_type}, {drafted.region}")
        price = f"${drafted.price.usd_per_hour}/h ({drafted.price.source}, {drafted.price.as_of})" if drafted.price else "unknown"
        click.echo(f"price     {price}; {describe_worst_case(drafted)}")
        click.echo(f"request   {canonical_json(drafted.request)[:300]} ...  (--emit shows all)")
        for warning in drafted.warnings:
            click.echo(f"warning   {warning}")
        if answer is not None and answer.refusal is None:
            click.echo(f"server    {answer.message}")
    if answer is not None and answer.refusal is not None:
        raise answer.refusal


@click.command()
@run_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def resume(run: str, as_json: bool) -> None:
    """Go on from the last checkpoint of RUN, which failed or was stopped."""
    from blocks.attempts import Action, ask_to_resume, next_step_of
    from flows.finding import find_run
    from flows.running import run_and_print

    record = find_run(run)
    stored = record.run()
    step = next_step_of(record, max_attempts=1)
    outcome = record.outcome(step.attempt) if step.action is Action.DONE else None
    if outcome is not None and outcome.state is JobState.SUCCEEDED:
        raise ConfigError(
            f"run {record.run_id} succeeded; there is nothing to go on with", hint="start a new run with --weights and its model.pt"
        )
    request = stored.asked()
    run_and_print(request, as_json, run_id=record.run_id, resume_wish=ask_to_resume(record))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--epochs", default="15", show_default=True, help="Passes over the training split.")
@click.option("--stage/--no-stage", default=True, show_default=True, help="Go through a store, as a training on a cloud does.")
def demo(as_json: bool, epochs: str, stage: bool) -> None:
    """Train a small detector on a synthetic set of shapes: about three minutes on two cores, no account, no GPU, no download."""
    from blocks.places import home
    from blocks.provider import describe_validation
    from flows.running import run_claimed
    from trainer.shapes import write_shapes

    folder = write_shapes(home() / "demo" / "shapes")
    config = {**DEMO["config"], "epochs": epochs}  # type: ignore[dict-item]
    try:
        request = TrainRequest.model_validate({"dataset": str(folder), **DEMO, "config": config, "stage": stage})
    except ValidationError as exc:
        raise ConfigError(describe_validation(exc)) from None
    run_claimed(request, as_json)
