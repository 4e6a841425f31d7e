"""The supervisor of one attempt, and PID 1 of the image. Two modes:

``python -m trainer --attempt-dir DIR``: the attempt's folder is on this machine.
``python -m trainer [train] [--config URI] ...``: in a container that a platform started; see ``trainer/container.py``.

Owns the attempt, waits for the machine, runs the fit in a process of its own, forwards SIGTERM,
enforces the maximum run time, and says in ``exit.json`` how it ended. See ``trainer/supervisor.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.contract import AttemptLayout
from trainer.errors import ExitCode, TrainyardError
from trainer.storage import folders_told_plainly
from trainer.supervisor import Limits, Supervisor


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m trainer", description="Supervise one training attempt.")
    parser.add_argument("command", nargs="?", choices=["train"], help="as SageMaker starts an image; means nothing")
    parser.add_argument("--max-runtime-seconds", type=float, default=float("inf"), help="stop the training after this long")
    parser.add_argument(
        "--grace-seconds", type=float, default=8.0, help="time between SIGTERM and SIGKILL; in a container for saving and sending"
    )
    local = parser.add_argument_group("on a machine of one's own")
    local.add_argument("--attempt-dir", type=Path, help="folder that holds config.json")
    local.add_argument("--slots-dir", type=Path, help="folder of the machine's training slots; none: start at once")
    local.add_argument("--slots", type=int, default=1, help="trainings at a time on this machine")
    local.add_argument("--ready-fd", type=int, help="descriptor to write one line to once the attempt is owned")
    local.add_argument("--detach", action="store_true", help="go on in a process that is nobody's child")
    container = parser.add_argument_group("in a container")
    container.add_argument("--config", default="", help="path or URI of config.json, or its folder (TRAINYARD_CONFIG)")
    container.add_argument(
        "--mount",
        action="append",
        default=[],
        metavar="URI=PATH",
        help="what of a bucket lies in a folder; may be repeated (TRAINYARD_MOUNTS)",
    )
    container.add_argument("--model-dir", default="", help="path or URI for model.pt and metrics.json (TRAINYARD_MODEL_DIR)")
    container.add_argument("--checkpoint-dir", default="", help="path or URI that outlives the container (TRAINYARD_CHECKPOINT_DIR)")
    container.add_argument("--cache-dir", default="", help="folder that keeps fetched datasets for others (TRAINYARD_CACHE_DIR)")
    container.add_argument("--patience-seconds", type=float, default=900.0, help="how long to try to send what a training has left")
    container.add_argument("--root", type=Path, default=Path("/"), help=argparse.SUPPRESS)  # above the platform's own folders
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(argv)
    limits = Limits(
        slots_dir=options.slots_dir,
        slots=options.slots,
        max_runtime_seconds=options.max_runtime_seconds,
        grace_seconds=options.grace_seconds,
        patience_seconds=options.patience_seconds,
    )
    if options.attempt_dir is None:
        return main_in_container(options, limits)
    folder: Path = options.attempt_dir.absolute()
    if not (folder / AttemptLayout.CONFIG).is_file():
        sys.stdout.write(
            f"there is no {AttemptLayout.CONFIG} in {folder}\nnext: --attempt-dir names the folder of an attempt, as a launcher made it\n"
        )
        return ExitCode.NOT_FOUND
    # A launcher that kills its tree of children, as process managers do, must not find the training in it.
    if options.detach and os.fork():
        return 0
    try:
        with folders_told_plainly():
            return Supervisor(folder, limits).run(options.ready_fd)
    except TrainyardError as exc:
        sys.stdout.write(f"{exc}\n")
        return exc.code


def main_in_container(options: argparse.Namespace, limits: Limits) -> int:
    from trainer.container import run_in_container
    from trainer.environment import Told
    from trainer.mounts import parse_arguments

    try:
        mounts = parse_arguments(options.mount)
    except TrainyardError as exc:
        sys.stdout.write(f"{exc}\n")
        return exc.code
    told = Told(options.config, options.model_dir, options.checkpoint_dir, options.cache_dir, mounts)
    status = run_in_container(told, limits, options.root)
    sys.stdout.flush()
    # Threads that wait for a store must not keep a stopped container.
    os._exit(status)


if __name__ == "__main__":
    raise SystemExit(main())
