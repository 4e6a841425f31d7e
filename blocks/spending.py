"""What the attempts of a run have cost, as the record tells."""

from __future__ import annotations

from typing import NamedTuple

from blocks.job import JobStatus
from blocks.pricing import cost_usd
from blocks.record import RunRecord


class Cost(NamedTuple):
    """In US dollars; None where nothing of it is known. `at_least`: of some attempt it is not."""

    usd: float | None = None
    at_least: bool = False


UNKNOWN = Cost()


def run_cost(record: RunRecord, attempt: int | None = None, seen: JobStatus | None = None) -> Cost:
    """Of all the run's attempts up to this one, or the newest. `seen`: its status, where the caller has it, or it has no outcome yet."""
    attempt = max(record.attempts(), default=0) if attempt is None else attempt
    ended = [_cost_of(record, number) for number in range(1, attempt + (seen is None))]
    costs = ended if seen is None else [*ended, seen.cost_usd]
    known = [usd for usd in costs if usd is not None]
    return Cost(round(sum(known), 4), at_least=len(known) < len(costs)) if known else UNKNOWN


def most_spent(record: RunRecord, attempt: int) -> float:
    """What the attempts before this one have cost at most, in US dollars: where nobody knows it, what their plan allowed."""
    return sum(_most_of(record, earlier) for earlier in range(1, attempt))


def _cost_of(record: RunRecord, attempt: int) -> float | None:
    outcome = record.outcome(attempt)
    return outcome.status.cost_usd if outcome is not None and outcome.status is not None else None


def _most_of(record: RunRecord, attempt: int) -> float:
    known = _cost_of(record, attempt)
    plan = record.plan(attempt) if known is None else None
    if known is not None or plan is None:
        return known or 0.0
    seconds = plan.attempt_seconds or plan.spec.max_runtime_seconds
    return cost_usd(plan.price, plan.spec.resources.nodes, seconds) or 0.0  # no price: then it has no limit either
