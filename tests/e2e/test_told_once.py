"""Each event is one message at the webhook, whoever dies between sending it and writing down that it was sent."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from blocks.naming import run_id_of_flow_run
from blocks.news import CLAIM_PATIENCE, STOP_PATIENCE
from tests.e2e.test_stalls import LIMIT_SECONDS, epochs, save_profile, suspend
from tests.stack import wait_for
from tests.yard import CONFIG, Yard

pytestmark = pytest.mark.e2e

AGAIN_SECONDS = CLAIM_PATIENCE.total_seconds() + 25  # until somebody else would send it, and a look of `reconcile` later


def start(yard: Yard, yard_shapes: Path, **parameters: Any) -> tuple[str, Path]:
    flow_run_id = wait_for("a run is started", lambda: yard.start(dataset=str(yard_shapes), **parameters), 120)
    return flow_run_id, yard.home / "runs" / run_id_of_flow_run(flow_run_id)


def is_told(folder: Path, key: str) -> bool:
    """Whether the record says that the news were sent."""
    path = folder / f"told/{key}.json"
    return path.exists() and '"sent":true' in path.read_text()


def is_watched(folder: Path) -> bool:
    return any(psutil.pid_exists(json.loads(path.read_text())["pid"]) for path in folder.glob("drivers/*.json"))


@pytest.mark.parametrize("victims", [("server", "flow"), pytest.param(("flow",), marks=pytest.mark.full)])
def test_a_failure_is_told_once(yard: Yard, yard_shapes: Path, victims: tuple[str, ...]) -> None:
    yard.plan_crash("before mark", victims)
    _, folder = start(yard, yard_shapes, config={**CONFIG, "model_params": {"no_such_setting": 1}})
    wait_for("the failure is sent, and its teller dies", yard.fired, 120)
    wait_for("somebody writes down that it was sent", lambda: is_told(folder, "failed-1"), AGAIN_SECONDS + 60)
    time.sleep(5)
    assert yard.told(folder.name, "failed") == 1
    [message] = [text for text in yard.messages if folder.name in text]
    for word in ("no_such_setting", "cost so far", "next:"):
        assert word in message


@pytest.mark.full
def test_a_stall_is_told_once(yard: Yard, yard_shapes: Path) -> None:
    save_profile(yard, "stall-warn", "warn")
    flow_run_id, folder = start(yard, yard_shapes, config={**CONFIG, "epochs": 300}, profile="stall-warn")
    wait_for("its second epoch's end", lambda: epochs(folder, 1)[1:], 120)
    fit = suspend(folder, "trainer.task")
    # By the flow or by `reconcile`, whoever looks first.
    wait_for("the stall is told", lambda: yard.told(folder.name, "stalled"), 3 * LIMIT_SECONDS + 60)
    yard.plan_crash("after poll", ("server", "flow"))
    wait_for("the flow dies, and the server forgets what it has seen", yard.fired, 60)
    wait_for("somebody goes on", lambda: is_watched(folder), 120)
    time.sleep(AGAIN_SECONDS)
    assert is_told(folder, "stalled-1-silent")
    assert yard.told(folder.name, "stalled") == 1
    fit.send_signal(signal.SIGCONT)
    wait_for("the run is over in Prefect", lambda: yard.state(flow_run_id) == "COMPLETED", 180)
    wait_for("the message that it finished", lambda: yard.told(folder.name, "finished"), 60)
    assert (yard.told(folder.name, "stalled"), yard.told(folder.name, "finished")) == (1, 1)


@pytest.mark.full
def test_an_unconfirmed_stop_is_told_once(yard: Yard, yard_shapes: Path) -> None:
    flow_run_id, folder = start(yard, yard_shapes, config={**CONFIG, "epochs": 3000})
    wait_for("its second epoch's end", lambda: epochs(folder, 1)[1:], 120)
    mute = yard.crash.path.with_name("mute")
    mute.touch()
    try:
        yard.api(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING"}})
        wait_for("the message", lambda: yard.told(folder.name, "not confirmed"), STOP_PATIENCE.total_seconds() + 60)
        time.sleep(30)
        assert not (folder / "attempts/1/receipt.json").exists()
    finally:
        mute.unlink()
    wait_for("the receipt", (folder / "attempts/1/receipt.json").exists, 60)
    assert yard.told(folder.name, "not confirmed") == 1
