"""`trainyard up | down | install`: a Prefect server and worker on this machine, or what Trainyard needs on a team's server."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import click

from blocks.errors import AuthError, ConfigError, ServiceUnavailable
from blocks.outputs import all_runs
from blocks.places import home
from flows import prefect_settings
from flows.cli_runs import observe
from flows.prefect_settings import details_path, lock_path, prefect_home
from flows.reporting_text import describe_status
from trainer.contract import TrainyardError, utc_now
from trainer.locks import is_held, try_lock

RECONCILE_SECONDS = 10.0
DOWN_SECONDS = 90.0

notify_option = click.option(
    "--notify",
    envvar="TRAINYARD_NOTIFY",
    metavar="URL",
    help="Send news of runs to this webhook (Slack, Teams, other). Or, unseen by other users of the machine: TRAINYARD_NOTIFY.",
)


class Wish:
    """What the signals say: Ctrl-C, SIGTERM or a closed terminal stop `up`; a second one does not wait."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.count = 0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._hear)

    def _hear(self, _number: int, _frame: FrameType | None) -> None:
        self.count += 1
        self.stopping.set()

    def hurry(self) -> bool:
        return self.count > 1


def say(line: str) -> None:
    click.echo(line)


# --- up -----------------------------------------------------------------------------------------------------------------


@click.command()
@click.option("--port", type=click.IntRange(1, 65_535), default=4200, show_default=True, help="Port of the UI and the API.")
@notify_option
def up(port: int, notify: str | None) -> None:
    """Keep a Prefect server and a worker running on this machine, with everything Trainyard needs, until Ctrl-C.

    Trainings do not end with it.
    """
    configured = prefect_settings.configured_server(os.environ)
    if configured is not None:
        say(f"Prefect is set to use the server at {prefect_settings.without_password(configured)}, so none is started here.")
        say("`trainyard install` puts there what Trainyard needs; `prefect worker start --pool trainyard-local` starts a worker.")
        return
    lock = take_lock()
    if lock is None:
        details = prefect_settings.read_details() or {}
        say(f"`trainyard up` runs already: {details.get('ui', 'starting')} (process {details.get('pid', 'unknown')})")
        return
    try:
        keep_running(port, notify)
    finally:
        os.close(lock)


def take_lock() -> int | None:
    """Who asks whether the lock is held holds it for a moment itself, so more than one try."""
    for _ in range(10):
        lock = try_lock(lock_path())
        if lock is not None:
            return lock
        time.sleep(0.05)
    return None


def keep_running(port: int, notify: str | None) -> None:
    from flows.server import Stack, end_leftovers, require_free_port

    wish = Wish()
    wish.listen()
    left = prefect_settings.read_details()
    if left and (ended := end_leftovers(str(left.get("token", "")), 10)):
        say(f"ended {ended} processes of an earlier `trainyard up` that was killed")
    require_free_port(port)
    stack = Stack(port, home(), say, wish.stopping.is_set, wish.hurry)
    write_details(stack, ready=False)
    try:
        say(f"starting the Prefect server on port {port}: half a minute, the first time more ...")
        stack.start_server()
        bring_up(stack, notify, wish)
        if not wish.stopping.is_set():
            write_details(stack, ready=True)
            tell_ready(port)
            threading.Thread(target=keep_reconciling, args=(wish.stopping,), daemon=True).start()
        while not wish.stopping.wait(0.5):
            stack.look()
    finally:
        say("\nstopping worker and server ... (again: at once)")
        stack.stop()
        say("stopped.")
        tell_still_training()


def bring_up(stack: Any, notify: str | None, wish: Wish) -> None:
    """What Trainyard needs on the server, then the worker. Raises what the installation raised."""
    raised: list[Exception] = []

    def work() -> None:
        try:
            prepare_process(stack.environment)
            from flows.installing import install

            install(lambda line: say(f"  {line}"), notify=notify, reconcile_by_schedule=False)
        except Exception as exc:
            raised.append(exc)

    if wish.stopping.is_set():
        return
    say("setting up what Trainyard needs there ...")
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    while worker.is_alive() and not wish.stopping.is_set():
        worker.join(0.2)
    if wish.stopping.is_set():
        return
    if raised:
        raise as_told(raised[0])
    say("starting the worker ...")
    stack.worker.start()


def prepare_process(environment: dict[str, str]) -> None:
    """This process speaks to its own server. Before Prefect is imported."""
    from flows.server import FOREIGN, MARKER

    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        del os.environ[name]
    os.environ.update(environment)
    # A look that fails is repeated ten seconds later anyway.
    os.environ["PREFECT_CLIENT_MAX_RETRIES"] = "1"
    prefect_settings.apply_defaults()
    assert MARKER in os.environ


def write_details(stack: Any, *, ready: bool) -> None:
    from trainer.files import write_json

    details = {
        "url": stack.environment["PREFECT_API_URL"],
        "ui": stack.environment["PREFECT_API_URL"].removesuffix("/api"),
        "pid": os.getpid(),
        "started_at": utc_now().isoformat(),
        "ready": ready,
        "token": stack.token,
    }
    write_json(details_path(), details)


def tell_ready(port: int) -> None:
    say(f"\nready: http://127.0.0.1:{port}")
    say("  train   `trainyard train DATASET` in another terminal, or Deployments > train > Run in the UI")
    say("  stop    Ctrl-C here, or `trainyard down`; trainings go on without it")
    say(f"  logs    {prefect_home() / 'logs'}\n")


def keep_reconciling(stopping: threading.Event) -> None:
    """In a thread of its own: a server that hangs must not keep Ctrl-C from being heard. What is said twice in a row is said once."""
    last: list[str] = []
    while not stopping.wait(RECONCILE_SECONDS):
        try:
            from flows.reconcile import reconcile_pass

            lines = reconcile_pass()
        except Exception as exc:
            lines = [f"could not look after open runs: {type(exc).__name__}: {str(exc).partition(chr(10))[0][:200]}"]
        if lines != last and not stopping.is_set():
            for line in lines:
                say(line)
        last = lines


def tell_still_training() -> None:
    rows: list[str] = []
    for record in all_runs():
        try:
            seen, attempt, _ = observe(record)
        except (TrainyardError, ValueError, OSError) as exc:
            rows.append(f"  {record.run_id}  could not be looked at: {exc}")
            continue
        if attempt and not seen.state.is_terminal:
            rows.append(f"  {record.run_id}  {record.run().name}: {describe_status(seen)}")
    if not rows:
        return
    say("still training, untouched by this:")
    for row in rows:
        say(row)
    say("  look:   trainyard status RUN\n  stop:   trainyard cancel RUN\n  `trainyard up` looks after them again")


# --- down ---------------------------------------------------------------------------------------------------------------


@click.command()
def down() -> None:
    """Stop what `trainyard up` keeps running. Trainings go on."""
    from flows.server import end_leftovers

    details = prefect_settings.read_details()
    if not is_held(lock_path()):
        ended = end_leftovers(str(details.get("token", "")), 10) if details else 0
        details_path().unlink(missing_ok=True)
        say(f"ended {ended} processes of a `trainyard up` that was killed" if ended else "nothing runs here: no `trainyard up`")
        return
    if details is None:
        raise ServiceUnavailable("`trainyard up` is just starting", hint="the same command again, in a second")
    try:
        os.kill(int(details["pid"]), signal.SIGTERM)
    except PermissionError as exc:
        raise AuthError(f"process {details['pid']} is another user's", hint="ask that user, or use sudo") from exc
    deadline = time.monotonic() + DOWN_SECONDS
    while is_held(lock_path()):
        if time.monotonic() > deadline:
            raise ServiceUnavailable(f"process {details['pid']} does not end within {DOWN_SECONDS:.0f} s", hint=f"kill {details['pid']}")
        time.sleep(0.2)
    say(f"stopped the server at {details['ui']} and its worker")
    tell_still_training()


# --- install ------------------------------------------------------------------------------------------------------------


@click.command()
@notify_option
def install(notify: str | None) -> None:
    """Put what Trainyard needs on the Prefect server that PREFECT_API_URL names: blocks, work pool, deployments, automations.

    Changes nothing else there. May be repeated, after an update of Trainyard for example.
    """
    prefect_settings.apply_defaults()
    if os.environ.get("PREFECT_API_URL") is None and prefect_settings.configured_server(os.environ) is None:
        raise ConfigError(
            "no Prefect server is configured: PREFECT_API_URL is not set",
            hint="export PREFECT_API_URL=http://SERVER:4200/api; or let `trainyard up` keep a server on this machine",
        )
    say("loading Prefect ...")
    url = prefect_settings.require_server()
    say(f"server       {prefect_settings.without_password(str(url))}")
    own = prefect_settings.own_server()
    told(lambda: _install(notify, reconcile_by_schedule=own is None or own["url"] != url))
    say("done. A worker, on the machine that trains:  prefect worker start --pool trainyard-local")


def _install(notify: str | None, *, reconcile_by_schedule: bool) -> None:
    from flows.installing import install as apply

    apply(say, notify=notify, reconcile_by_schedule=reconcile_by_schedule)


def told(action: Callable[[], None]) -> None:
    try:
        action()
    except Exception as exc:
        raise as_told(exc) from exc


def as_told(exc: Exception) -> Exception:
    """What the server did not like, in one screen; a defect stays what it is."""
    import httpx
    from prefect.exceptions import PrefectException

    if not isinstance(exc, (httpx.HTTPError, PrefectException)):
        return exc
    words = " ".join(str(exc).split())[:300]
    return ServiceUnavailable(f"the Prefect server did not do it: {type(exc).__name__}: {words}", hint="the same command again is safe")
