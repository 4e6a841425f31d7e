"""`trainyard demo | train | plan | resume`: a request from options, run by the flow in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import click
import yaml
from pydantic import BaseModel, ValidationError

from blocks.attempts import Action, next_step_of
from blocks.errors import ConfigError
from blocks.job import JobState, TrainRequest, canonical_json
from blocks.provider import describe_validation
from blocks.record import RunRecord, all_runs, find_run, home, request_hash
from flows import prefect_settings
from flows.display import TrainingDisplay, stderr_console
from flows.reporting_text import format_cost, format_figure, format_seconds
from trainer.contract import (
    AttemptLayout,
    ExitCode,
    RunLayout,
    SplitConfig,
    TrainConfig,
    TrainerError,
    TrainyardError,
    unknown_name_message,
)
from trainer.dataset import changed_files
from trainer.storage import to_path

# Fields of the request that have an option of their own; the others are set in a YAML file.
REQUEST_OPTIONS = (
    "profile",
    "max_problem_share",
    "max_runtime_seconds",
    "max_cost_usd",
    "max_attempts",
    "output",
    "name",
    "project",
    "cost_centre",
)
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


def _add_options(model: type[BaseModel], names: list[str], prefix: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One option per field, as text: the model itself converts and refuses, in one place for options, files and the UI."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            field = model.model_fields[name]
            flag = f"--{prefix}{name}".replace("_", "-")
            default = (
                ""
                if field.default in (None, "") or field.is_required()
                else f"  [default: {getattr(field.default, 'value', field.default)}]"
            )
            function = click.option(flag, f"{prefix}{name}", metavar="VALUE", help=(field.description or "") + default)(function)
        return function

    return decorate


def request_options(function: Callable[..., Any]) -> Callable[..., Any]:
    config_names = [name for name in TrainConfig.model_fields if name != "model_params"]
    function = click.option(
        "--model-param", "model_param", multiple=True, metavar="KEY=VALUE", help="A setting by the framework's own name."
    )(function)
    function = _add_options(TrainRequest, list(REQUEST_OPTIONS))(function)
    function = _add_options(SplitConfig, list(SplitConfig.model_fields), "split_")(function)
    function = _add_options(TrainConfig, config_names)(function)
    return click.option("--file", "-f", "file", type=click.Path(dir_okay=False), help="YAML file with any of these fields.")(function)


def build_request(dataset: str, options: dict[str, Any]) -> TrainRequest:
    """The request from a YAML file and options, which win. Raises ConfigError naming every field that does not fit."""
    values = read_request_file(options["file"]) if options.get("file") else {}
    config = dict(values.get("config") or {})
    split = dict(values.get("split") or {})
    for name, value in options.items():
        if value is None or name in ("file", "model_param"):
            continue
        if name.startswith("split_"):
            split[name.removeprefix("split_")] = value
        elif name in TrainConfig.model_fields:
            config[name] = json_or_file(value) if name == "augmentations" else value
        elif name in TrainRequest.model_fields:
            values[name] = value
    if options.get("model_param"):
        config["model_params"] = {**config.get("model_params", {}), **dict(parse_pair(pair) for pair in options["model_param"])}
    config |= {name: absolute(config[name]) for name in ("weights", "model") if isinstance(config.get(name), str)}
    values |= {"dataset": absolute_path(dataset), "config": config, "split": split}
    if isinstance(values.get("output"), str):
        values["output"] = absolute_path(values["output"])
    try:
        return TrainRequest.model_validate(values)
    except ValidationError as exc:
        raise ConfigError(describe_validation(exc), hint="`trainyard train --help` describes every field") from exc


def require_files(request: TrainRequest) -> None:
    """What is not there is said at once, before Prefect is loaded and a temporary server started."""
    if not Path(request.dataset).exists():
        raise TrainerError(f"there is no dataset at {request.dataset}", hint="give the folder of the dataset", code=ExitCode.NOT_FOUND)
    for name in ("weights", "model"):
        value = getattr(request.config, name)
        if value is not None and "/" in value and not Path(value).is_file():
            hint = "give a file that exists, or a published name such as yolo11n.pt"
            raise TrainerError(f"{name}: there is no file {value}", hint=hint, code=ExitCode.NOT_FOUND)


def read_request_file(path: str) -> dict[str, Any]:
    """The fields of a YAML file: those of the request, and those of the config at the top level or under `config`."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}", hint="give a YAML file with fields such as `epochs: 30`") from exc
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no fields", hint="write one per line, such as `epochs: 30`")
    values = cast("dict[str, Any]", loaded)
    for name in ("config", "split", "resources"):
        if not isinstance(values.get(name, {}), dict):
            raise ConfigError(f"{path}: {name} holds fields, not {values[name]!r}", hint=f"write its fields below `{name}:`")
    if "dataset" in values:
        raise ConfigError(f"{path}: the dataset is given on the command line", hint="leave it out of the file")
    known = [*TrainRequest.model_fields, *TrainConfig.model_fields]
    for name in values:
        if name not in known:
            raise ConfigError(
                f"{path}: {unknown_name_message('field', str(name), known)}",
                hint="mend the file; `trainyard train --help` describes every field",
            )
    config = {name: values.pop(name) for name in list(values) if name in TrainConfig.model_fields}
    return {**values, "config": {**(values.get("config") or {}), **config}}


def parse_pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{text!r} is not KEY=VALUE", hint="for example --model-param mosaic=0.5")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as exc:
        raise ConfigError(f"--model-param {text}: {value!r} is no value", hint="for example --model-param mosaic=0.5") from exc


def json_or_file(text: str) -> Any:
    """JSON itself, or the JSON or YAML of a file."""
    try:
        return yaml.safe_load(text if text.lstrip().startswith(("[", "{")) else Path(text).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ConfigError(f"augmentations: neither JSON nor a file: {exc}", hint='[{"transform": "HorizontalFlip", "p": 0.5}]') from exc


def absolute(value: str) -> str:
    """A name stays; what looks like a path of a file becomes absolute, since the trainer runs elsewhere."""
    return absolute_path(value) if Path(value).exists() and not Path(value).is_dir() else value


def absolute_path(value: str) -> str:
    return value if "://" in value else os.path.abspath(Path(value).expanduser())  # noqa: PTH100 - keeps links


# --- Commands ------------------------------------------------------------------------------------------


@click.command()
@click.argument("dataset")
@request_options
@click.option("--new", is_flag=True, help="Start another run although an equal one is open.")
@click.option("--run-key", help="The same key is the same run, for CI.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def train(dataset: str, new: bool, run_key: str | None, as_json: bool, **options: Any) -> None:
    """Train on DATASET, a folder in YOLO, COCO or Pascal VOC format, and wait for the model.

    Killed or closed, the training goes on; the same command attaches to it again.
    """
    request = build_request(dataset, options)
    require_files(request)
    run_id = None if new or run_key else find_open_run(request)
    if run_id is not None:
        stderr_console().print(f"attaches to the open run {run_id} (--new starts another)")
    run_and_print(request, as_json, run_id=run_id, run_key=run_key)


@click.command()
@click.argument("dataset")
@request_options
@click.option("--emit", is_flag=True, help="Print only the native request.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole plan as JSON.")
def plan(dataset: str, emit: bool, as_json: bool, **options: Any) -> None:
    """Show what a training on DATASET would send, where and at what cost. Sends nothing."""
    from flows.drafting import draft_plan

    drafted, index = draft_plan(build_request(dataset, options))
    if emit:
        click.echo(json.dumps(drafted.request, indent=2, sort_keys=True))
    elif as_json:
        click.echo(drafted.model_dump_json(indent=2))
    else:
        click.echo(f"dataset   {index.name} ({index.format.value}), {len(index.images)} images, version {index.version[:12]}")
        click.echo(f"provider  {drafted.provider}, {drafted.instance_type}, {drafted.region}")
        price = f"${drafted.price.usd_per_hour}/h ({drafted.price.source}, {drafted.price.as_of})" if drafted.price else "unknown"
        click.echo(
            f"price     {price}; at worst {format_cost(drafted.worst_case_usd)} in {format_seconds(drafted.spec.max_runtime_seconds)}"
        )
        click.echo(f"request   {canonical_json(drafted.request)[:300]} ...  (--emit shows all)")
        for warning in drafted.warnings:
            click.echo(f"warning   {warning}")


@click.command()
@click.argument("run")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def resume(run: str, as_json: bool) -> None:
    """Go on from the last checkpoint of RUN, which failed or was stopped."""
    record = find_run(run)
    stored = record.run()
    step = next_step_of(record, max_attempts=1)
    outcome = record.outcome(step.attempt) if step.action is Action.DONE else None
    if outcome is not None and outcome.state is JobState.SUCCEEDED:
        raise ConfigError(
            f"run {record.run_id} succeeded; there is nothing to go on with", hint="start a new run with --weights and its model.pt"
        )
    request = TrainRequest.model_validate(stored.request)
    run_and_print(request, as_json, run_id=record.run_id, resume=True)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--epochs", default="15", show_default=True, help="Passes over the training split.")
def demo(as_json: bool, epochs: str) -> None:
    """Train a small detector on a synthetic set of shapes: about three minutes on two cores, no account, no GPU, no download."""
    from trainer.shapes import write_shapes

    folder = write_shapes(home() / "demo" / "shapes")
    config = {**DEMO["config"], "epochs": epochs}  # type: ignore[dict-item]
    try:
        request = TrainRequest.model_validate({"dataset": str(folder), **DEMO, "config": config})
    except ValidationError as exc:
        raise ConfigError(describe_validation(exc)) from exc
    run_and_print(request, as_json)


# --- Running the flow --------------------------------------------------------------------------------------


def find_open_run(request: TrainRequest) -> str | None:
    """The newest run of this very request that is not over."""
    wanted = request_hash(request)
    for record in reversed(all_runs()):
        if record.run().request_hash != wanted or next_step_of(record, max_attempts=request.max_attempts).action is Action.DONE:
            continue
        index = record.dataset()
        changed = changed_files(index, Path(index.root)) if index is not None else []
        if changed:
            stderr_console().print(f"does not attach to run {record.run_id}: {changed[0]} changed since; this is a new run")
            continue
        return record.run_id
    return None


def run_and_print(
    request: TrainRequest, as_json: bool, *, run_id: str | None = None, run_key: str | None = None, resume: bool = False
) -> None:
    prefect_settings.apply_defaults()
    display = TrainingDisplay()
    display.say("loading Prefect ...")
    if prefect_settings.server_url() is None:
        display.say("starting a temporary Prefect server for this run: about half a minute (`prefect server start` keeps one running)")
    from flows.train import LISTENER, train

    parameters = {name: getattr(request, name) for name in TrainRequest.model_fields}
    LISTENER.set(display.on_status)
    with display:
        try:
            # Prefect types a call as if it could return a state; with return_state unset it cannot.
            summary = cast("dict[str, Any]", train(**parameters, run_id=run_id, run_key=run_key, resume=resume))
        except KeyboardInterrupt:
            tell_detached(display.record)
            raise
        except TrainyardError as exc:
            if as_json:
                known = display.record.run_id if display.record else run_id
                failed = {"run_id": known, "state": "failed", "error": exc.message, "hint": exc.hint, "exit_code": int(exc.code)}
                click.echo(json.dumps(failed))
            raise
    if as_json:
        click.echo(json.dumps(summary))
    else:
        print_summary(summary)


def tell_detached(record: RunRecord | None) -> None:
    if record is not None:
        click.echo(
            "\nstopped watching; the training goes on.\n"
            f"  again:  trainyard logs -f {record.run_id}\n"
            f"  stop:   trainyard cancel {record.run_id}",
            err=True,
        )


def print_summary(summary: dict[str, Any]) -> None:
    metrics = summary["metrics"]
    attempt = to_path(summary["manifest_uri"]).parent
    map50, map50_95 = (format_figure(metrics.get(name)) for name in ("map50", "map50_95"))
    figures = f"mAP50 {map50}, mAP50-95 {map50_95} on the {summary['metrics_split']} split"
    click.secho(f"{summary['name']} trained in {format_seconds(summary['duration_seconds'])}: {figures}", fg="green")
    click.echo(f"  model    {to_path(summary['model_uri'])}")
    click.echo(f"  report   {attempt.parents[1] / RunLayout.REPORT}")
    picture = attempt / AttemptLayout.SAMPLES / "grid.jpg"
    if picture.exists():
        click.echo(f"  picture  {picture}")
    click.echo(f"  cost     {format_cost(summary['cost_usd'])}")
