"""The newcomer's path of deployments/kubernetes/README.md: its six lines, run as they stand there, with the real trainer image."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.newcomer import fill_in_profile, make_clone, named_namespace, shell_blocks
from tests.stack import Stack
from tests.stores import StoreServer
from tests.trainer_image import TrainerImage

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]


def test_from_a_kubeconfig_to_a_model(
    cluster: Cluster, stack: Stack, s3: StoreServer, trainer_image: TrainerImage, shapes: Path, tmp_path: Path
) -> None:
    commands = shell_blocks("README.md")[0]
    assert 1 < len(commands) <= 6
    clone = make_clone(tmp_path / "clone", stack, cluster, s3, trainer_image.engine)
    clone.environment["TRAINYARD_HOME"] = str(tmp_path / "home")
    fill_in_profile(clone, s3, trainer_image)
    cluster.pull(trainer_image.reference)
    run_id = ""
    with named_namespace(cluster) as namespace:
        for line in commands:
            said = clone.shell(line.replace("DATASET", str(shapes)).replace("RUN", run_id or "RUN"))
            if " train " in line:
                found = re.search(r"trainyard collect (\w+)", said)
                assert found, said
                run_id = found[1]
        [pod] = cluster.get("pods", "", namespace)["items"]
        assert pod["spec"]["containers"][0]["image"] == trainer_image.reference
    assert (clone.folder / "model/model/model.pt").stat().st_size > 1_000_000
    assert "map50" in json.loads((clone.folder / "model/metrics.json").read_text())
