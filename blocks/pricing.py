"""Pure: what a job costs by the hour and at worst, and whether it may. The prices are dated data in ``prices.json`` beside this file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from blocks.job import JobSpec, Price, Problem


@cache
def _table() -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "prices.json").read_text())


def lookup_price(provider: str, instance_type: str, region: str) -> Price | None:
    """The on-demand price of one machine in US dollars per hour, or None where the table has none (`*` matches all)."""
    table = _table()
    entry = table["providers"].get(provider, {})
    by_region = entry.get("usd_per_hour", {})
    by_type = by_region.get(region, by_region.get("*", {}))
    usd = by_type.get(instance_type, by_type.get("*"))
    return None if usd is None else Price(usd_per_hour=usd, as_of=table["as_of"], source=entry["source"])


def cost_usd(price: Price | None, nodes: int, seconds: float) -> float | None:
    """Dollars for `nodes` machines over `seconds`, to the cent's hundredth; None without a price."""
    return None if price is None else round(price.usd_per_hour * nodes * seconds / 3600, 4)


def attempts_left(spec: JobSpec) -> int:
    """This attempt, and those that may follow it. A person may resume a run that has used them all: one more."""
    return max(1, spec.max_attempts - spec.attempt + 1)


def worst_case_usd(spec: JobSpec, price: Price | None, attempt_seconds: float) -> float | None:
    """What the run has cost at most before this attempt, and what it may cost from here on; None without a price."""
    ahead = cost_usd(price, spec.resources.nodes, attempt_seconds * attempts_left(spec))
    return None if ahead is None else round(spec.spent_usd + ahead, 4)


def _digits(limit: float, worst: float) -> int:
    """Of dollars, so that the two differ, and the limit from nothing: cents where they do."""
    return 2 if round(limit, 2) > 0 and f"{worst:.2f}" != f"{limit:.2f}" else 4


def find_budget_problems(spec: JobSpec, price: Price | None, attempt_seconds: int, price_hint: str) -> tuple[Problem, ...]:
    """Why the run may cost more than its limit, if it has one."""
    limit, worst = spec.max_cost_usd, worst_case_usd(spec, price, attempt_seconds)
    if limit is None or (worst is not None and worst <= limit):
        return ()
    if worst is None:
        message = f"nothing tells what the machine costs, so that no limit of ${limit:.{_digits(limit, 0)}f} can be kept"
        return (Problem(field="max_cost_usd", message=message, hint=f"{price_hint}; or leave the limit out"),)
    left, digits = attempts_left(spec), _digits(limit, worst)
    parts = f"{left} attempt{'s' if left > 1 else ''} of {attempt_seconds} s"
    if attempt_seconds > spec.max_runtime_seconds:
        parts += f", which is {spec.max_runtime_seconds} s of run time and the longest wait"
    if spec.spent_usd:
        parts += f", after ${spec.spent_usd:.{digits}f} for those before"
    hint = "lower the maximum run time, the longest wait or the attempts, choose a cheaper machine, or raise the limit"
    if spec.attempt > 1:
        hint = "the limit is that of the whole run: a new run from its last checkpoint (--weights) has one of its own"
    message = f"at worst this costs ${worst:.{digits}f} ({parts}), over the limit of ${limit:.{digits}f}"
    return (Problem(field="max_cost_usd", message=message, hint=hint),)
