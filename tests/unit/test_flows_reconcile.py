from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from prefect.client.schemas.objects import StateType

from blocks.attempts import Action, Step
from flows.reconcile import MOST_RESTARTS, Decision, Sight, decide

OPEN = Step(Action.ADOPT, 1)
OVER = Step(Action.DONE, 1)
MINUTE = timedelta(minutes=1)
STOPPING = {"driver_alive": True, "flow_state": StateType.CANCELLING}


def sight(**changes: Any) -> Sight:
    values: dict[str, Any] = {
        "step": OPEN,
        "has_record": True,
        "driver_alive": False,
        "driver_silent": MINUTE,
        "flow_state": StateType.CRASHED,
        "flow_state_age": MINUTE,
        "submitted": True,
        "cancel_asked": False,
        "restarts": 0,
    }
    return Sight(**{**values, **changes})


@pytest.mark.parametrize(
    ("what", "changes", "decision"),
    [
        ("somebody works on it", {"driver_alive": True, "flow_state": StateType.RUNNING}, Decision.LEAVE),
        ("the flow crashed", {}, Decision.RESTART),
        ("flow and worker were killed: a zombie", {"flow_state": StateType.RUNNING}, Decision.RESTART),
        ("the second report of the crash may be under way", {"flow_state_age": timedelta(seconds=5)}, Decision.LEAVE),
        ("it waits for a worker", {"flow_state": StateType.SCHEDULED}, Decision.LEAVE),
        ("the provider did not answer for long", {"flow_state": StateType.FAILED}, Decision.RESTART),
        ("Prefect's database was wiped", {"flow_state": None}, Decision.RESTART),
        ("restarted often enough", {"restarts": MOST_RESTARTS}, Decision.TEND),
        ("cancelled in the UI, flow gone", {"flow_state": StateType.CANCELLING}, Decision.CANCEL),
        ("cancelled by Prefect's clean-up", {"flow_state": StateType.CANCELLED}, Decision.CANCEL),
        ("asked to stop on the command line, then all died", {"cancel_asked": True}, Decision.CANCEL),
        ("a cancel that Prefect is carrying out", STOPPING | {"flow_state_age": timedelta(seconds=9)}, Decision.LEAVE),
        ("a cancel that nobody carries out", STOPPING, Decision.CANCEL),
        ("over, and told so", {"step": OVER, "flow_state": StateType.COMPLETED}, Decision.FORGET),
        ("over, but its flow died before it said so", {"step": OVER}, Decision.RESTART),
        ("killed long ago, before it spent anything", {"submitted": False, "driver_silent": timedelta(days=2)}, Decision.TEND),
        ("killed long ago, its job may be running", {"driver_silent": timedelta(days=2)}, Decision.RESTART),
        ("killed while it read the dataset", {"has_record": False, "submitted": False, "step": Step(Action.START, 1)}, Decision.RESTART),
    ],
)  # fmt: skip
def test_decide(what: str, changes: dict[str, Any], decision: Decision) -> None:
    assert decide(sight(**changes)) is decision, what
