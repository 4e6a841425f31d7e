"""In which order the tests run, and which stay together where `pytest -n 2` deals them out to two processes."""

from __future__ import annotations

from pathlib import Path

import pytest

# These share the session's Prefect server, its worker and its one slot for trainings.
SHARED_STACK = frozenset(
    f"test_{name}" for name in ("command_line", "lives_of_a_run", "reconcile", "same_run", "staged_training", "stalls", "stopping")
)
LONGEST_FIRST = ("e2e", "browser", "contract", "unit")  # so that no process is left with a long one at the end


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> tuple[int, bool]:
        room = item.path.parent.name
        return LONGEST_FIRST.index(room) if room in LONGEST_FIRST else len(LONGEST_FIRST), item.path.stem not in SHARED_STACK

    items.sort(key=rank)
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item.path)))


def group_of(path: Path) -> str:
    """A file's tests stay together, since many share what a fixture of the file made."""
    return "shared stack" if path.parent.name == "e2e" and path.stem in SHARED_STACK else f"{path.parent.name}/{path.stem}"
