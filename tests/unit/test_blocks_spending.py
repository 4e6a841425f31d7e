from __future__ import annotations

from pathlib import Path

import pytest

from blocks.job import JobState, JobStatus, Price
from blocks.record import Outcome, RunRecord
from blocks.spending import Cost, most_spent, run_cost
from flows.cli_runs import observe, summarize
from flows.reporting_text import ending_of
from tests.unit.test_blocks_attempts import make_plan
from tests.unit.test_blocks_record import run_file


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    made = RunRecord(str(tmp_path), "spent123")
    made.open(run_file("spent123"))
    return made


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


def test_a_run_costs_what_all_its_attempts_cost(record: RunRecord) -> None:
    assert run_cost(record) == Cost()
    end(record, 1, 0.5)
    end(record, 2, 0.25)
    assert run_cost(record) == run_cost(record, 2, observe(record).status) == Cost(0.75)
    assert run_cost(record, seen=JobStatus(state=JobState.RUNNING, cost_usd=1.0)) == Cost(1.5), "a look at the newest"
    end(record, 3, None)
    assert run_cost(record) == Cost(0.75, at_least=True), "one that was lost"
    row = summarize(record)
    assert (row["cost_usd"], row["cost_at_least"]) == (0.75, True)
    assert ending_of(record, "name", "", cancelled=False).facts["Cost"] == "at least $0.75"


def test_the_cost_of_attempts_that_nobody_knows_is_unknown(record: RunRecord) -> None:
    end(record, 1, None)
    assert run_cost(record) == Cost(None)
