from pathlib import Path

import pytest

from tests.cluster.rig import cluster
from tests.contract.staged import write_source
from tests.stores import az, no_cloud, s3, server, store_uri

__all__ = ["az", "cluster", "no_cloud", "s3", "server", "store_uri"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")
