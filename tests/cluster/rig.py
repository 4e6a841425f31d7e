"""Start, share and stop the cluster: several test runs use one, and the last one stops it, unless `up` started it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from tests.cluster import api_address, control_plane, node
from tests.cluster.cluster import Cluster
from tests.cluster.place import Place, cluster_folder, found_place, new_place
from tests.cluster.programs import require_programs
from tests.components import skip_or_fail
from tests.shared_rig import shared


def require_cluster() -> Path:
    """The rig's folder; skips, or fails in CI, where no cluster can run."""
    if sys.platform != "linux" or os.geteuid() != 0:
        skip_or_fail("a Kubernetes cluster of its own needs Linux and root")
    require_programs()
    return cluster_folder()


def alive(place: Place) -> bool:
    programs = (*control_plane.PROGRAMS, "containerd", "kubelet")
    return all(place.pid(program) for program in programs) and Cluster(place).ready()


def stop_cluster(folder: Path) -> None:
    if (place := found_place(folder)) is None:
        return
    node.stop_node(place)
    control_plane.stop_control_plane(place)
    node.remove_run(place)


def start_or_find(folder: Path) -> Cluster:
    """What an earlier run left serves on; what no longer answers is ended and started again."""
    place = found_place(folder)
    if place is not None and alive(place):
        return Cluster(place)
    stop_cluster(folder)
    place = new_place(folder)
    node.remember_system(place)
    node.start_containerd(place)
    control_plane.start_control_plane(place)
    node.start_kubelet(place)
    cluster = Cluster(place)
    cluster.apply(*api_address.policy(place.ports["api-server"]))
    cluster.wait_until_ready()
    cluster.wait_for_service_account("default")
    return cluster


def running_cluster() -> AbstractContextManager[Cluster]:
    return shared(require_cluster(), start_or_find, stop_cluster)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as made:
        yield made


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    with cluster.namespace() as name:
        yield name
