"""What a Job of several pods costs, as far as its pods are there to tell."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from blocks.job import JobState
from blocks.providers.kubernetes_status import parse_status
from tests.unit.test_blocks_kubernetes_status import EARLIER, NOW, job, native, pod, stamp


def test_the_wait_between_two_pods_that_are_there_costs_nothing() -> None:
    hour, ten = NOW - timedelta(hours=1), timedelta(minutes=10)

    def after(start: datetime, end: datetime, made: datetime | None = None) -> dict[str, Any]:
        container = {"terminated": {"exitCode": 69, "finishedAt": stamp(end)}}
        return pod("Failed", container=container, startTime=stamp(start), metadata={"creationTimestamp": stamp(made or start)})

    first = after(hour, hour + ten)
    waited = pod("Running", startTime=stamp(NOW - ten), metadata={"creationTimestamp": stamp(hour + ten)})
    running = parse_status(native(job(startTime=stamp(hour), failed=1, active=1), first, waited))
    assert (running.cost_usd, running.started_at) == (0.6667, hour), "twice ten minutes at two dollars, and forty of waiting"
    pod_in_wait = pod("Pending", startTime=None, metadata={"creationTimestamp": stamp(hour + ten)})
    pending = parse_status(native(job(startTime=stamp(hour), failed=1, active=1), first, pod_in_wait))
    assert pending.cost_usd == 0.3333
    both = (first, after(NOW - ten, NOW, made=hour + ten))
    over = parse_status(native(job(("Failed", "BackoffLimitExceeded"), startTime=stamp(hour), failed=2), *both))
    assert over.cost_usd == 0.6667
    assert "at most" not in over.message
    # Of a third, evicted between the two, nothing is left.
    two = (first, after(NOW - ten, NOW))
    lost = parse_status(native(job(("Failed", "BackoffLimitExceeded"), startTime=stamp(hour), failed=2), *two))
    assert lost.cost_usd == 2.0
    assert "at most" in lost.message


def test_a_cancelled_job_that_had_a_pod_before_says_that_its_cost_is_a_bound() -> None:
    """The pods of a suspended Job are gone, but for those that had failed before."""
    earlier = {"terminated": {"exitCode": 69, "finishedAt": stamp(EARLIER + timedelta(minutes=5))}}
    gone = job(("Suspended", "JobSuspended"), suspend=True, cancelled=True, startTime=stamp(EARLIER), failed=1)
    status = parse_status(native(gone, pod("Failed", container=earlier)))
    assert (status.state, status.cost_usd) == (JobState.CANCELLED, 1.0)
    assert "at most" in status.message
    just_now = {"terminated": {"exitCode": 130, "finishedAt": stamp(NOW)}}
    assert "at most" not in parse_status(native(gone, pod("Failed", container=just_now))).message
