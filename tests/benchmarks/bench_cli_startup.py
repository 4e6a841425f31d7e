"""How long ``trainyard --help`` takes, against a bare interpreter. Run as ``uv run python tests/benchmarks/bench_cli_startup.py``.

Medians of ten runs each, taken in turn so that both see the same load. Exit 1 above 3 times bare plus 0.2 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 10
PYTHON = sys.executable
COMMANDS = {
    "python -c pass": [PYTHON, "-c", "pass"],
    "trainyard --help": [str(Path(PYTHON).with_name("trainyard")), "--help"],
}


def measure_seconds(command: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def main() -> int:
    for command in COMMANDS.values():  # once unmeasured: byte code and disk cache
        measure_seconds(command)
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            seconds[name].append(measure_seconds(command))
    bare, ours = (statistics.median(values) for values in seconds.values())
    limit = 3 * bare + 0.2
    for name, values in seconds.items():
        print(f"{name:<18} median {statistics.median(values):.3f} s  ({min(values):.3f} to {max(values):.3f}, {RUNS} runs)")
    print(f"{'limit':<18}        {limit:.3f} s  (3 x bare + 0.2 s): {'kept' if ours <= limit else 'BROKEN'}")
    return 0 if ours <= limit else 1


if __name__ == "__main__":
    sys.exit(main())
