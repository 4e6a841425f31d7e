"""In which order the tests run, and which stay together where `pytest -n 2` deals them out to two processes."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest

# These share the session's Prefect server, its worker and its one slot for trainings.
SHARED_STACK = frozenset(
    f"test_{name}"
    for name in ("command_line", "lives_of_a_run", "reconcile", "remote_runs", "same_run", "staged_training", "stalls", "stopping")
)
TRAINER_IMAGE = frozenset(("test_trainer_image", "test_trainer_container"))  # on a new machine its build and push take minutes
KUBERNETES = ("test_cluster", "test_kubernetes")  # they take the one node away and bring it back
ROW_OF_KUBERNETES = "[kubernetes]"  # of the contract suite: on the same node
LONGEST_FIRST = ("e2e", "browser", "contract", "unit")  # so that no process is left with a long one at the end


def group_of(test: str) -> str:
    """A file's tests stay together, since many share what a fixture of the file made. `test` is pytest's id of it."""
    file, _, name = test.partition("::")
    path = PurePath(file)
    room = path.parent.name
    if room == "e2e" and path.stem in SHARED_STACK:
        return "shared stack"
    if (room == "e2e" and path.stem.startswith(KUBERNETES)) or name.endswith(ROW_OF_KUBERNETES):
        return "kubernetes"
    return "trainer image" if room == "e2e" and path.stem in TRAINER_IMAGE else f"{room}/{path.stem}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> tuple[int, bool]:
        room = item.path.parent.name
        return LONGEST_FIRST.index(room) if room in LONGEST_FIRST else len(LONGEST_FIRST), group_of(item.nodeid) != "shared stack"

    items.sort(key=rank)


# Not `--dist loadgroup`: pytest-xdist 3.8 marks the groups in a private name that pytest 9.2 no longer reads.
@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class InGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return InGroups(config, log)
