"""A request from the options of the command line and a YAML file."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml
from pydantic import BaseModel, ValidationError

from blocks.errors import ConfigError
from blocks.job import Resources, TrainRequest
from blocks.yaml_files import read_fields
from trainer.contract import ExitCode, SplitConfig, TrainConfig, TrainerError, unknown_name_message
from trainer.locations import expand_home, refuse_secrets

# Fields of the request that have an option of their own; the others are set in a YAML file.
REQUEST_OPTIONS = (
    "profile",
    "max_problem_share",
    "max_runtime_seconds",
    "max_cost_usd",
    "max_attempts",
    "stage",
    "store",
    "labels",
    "output",
    "name",
    "project",
    "cost_centre",
)


def add_options(model: type[BaseModel], names: list[str], prefix: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One option per field, as text, or a flag for a yes or no: the model itself converts and refuses, as for files and the UI."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            field = model.model_fields[name]
            flag = f"--{prefix}{name}".replace("_", "-")
            help_text = (field.description or "") + _default_text(field.default, is_required=field.is_required())
            if field.annotation is bool:
                # Neither of the two given is not "no": then the file decides.
                option = click.option(f"{flag}/--no-{flag[2:]}", f"{prefix}{name}", default=None, help=help_text)
            else:
                option = click.option(flag, f"{prefix}{name}", metavar="VALUE", help=help_text)
            function = option(function)
        return function

    return decorate


def _default_text(default: Any, *, is_required: bool) -> str:
    if default in (None, "") or is_required:
        return ""
    shown = {True: "on", False: "off"}[default] if isinstance(default, bool) else getattr(default, "value", default)
    return f"  [default: {shown}]"


def request_options(function: Callable[..., Any]) -> Callable[..., Any]:
    config_names = [name for name in TrainConfig.model_fields if name != "model_params"]
    function = click.option(
        "--model-param", "model_param", multiple=True, metavar="KEY=VALUE", help="A setting by the framework's own name."
    )(function)
    function = add_options(Resources, list(Resources.model_fields))(function)
    function = add_options(TrainRequest, list(REQUEST_OPTIONS))(function)
    function = add_options(SplitConfig, list(SplitConfig.model_fields), "split_")(function)
    function = add_options(TrainConfig, config_names)(function)
    return click.option("--file", "-f", "file", type=click.Path(dir_okay=False), help="YAML file with any of these fields.")(function)


def build_request(dataset: str, options: dict[str, Any]) -> TrainRequest:
    """The request from a YAML file and options, which win. Raises ConfigError naming every field that does not fit."""
    values = read_request_file(options["file"]) if options.get("file") else {}
    config = dict(values.get("config") or {})
    split = dict(values.get("split") or {})
    resources = dict(values.get("resources") or {})
    for name, value in options.items():
        if value is None or name in ("file", "model_param"):
            continue
        if name.startswith("split_"):
            split[name.removeprefix("split_")] = value
        elif name in TrainConfig.model_fields:
            config[name] = json_or_file(value) if name == "augmentations" else value
        elif name in Resources.model_fields:
            resources[name] = value
        elif name in TrainRequest.model_fields:
            values[name] = value
    if options.get("model_param"):
        config["model_params"] = {**config.get("model_params", {}), **dict(parse_pair(pair) for pair in options["model_param"])}
    config |= {name: absolute(config[name]) for name in ("weights", "model") if isinstance(config.get(name), str)}
    values |= {"dataset": absolute_path(dataset), "config": config, "split": split, "resources": resources}
    values |= {name: absolute_path(values[name]) for name in ("output", "store", "labels") if isinstance(values.get(name), str)}
    try:
        return TrainRequest.model_validate(values)
    except ValidationError as exc:
        from blocks.provider import describe_validation  # loads the providers' base, which a completed option does not need

        raise ConfigError(describe_validation(exc), hint="`trainyard train --help` describes every field") from None


def require_files(request: TrainRequest) -> None:
    """What is not there is said at once, before Prefect is loaded and a temporary server started."""
    from blocks.dataset_sources import split_staged  # loads the store's library's users, which a completed option does not need
    from blocks.refs import find_version

    if "://" not in request.dataset and not Path(request.dataset).exists():
        raise TrainerError(f"there is no dataset at {request.dataset}", hint="give the folder of the dataset", code=ExitCode.NOT_FOUND)
    if (staged := split_staged(request.dataset)) and request.profile == "local":  # others are saved, and may say how to reach the store
        find_version(*staged)
    if request.labels is not None and not Path(request.labels).exists():
        hint = "give the folder or COCO file that holds the labels"
        raise TrainerError(f"labels: there is nothing at {request.labels}", hint=hint, code=ExitCode.NOT_FOUND)
    for name in ("weights", "model"):
        value = getattr(request.config, name)
        if value is not None and "/" in value and "://" not in value and not Path(value).is_file():
            hint = "give a file that exists, or a published name such as yolo11n.pt"
            raise TrainerError(f"{name}: there is no file {value}", hint=hint, code=ExitCode.NOT_FOUND)


def read_request_file(path: str) -> dict[str, Any]:
    """The fields of a YAML file: those of the request, and those of the config at the top level or under `config`."""
    values = read_fields(path, hint="write one field per line, such as `epochs: 30`")
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
    """Of a path; a URI stays. Raises TrainerError (CONFIG) for one with credentials in it, or of a user's home that is not there."""
    refuse_secrets(value)
    return value if "://" in value else os.path.abspath(expand_home(value))  # noqa: PTH100 - keeps links
