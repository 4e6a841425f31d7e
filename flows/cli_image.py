"""`trainyard image build | push | list`: the trainer image. Where the registry has it already, no Docker is needed and no second passes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from flows.cli_lazy import LazyGroup

if TYPE_CHECKING:
    from blocks.image import BuildOptions, EnsuredImage, ImageSettings, Told

COMMANDS = {
    "build": ("flows.cli_image", "Build the trainer image where its sources are new, and push it."),
    "push": ("flows.cli_image", "Push the image that was built here of these sources."),
    "list": ("flows.cli_image", "List the images of a registry, and those here."),
}
PASSWORD = "TRAINYARD_REGISTRY_PASSWORD"  # noqa: S105 - a variable's name
OPTIONS = [
    click.option(
        "--registry", "registries", multiple=True, help="Host of a registry, with a path where it wants one. Repeat it for several."
    ),
    click.option("--repository", help="Name of the image in the registry.  [default: trainyard-trainer]"),
    click.option("--profile", help="Take registry, login, base and platform from this profile."),
    click.option("--user", help=f"User of the registry; its password is read from ${PASSWORD}."),
    click.option("--base", help="Image to build on; by digest, it never changes."),
    click.option("--build-arg", "arguments", multiple=True, metavar="NAME=VALUE", help="Further argument of the Dockerfile."),
    click.option(
        "--platform", type=click.Choice(["linux/amd64", "linux/arm64"]), help="What the machines that train run.  [default: linux/amd64]"
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
]


def image_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.group(cls=LazyGroup, lazy=COMMANDS)
def image() -> None:
    """The trainer image: build it, push it, list what a registry has."""


@click.command()
@image_options
@click.option("--force", is_flag=True, help="Build although the image is there.")
@click.option("--pull", is_flag=True, help="The same, on the base as its registry has it now: for a base by tag, which may have moved.")
@click.option(
    "--network", type=click.Choice(["default", "host", "none"]), default="default", show_default=True, help="Of the build's steps."
)
def build(network: str, force: bool, pull: bool, as_json: bool, **options: Any) -> None:
    """Build the trainer image where its sources are new, and push it to every --registry, under one digest."""
    from blocks.image import BuildOptions

    how = BuildOptions(force=force, pull=pull, network="" if network == "default" else network)
    tell_ensured(bring(options, how), as_json)


@click.command()
@image_options
def push(as_json: bool, **options: Any) -> None:
    """Push the image that was built here of these sources."""
    if not (options["registries"] or options["profile"]):
        raise click.UsageError("give --registry or --profile: where to push to")
    from blocks.image import BuildOptions

    tell_ensured(bring(options, BuildOptions(build=False)), as_json)


def bring(options: dict[str, Any], how: BuildOptions) -> EnsuredImage:
    from blocks.image import ensure_image

    targets = read_targets(options)
    source = dataclasses.replace(targets[0].source(), arguments=dict(map(read_argument, options["arguments"])))
    with_registry = [target for target in targets if target.registry]
    return ensure_image(source, with_registry, make_told(), how)


@click.command(name="list")
@image_options
def list_command(as_json: bool, **options: Any) -> None:
    """List the images of every --registry, and those that Docker has here."""
    from blocks.image_engine import connect
    from blocks.image_listing import list_engine, list_registry
    from blocks.image_source import hash_source
    from trainer.errors import TrainyardError

    targets = read_targets(options)
    try:
        source = dataclasses.replace(targets[0].source(), arguments=dict(map(read_argument, options["arguments"])))
        current = hash_source(source)
    except TrainyardError:  # no sources here: then no image is the current one
        current = ""
    images = [found for target in targets if target.registry for found in list_registry(target.place(), target.identity, current)]
    note = ""
    try:
        with connect() as engine:
            images += list_engine(engine, current)
    except TrainyardError as exc:
        note = exc.message
        if not any(target.registry for target in targets):
            raise
    if as_json:
        click.echo(json.dumps({"images": [dataclasses.asdict(found) for found in images], "note": note}))
        return
    from flows.display import print_table
    from flows.staging_text import format_bytes

    rows = [
        ("*" if one.current else "", one.place, one.tag, one.digest[:19], format_bytes(one.bytes), one.created[:16].replace("T", " "))
        for one in images
    ]
    print_table("trainer images (*: of the sources here)", ("", "where", "tag", "digest", "size", "created"), rows)
    if note:
        click.echo(f"images here are not listed: {note}", err=True)


def read_targets(options: dict[str, Any]) -> list[ImageSettings]:
    """One for each registry; one without, where none is named. What is given as an option goes before the profile."""
    from blocks.image import ImageSettings
    from blocks.registry_login import Identity

    settings = read_profile(options["profile"]) if options["profile"] else ImageSettings()
    changes: dict[str, Any] = {name: options[name] for name in ("repository", "base", "platform") if options[name]}
    if options["user"]:
        if not (password := os.environ.get(PASSWORD)):
            raise click.UsageError(f"--user needs a password in ${PASSWORD}")
        changes["identity"] = Identity(options["user"], password)
    settings = dataclasses.replace(settings, **changes)
    named = [dataclasses.replace(settings, registry=registry) for registry in options["registries"]]
    for target in named or [settings]:
        if target.registry:
            target.place()  # raises for a name that is none
    return named or [settings]


def read_profile(name: str) -> ImageSettings:
    from flows import prefect_settings

    prefect_settings.apply_defaults()
    from blocks.profiles import image_settings, load_profile

    return image_settings(load_profile(name))


def read_argument(text: str) -> tuple[str, str]:
    from blocks.image_build import USER_IN_URL

    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise click.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--build-arg")
    if USER_IN_URL.search(value):
        raise click.BadParameter(f"{name} holds a user or password, and would stay in the image for all to read", param_hint="--build-arg")
    return name, value


def make_told() -> Told:
    """On a terminal one line that moves; elsewhere a line per step."""
    import time

    from blocks.image import Told
    from blocks.image_build import BuildStep
    from flows.cli_store import Ticker
    from flows.image_text import describe_sent, describe_step

    ticker = Ticker()

    def say(line: str) -> None:
        ticker.end()
        click.echo(line, err=True)
        ticker.started = time.monotonic()

    def on_step(step: BuildStep, seconds: float) -> None:
        if ticker.live:
            ticker.show(lambda _: describe_step(step, seconds))
        else:
            click.echo(describe_step(step, seconds), err=True)

    return Told(say=say, step=on_step, sent=lambda done, total: ticker.show(lambda seconds: describe_sent(done, total, seconds)))


def tell_ensured(ensured: EnsuredImage, as_json: bool) -> None:
    from flows.image_text import describe_ensured

    if as_json:
        told = {"refs": [str(ref) for ref in ensured.refs], "tag": ensured.tag, "built": ensured.built, "why": ensured.why}
        click.echo(json.dumps({**told, "sent_bytes": ensured.sent_bytes, "image_id": ensured.image_id}))
        return
    for line in describe_ensured(ensured):
        click.echo(line)
