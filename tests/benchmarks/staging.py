"""Staging against other tools, on loopback. Run as ``uv run python tests/benchmarks/staging.py [--scenario NAME ...]``.

Client and server share the machine's cores, there is no TLS, and a real store is slower for everybody: what is measured is
the work of the clients and how many requests they make. Rounds are interleaved, every other one backwards, so that all see
the same load and none always comes after the same other; none pays for memory that the host of a virtual machine took back.
The first call builds the server and the other tools into the user's cache folder, which needs `go`, `uv` and a network.
Exit 1 where a target is missed, 2 where nothing could be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks.staging_peers import CACHE, BenchmarkError, install_tools
from tests.benchmarks.staging_scenarios import ON_DEMAND, OURS, SCENARIOS, Bench, Outcome

COLUMNS = f"{'':<28}{'wall s':>8}  {'(min to max)':<16}{'CPU s':>8}{'server':>8}{'MB':>6}{'requests':>10}{'sent MB':>9}{'ratio':>8}{'n':>4}"


def format_table(outcome: Outcome) -> str:
    """Medians; ``ratio`` is each client's wall against ours."""
    lines = [f"== {outcome.title} ==", COLUMNS]
    ours = outcome.wall(OURS) if OURS in outcome.rows else None
    for name, values in outcome.rows.items():
        walls = [value.wall for value in values]
        median = statistics.median(walls)
        ratio = f"{median / ours:.2f}" if ours else "-"
        lines.append(
            f"{name:<28}{median:8.2f}  {f'({min(walls):.2f} to {max(walls):.2f})':<16}"
            f"{statistics.median(value.cpu for value in values):8.2f}{statistics.median(value.server_cpu for value in values):8.2f}"
            f"{max(value.rss_mb for value in values):6.0f}{max(value.requests for value in values):10}"
            f"{max(value.bytes_in for value in values) / 1e6:9.1f}{ratio:>8}{len(values):4}"
        )
    for target in outcome.targets:
        sign = ">=" if target.at_least else "<="
        verdict = "reached" if target.reached else "MISSED"
        lines.append(f"{verdict}: {target.text}: {target.value:.2f}{target.unit} (target {sign} {target.limit:g}{target.unit})")
    return "\n".join(lines + [f"note: {note}" for note in outcome.notes])


def to_json(outcome: Outcome) -> dict[str, object]:
    return {
        "title": outcome.title,
        "rows": {name: [dataclasses.asdict(value) for value in values] for name, values in outcome.rows.items()},
        "targets": [{**dataclasses.asdict(target), "reached": target.reached} for target in outcome.targets],
        "notes": outcome.notes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares staging with other tools.")
    default = [name for name in SCENARIOS if name not in ON_DEMAND]
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help=f"default: all but {', '.join(sorted(ON_DEMAND))}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slow-rounds", type=int, default=1, help="rounds of aws and rclone, which take a minute each")
    parser.add_argument("--client", action="append", help="measure this one and trainyard only; a target without its peer is left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object a scenario instead of tables")
    wanted = parser.parse_args()
    outcomes: list[Outcome] = []
    began = time.monotonic()
    try:
        tools = install_tools()
        with tempfile.TemporaryDirectory(prefix="staging-", dir=CACHE) as folder:
            bench = Bench(
                tools, Path(folder), wanted.rounds, wanted.slow_rounds, frozenset([*wanted.client, OURS] if wanted.client else ())
            )
            for name in wanted.scenario or default:
                print(f"{name} ...", file=sys.stderr, flush=True)
                found = SCENARIOS[name](bench)
                if sys.stderr.isatty():
                    print("\r\x1b[K", end="", file=sys.stderr)
                for outcome in found:
                    print(json.dumps(to_json(outcome)) if wanted.json else f"{format_table(outcome)}\n", flush=True)
                outcomes += found
    except BenchmarkError as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    missed = [target for outcome in outcomes for target in outcome.targets if not target.reached]
    print(f"{len(missed)} targets missed, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
