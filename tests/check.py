"""The developers' check: format, lint, types, import rules, unit tests. Run as ``uv run python tests/check.py``.

Every step runs even when one before it failed, so that one call shows all there is to mend. A step
that passes is quiet. The exit code is 1 if any step failed. With ``--static`` the unit tests are left out, for a
caller that runs all tests anyway.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
STEPS = {
    "format": [PYTHON, "-m", "ruff", "format", "--check", "."],
    "lint": [PYTHON, "-m", "ruff", "check", "."],
    "types": [PYTHON, "-m", "pyright", "--pythonpath", PYTHON],
    "imports": [str(Path(PYTHON).with_name("lint-imports"))],
    "unit tests": [PYTHON, "-m", "pytest", "tests/unit", "-q"],
}


def run_step(command: list[str]) -> tuple[bool, float]:
    """Whether the command succeeded and its seconds; prints its output if it did not."""
    began = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        passed, output = done.returncode == 0, done.stdout.decode(errors="replace")
    except FileNotFoundError:
        passed, output = False, f"{command[0]} is not installed here; run `uv sync` and start this with `uv run`\n"
    seconds = time.monotonic() - began
    if not passed:
        print(f"$ {' '.join(command)}\n{output}", flush=True)
    return passed, seconds


def main() -> int:
    results: dict[str, tuple[bool, float]] = {}
    for name, command in STEPS.items():
        if name == "unit tests" and "--static" in sys.argv[1:]:
            continue
        print(f"{name} ...", flush=True)
        results[name] = run_step(command)
    print()
    for name, (passed, seconds) in results.items():
        print(f"{name:<12}{seconds:7.1f} s  {'passed' if passed else 'FAILED'}")
    print(f"{'in all':<12}{sum(seconds for _, seconds in results.values()):7.1f} s")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
