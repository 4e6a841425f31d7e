"""What is told of a Job that is held up, and what of it is no cause any more."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from blocks.job import JobState, Waiting
from blocks.providers.kubernetes_status import parse_status
from tests.unit.test_blocks_kubernetes_status import LEAVING, NOW, TOO_MUCH, job, native, pod, stamp


def test_a_stop_that_a_lost_machine_holds_up_names_it_and_what_to_do() -> None:
    asked = job(suspend=True, cancelled=True, terminating=1)
    saving = pod("Running", metadata={"deletionTimestamp": stamp(NOW + timedelta(seconds=10))})
    assert parse_status(native(asked, saving)).message == "asked to stop; saving"
    overdue = pod("Running", metadata={"deletionTimestamp": stamp(NOW - timedelta(seconds=60))})
    unready = pod("Running", metadata=LEAVING, conditions=[{"type": "Ready", "status": "Unknown"}])
    for held in (overdue, unready):
        status = parse_status(native(asked, held))
        assert (status.state, status.native_state) == (JobState.STOPPING, "NodeLost")
        assert "node-1 does not say that its pod has ended" in status.message
        assert "kubectl delete node node-1" in status.hint


NO_MOUNT = {"reason": "FailedMount", "message": 'MountVolume.SetUp failed for volume "keys": secret "keys" not found'}
NO_POD = {"reason": "FailedCreate", "message": TOO_MUCH}
MENDED = [
    ([NO_MOUNT, {"reason": "Pulling", "message": "image"}], [pod("Pending")]),
    ([NO_POD, {"reason": "SuccessfulCreate", "message": "pod"}], []),
]


@pytest.mark.parametrize(("events", "pods"), MENDED)
def test_what_was_mended_is_no_cause_any_more(events: list[dict[str, str]], pods: list[dict[str, Any]]) -> None:
    """Else a pull that takes a while would be stopped by the short limit for what a person has to mend."""
    before = parse_status(native(job(), *pods, events=events[:1]))
    assert (before.waiting, before.reason is None) == (Waiting.MENDING, False)
    after = parse_status(native(job(), *pods, events=events))
    assert (after.waiting, after.reason) == (Waiting.MACHINE, None)
    again = parse_status(native(job(), *pods, events=[*events, events[0]]))
    assert again.waiting is Waiting.MENDING, "the latest word counts"


def test_the_hint_for_a_job_that_somebody_suspended_can_be_run_as_it_stands() -> None:
    assert 'kubectl patch job ty-r-1 -n n -p \'{"spec":{"suspend":false}}\'' in parse_status(native(job(suspend=True))).hint
