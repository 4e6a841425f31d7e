"""``python -m trainer --attempt-dir DIR``: the supervisor of one attempt, and PID 1 of the image.

Owns the attempt, waits for the machine, runs the fit in a process of its own, forwards SIGTERM,
enforces the maximum run time, and says in ``exit.json`` how it ended. See ``trainer/supervisor.py``.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from trainer.supervisor import Limits, Supervisor


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Supervise one training attempt.")
    parser.add_argument("--attempt-dir", type=Path, required=True, help="folder that holds config.json")
    parser.add_argument("--slots-dir", type=Path, help="folder of the machine's training slots; none: start at once")
    parser.add_argument("--slots", type=int, default=1, help="trainings at a time on this machine")
    parser.add_argument("--max-runtime-seconds", type=float, default=float("inf"), help="stop the training after this long")
    parser.add_argument("--grace-seconds", type=float, default=8.0, help="time to save a checkpoint between SIGTERM and SIGKILL")
    parser.add_argument("--ready-fd", type=int, help="descriptor to write one line to once the attempt is owned")
    parser.add_argument("--detach", action="store_true", help="go on in a process that is nobody's child")
    options = parser.parse_args()
    # A launcher that kills its tree of children, as process managers do, must not find the training in it.
    if options.detach and os.fork():
        return 0
    limits = Limits(
        slots_dir=options.slots_dir,
        slots=options.slots,
        max_runtime_seconds=options.max_runtime_seconds,
        grace_seconds=options.grace_seconds,
    )
    return Supervisor(options.attempt_dir.absolute(), limits).run(options.ready_fd)


if __name__ == "__main__":
    raise SystemExit(main())
