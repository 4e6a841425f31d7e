"""How much memory this process may still take: that of the machine, and of the control groups that a container runs in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def read_available_memory(root: Path = Path("/")) -> int | None:
    """Bytes; None where the system does not say (macOS)."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return None
    available = [int(found[1]) * 1024] if found else []
    available += [max(0, limit - used) for limit, used in _read_groups(root)]
    return min(available, default=None)


_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def own_groups(root: Path) -> Iterator[tuple[int, Path, Path]]:
    """This process's memory control groups: version, folder, topmost folder (the own one inside a container). See cgroups(7)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
            yield 1 if controllers else 2, top / path.strip("/"), top


def _read_groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each control group with a limit, from the own one up. A container sees its own as the topmost."""
    for version, inner, top in own_groups(root):
        names = _NAMES[version]
        for folder in (inner, *inner.parents):
            if folder.is_relative_to(top) and (group := _read_group(folder, *names)):
                yield group


def _read_group(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> tuple[int, int] | None:
    """None where the group has no limit. Pages of files that nobody reads are not counted as used: the kernel drops them first."""
    try:
        limit = (folder / limit_name).read_text().strip()
        usage = int((folder / usage_name).read_text())
        cached = re.search(rf"^{cache_name} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if limit == "max" else (int(limit), usage - (int(cached[1]) if cached else 0))
