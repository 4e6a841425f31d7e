from __future__ import annotations

from pathlib import Path

import pytest

from blocks.job import JobState, JobStatus, Price
from blocks.record import Outcome, RunRecord
from blocks.spending import most_spent
from tests.unit.test_blocks_attempts import make_plan


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    return RunRecord(str(tmp_path), "spent123")


def end(record: RunRecord, attempt: int, cost_usd: float | None, usd_per_hour: float = 2.0) -> None:
    """An attempt of an hour at most."""
    plan = make_plan(record)
    price = Price(usd_per_hour=usd_per_hour, as_of="now", source="test")
    spec = plan.spec.model_copy(update={"attempt": attempt})
    record.write_plan(plan.model_copy(update={"spec": spec, "price": price, "attempt_seconds": 3600}))
    status = JobStatus(state=JobState.FAILED, cost_usd=cost_usd)
    record.write_outcome(attempt, Outcome(state=JobState.FAILED, status=status))


def test_what_was_spent_at_most_counts_a_lost_attempt_as_its_plan_did(record: RunRecord) -> None:
    end(record, 1, 0.5)
    end(record, 2, None)
    end(record, 3, 0.25)
    assert [most_spent(record, attempt) for attempt in (1, 2, 3, 4)] == [0.0, 0.5, 2.5, 2.75]
