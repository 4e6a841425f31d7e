"""One stack for the session: a real Prefect server, a worker where a test wants one, and a small dataset."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.rig import cluster, namespace
from tests.docker_engine import docker_engine
from tests.stack import Stack, running_stack
from tests.stores import no_cloud, s3
from tests.trainer_image import trainer_image
from tests.yard import yard, yard_shapes

__all__ = ["cluster", "docker_engine", "namespace", "no_cloud", "s3", "shapes", "stack", "trainer_image", "worker", "yard", "yard_shapes"]


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running_stack(tmp_path_factory.mktemp("stack")) as made:
        yield made


@pytest.fixture(scope="session")
def shapes(stack: Stack) -> Path:
    from trainer.shapes import write_shapes

    return write_shapes(stack.folder / "data" / "shapes", train=8, val=4, test=4, size=64)


@pytest.fixture
def worker(stack: Stack) -> subprocess.Popen[bytes]:
    """The worker of the session, started again where a test killed it."""
    if not stack.workers or stack.workers[-1].poll() is not None:
        stack.start_worker()
    return stack.workers[-1]
