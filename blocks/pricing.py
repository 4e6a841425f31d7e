"""Pure: what a job costs by the hour and at worst. The prices are dated data in ``prices.json`` beside this file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from blocks.job import Price


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
