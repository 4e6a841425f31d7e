"""The cluster's own control groups, of either version: made for the kubelet, read to end a pod's processes, removed at the end."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
UNIFIED = (ROOT / "cgroup.controllers").is_file()


def hierarchies() -> list[Path]:
    """Version 2 has one; version 1 one for each controller."""
    return [ROOT] if UNIFIED else [folder for folder in ROOT.iterdir() if not folder.is_symlink() and (folder / "cgroup.procs").is_file()]


def make(name: str) -> None:
    for hierarchy in hierarchies():
        group = hierarchy / name
        group.mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # of version 1: a new group has none
            if not UNIFIED and (group / file).is_file():
                (group / file).write_text((hierarchy / file).read_text())
    if UNIFIED:
        for controller in (ROOT / "cgroup.controllers").read_text().split():
            (ROOT / "cgroup.subtree_control").write_text(f"+{controller}")


def processes(name: str, below: str = "") -> list[int]:
    """All of that group, or of those groups in it whose path has `below`."""
    found = set[int]()
    for hierarchy in hierarchies():
        for folder, _, _ in os.walk(hierarchy / name):
            if below in folder:
                with suppress(OSError):  # it went meanwhile
                    found.update(map(int, (Path(folder) / "cgroup.procs").read_text().split()))
    return sorted(found)


def kill(name: str, below: str = "") -> int:
    """How many processes were killed."""
    pids = processes(name, below)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return len(pids)


def remove(name: str) -> None:
    """The innermost first; only what has no process can go."""
    for hierarchy in hierarchies():
        for folder, _, _ in os.walk(hierarchy / name, topdown=False):
            Path(folder).rmdir()
