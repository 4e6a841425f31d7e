"""`trainyard dataset stage | fetch | verify | list | show`: datasets in a store. Imports nothing heavy: a look costs a quarter second."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.staging_text import describe_counts, describe_number, describe_staged, format_bytes, format_eta, format_rate
from trainer.errors import ExitCode

if TYPE_CHECKING:
    from blocks.counting import Counts


def _a_store(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter("it is empty; give s3://bucket/prefix, az://container/prefix, or a folder")
    from trainer.storage import to_store_uri

    to_store_uri(value)
    return value


STORE = click.option(
    "--store",
    "store_uri",
    required=True,
    callback=_a_store,
    envvar="TRAINYARD_STORE",
    help="s3://bucket/prefix, az://..., gs://..., or a folder. [$TRAINYARD_STORE]",
)
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
CLEAR = "\r\x1b[K"  # the line
SHOW_EVERY_SECONDS = 0.5
LOG_EVERY_SECONDS = 10.0


class Ticker:
    """One line on a terminal that is written over, at most twice a second; elsewhere, as in the log of a CI, a line now and then."""

    def __init__(self) -> None:
        self.started = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self, text: Callable[[float], str]) -> None:
        now = time.monotonic()
        if now - self.shown >= (SHOW_EVERY_SECONDS if self.live else LOG_EVERY_SECONDS):
            self.shown = now
            line = text(now - self.started)
            click.echo(f"{CLEAR}{line}" if self.live else line, nl=not self.live, err=True)

    def end(self) -> None:
        if self.live and self.shown > self.started:
            click.echo(CLEAR, nl=False, err=True)

    def say(self, line: str) -> None:
        """A line of its own, that stays."""
        self.end()
        click.echo(line, err=True)

    def on_counts(self, counts: Counts) -> None:
        self.show(lambda seconds: describe_counts(counts, seconds))

    def on_bytes(self, done: int, total: int) -> None:
        self.show(
            lambda seconds: (
                f"{format_bytes(done)} of {format_bytes(total)}, {format_rate(done, seconds)}, ETA {format_eta(done, total, seconds)}"
            )
        )


@contextmanager
def telling_what_is_kept(ticker: Ticker, kept: str) -> Generator[None]:
    """Ctrl-C waits for what is under way: so it is told at once what is kept, and how to go on. A second one is as good as a kill."""

    def end(_number: int, _frame: object) -> None:
        os._exit(ExitCode.CANCELLED)

    def stop(_number: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, end)
        line = f"stopping when what is under way is done (Ctrl-C again: at once); {kept}\n"
        os.write(sys.stderr.fileno(), f"{CLEAR if ticker.live else ''}{line}".encode())  # the stream itself may be in use just now
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before == signal.default_int_handler:  # a shell has it ignored in what it starts in the background
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@click.command()
@click.argument("path")
@STORE
@click.option("--name", help="Name of the dataset in the store. Default: from the folder's.")
@click.option("--again", is_flag=True, help="Mend a damaged store: read all, here and there, and send what is missing or wrong there.")
@AS_JSON
def stage(path: str, store_uri: str, name: str | None, again: bool, as_json: bool) -> None:
    """Bring the folder PATH into a store. What the store has already is not sent again."""
    from blocks.staging import stage_folder

    ticker = Ticker()
    with telling_what_is_kept(ticker, "the store keeps what has arrived: the same command goes on from there"):
        staged = stage_folder(Path(path), store_uri, name, ticker.on_counts, again=again, on_silence=ticker.say)
    ticker.end()
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(staged)))
        return
    click.echo(describe_staged(staged))
    for kind, (count, example) in staged.left_out.items():
        click.echo(f"left out: {count} {kind}, such as {example}")


@click.command()
@click.argument("version")
@STORE
@click.option("--to", "folder", required=True, help="A new or empty folder.")
@AS_JSON
def fetch(version: str, store_uri: str, folder: str, as_json: bool) -> None:
    """Bring VERSION (a version, the beginning of one, or a dataset's name) to a folder, every file's sha256 compared."""
    from blocks.places import verified_path
    from blocks.refs import find_version
    from trainer.fetching import fetch_version
    from trainer.locations import expand_home

    ticker = Ticker()
    started = time.monotonic()
    wanted = find_version(store_uri, version)
    place = Path(os.path.realpath(expand_home(folder)))
    kept = f"{place}.partial-{wanted[:12]} keeps what has come: the same command goes on from there"
    with telling_what_is_kept(ticker, kept):
        fetched = fetch_version(
            *(store_uri, wanted, place, ticker.on_bytes),
            on_wait=lambda who: ticker.say(f"waiting for {who}"),
            on_silence=ticker.say,
            verified=verified_path(place),
        )
    ticker.end()
    seconds = time.monotonic() - started
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(fetched), "folder": folder, "seconds": seconds}))
    else:
        text = (
            f"{describe_number(fetched.fetched_files, 'file')} fetched, {format_rate(fetched.fetched_bytes, seconds)}"
            if fetched.fetched_files
            else "all there already"
        )
        click.echo(
            f"{folder}: version {fetched.version[:12]}, {describe_number(fetched.files, 'file')}, {format_bytes(fetched.bytes)}; {text}"
        )


@click.command()
@click.argument("version")
@STORE
@AS_JSON
def verify(version: str, store_uri: str, as_json: bool) -> None:
    """Read every file of VERSION in the store and compare its sha256."""
    from blocks.refs import find_version
    from trainer.verifying import verify_version

    ticker = Ticker()
    verified = verify_version(store_uri, find_version(store_uri, version), ticker.on_bytes, on_silence=ticker.say)
    ticker.end()
    told: dict[str, Any] = {"version": verified.version, "files": verified.files, "bytes": verified.bytes}
    click.echo(
        json.dumps(told)
        if as_json
        else f"version {verified.version[:12]}: {describe_number(verified.files, 'file')}, {format_bytes(verified.bytes)}, all right"
    )


@click.command(name="list")
@STORE
@AS_JSON
def list_command(store_uri: str, as_json: bool) -> None:
    """List the datasets of a store."""
    import msgspec

    from blocks.refs import read_refs, require_store
    from trainer.storage import open_store, told_plainly

    require_store(store_uri)
    with told_plainly(store_uri):
        refs, damaged = read_refs(open_store(store_uri), store_uri)
    if as_json:
        click.echo(msgspec.json.encode({**refs, **{name: {"damaged": exc.message} for name, exc in damaged.items()}}).decode())
        return
    if not refs and not damaged:
        click.echo(f"no datasets in {store_uri}")
        return
    from flows.display import print_table

    rows = [
        (name, ref.version[:12], ref.files, format_bytes(ref.bytes), f"{ref.updated_at:%Y-%m-%d %H:%M} UTC") for name, ref in refs.items()
    ]
    rows += [(name, "damaged", "", "", "") for name in damaged]
    print_table(f"datasets in {store_uri}", ("name", "version", "files", "size", "staged"), rows)
    for exc in damaged.values():
        click.echo(f"warning: {exc}", err=True)


@click.command()
@click.argument("version")
@STORE
@AS_JSON
def show(version: str, store_uri: str, as_json: bool) -> None:
    """Show one VERSION: how much it is, where it lies, and its folders."""
    from collections import Counter

    from blocks.refs import find_version
    from trainer.fetching import read_version
    from trainer.storage import open_store, told_plainly

    wanted = find_version(store_uri, version)
    folders: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    packs: set[str] = set()
    places: Counter[str] = Counter()
    large = 0
    with told_plainly(store_uri):
        header, files = read_version(open_store(store_uri), wanted)
        for file in files:
            folder = file.path.rpartition("/")[0] or "."
            folders[folder] += 1
            sizes[folder] += file.size
            packs.add(file.pack)
            if file.in_place:
                places[file.in_place.source] += 1
            else:
                large += not file.pack
    told = {
        "version": wanted,
        "files": header.files,
        "bytes": header.bytes,
        "packs": len(packs - {""}),
        "large_files": large,
        "in_place": dict(sorted(places.items())),
        "base": header.base,
    }
    if as_json:
        click.echo(json.dumps({**told, "folders": {name: {"files": folders[name], "bytes": sizes[name]} for name in sorted(folders)}}))
        return
    from flows.display import print_table

    click.echo(
        f"version {wanted}: {describe_number(header.files, 'file')}, {format_bytes(header.bytes)}, in "
        f"{describe_number(len(packs - {''}), 'pack')} and {describe_number(large, 'large object')}"
    )
    for place, count in sorted(places.items()):
        click.echo(f"{describe_number(count, 'file')} of them in place at {place}")
    print_table(
        "largest folders", ("folder", "files", "size"), [(name, folders[name], format_bytes(size)) for name, size in sizes.most_common(20)]
    )
