from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.rig import cluster
from tests.contract.staged import write_source
from tests.faults import FaultProxy, running_proxy
from tests.kubernetes_trainer import trainer_place
from tests.stores import StoreServer, az, no_cloud, s3, server, store_uri

__all__ = ["az", "cluster", "no_cloud", "s3", "server", "store_uri", "trainer_place"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.fixture
def proxy(server: StoreServer) -> Iterator[FaultProxy]:
    """Before the store: it slows, cuts and loses."""
    with running_proxy(server.address) as made:
        yield made
