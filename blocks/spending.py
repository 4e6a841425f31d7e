"""What the attempts of a run have cost, as the record tells."""

from __future__ import annotations

from blocks.pricing import cost_usd
from blocks.record import RunRecord


def most_spent(record: RunRecord, attempt: int) -> float:
    """What the attempts before this one have cost at most, in US dollars: where nobody knows it, what their plan allowed."""
    return sum(_most_of(record, earlier) for earlier in range(1, attempt))


def _most_of(record: RunRecord, attempt: int) -> float:
    outcome, plan = record.outcome(attempt), record.plan(attempt)
    if outcome is not None and outcome.status is not None and outcome.status.cost_usd is not None:
        return outcome.status.cost_usd
    if plan is None:
        return 0.0
    seconds = plan.attempt_seconds or plan.spec.max_runtime_seconds
    return cost_usd(plan.price, plan.spec.resources.nodes, seconds) or 0.0  # no price: then it has no limit either
