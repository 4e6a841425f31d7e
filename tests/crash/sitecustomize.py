"""Kills processes at an exact moment of a flow: before or after a named step, once.

Python imports this at start where its folder is on PYTHONPATH; it kills only in a flow's process (that of a worker, or the command
that has $TRAINYARD_CRASH_COMMAND), and there only when the file $TRAINYARD_CRASH_PLAN names a moment:
{"moment": "before submit", "victims": ["flow"]}. A victim named `pause` is the flow, too: it is held there until a file `.go`
lies beside the plan. While a file `mute` lies there, no process passes a cancel on to the job.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

PLAN = Path(os.environ.get("TRAINYARD_CRASH_PLAN", "/nonexistent"))

# Module, class (or none), function.
Place = tuple[str, str, str]
LOCAL = ("blocks.providers.local_process", "LocalProvider")
KUBERNETES = ("blocks.providers.kubernetes_job", "KubernetesProvider")
# What every run goes through.
STEPS: dict[str, tuple[Place, ...]] = {
    "check": ((*LOCAL, "check"), (*KUBERNETES, "check")),
    "dataset": (("trainer.dataset", "", "check_dataset"),),
    "stage": (("blocks.staging", "", "stage_folder"),),
    "open": (("blocks.record", "RunRecord", "open"),),
    "plan": (("blocks.record", "RunRecord", "write_plan"),),
    "submit": (("blocks.provider", "Provider", "submit"),),
    "launch": ((LOCAL[0], "", "launch"), (*KUBERNETES, "_post_job")),
    "ref": (("blocks.record", "RunRecord", "write_ref"),),
    "poll": ((*LOCAL, "poll"), (*KUBERNETES, "poll")),
    "collect": (("blocks.provider", "Provider", "collect"),),
    "outcome": (("blocks.record", "RunRecord", "write_outcome"),),
    "report": (("flows.reporting", "", "publish_report"),),
    "mark": (("blocks.news", "", "mark_sent"),),
}
# What only some runs go through: those of a provider that has its jobs elsewhere, and those that are stopped.
NOTE_STEPS: dict[str, tuple[Place, ...]] = {"note": ((*KUBERNETES, "_write_note"),)}
CANCEL_STEPS: dict[str, tuple[Place, ...]] = {
    "cancel": ((*LOCAL, "cancel"), (*KUBERNETES, "cancel")),
    "receipt": (("blocks.record", "RunRecord", "write_receipt"),),
    "remove": ((*KUBERNETES, "_delete"),),
}
ALL_STEPS = STEPS | NOTE_STEPS | CANCEL_STEPS
CANCEL = (*LOCAL, "cancel")


def crash_at(moment: str) -> None:
    if not IN_FLOW:
        return
    try:
        plan = json.loads(PLAN.read_text())
        if plan["moment"] != moment:
            return
        PLAN.rename(PLAN.with_suffix(".fired"))  # once, and by one process
    except (FileNotFoundError, NotADirectoryError):
        return
    import psutil

    victims = set(plan["victims"])
    for process in psutil.process_iter():
        try:
            environment, command = process.environ(), " ".join(process.cmdline())
        except psutil.Error:
            continue
        if process.pid == os.getpid() or environment.get("TRAINYARD_HOME") != os.environ["TRAINYARD_HOME"]:
            continue
        role = role_of(command, environment)
        if role in victims:
            process.kill()
    if "lock" in victims:
        # The old trainer lives, and looks dead.
        for lock in Path(os.environ["TRAINYARD_HOME"]).glob("runs/*/attempts/1/lock"):
            if not (lock.parent / "exit.json").exists():
                lock.unlink()
    if "flow" in victims:
        os.kill(os.getpid(), 9)
    while "pause" in victims and not PLAN.with_suffix(".go").exists():
        time.sleep(0.1)


def role_of(command: str, environment: dict[str, str]) -> str:
    if "-m trainer.task" in command:
        return "fit"
    if "-m trainer " in command:
        return "supervisor"
    if "worker start" in command:
        return "worker"
    if "prefect.server" in command or "server start" in command:
        return "server"
    return ""


def wrapped(step: str, function: Callable[..., Any]) -> Callable[..., Any]:
    trains = step != "poll"  # the first polls count for nothing: until there is an epoch to lose

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal trains
        if trains:
            crash_at(f"before {step}")
        value = function(*args, **kwargs)
        trains = trains or (value.progress is not None and value.progress.epoch > 0)
        if trains:
            crash_at(f"after {step}")
        return value

    return call


def mutable(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return None if PLAN.with_name("mute").exists() else function(*args, **kwargs)

    return call


def patch(module: ModuleType) -> None:
    if module.__name__ == CANCEL[0]:
        setattr(getattr(module, CANCEL[1]), CANCEL[2], mutable(getattr(getattr(module, CANCEL[1]), CANCEL[2])))
    for step, places in ALL_STEPS.items():
        for name, owner, function in places:
            if name == module.__name__:
                place = getattr(module, owner) if owner else module
                setattr(place, function, wrapped(step, getattr(place, function)))


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in {name for places in ALL_STEPS.values() for name, _, _ in places}:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


IN_TRAINER = "TRAINYARD_SUPERVISOR_PID" in os.environ or "-m trainer" in " ".join(sys.orig_argv)
IN_FLOW = not {"PREFECT__FLOW_RUN_ID", "TRAINYARD_CRASH_COMMAND"}.isdisjoint(os.environ) and not IN_TRAINER
if "TRAINYARD_CRASH_PLAN" in os.environ and not IN_TRAINER:
    sys.meta_path.insert(0, Finder())
