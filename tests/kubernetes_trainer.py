"""Real small trainings on the tests' cluster, by this environment's trainer; what the flow's side asks the API server passes a proxy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.cluster.cluster import Cluster
from tests.faults import FaultProxy, running_proxy
from tests.kubernetes_images import import_host_image
from tests.kubernetes_jobs import host_settings, shipped
from tests.stores import StoreServer

LOGIN_SECONDS = 4 * 3600  # the longest matrix takes less


@dataclass(frozen=True)
class TrainerPlace:
    """A namespace with the shipped accounts: the provider of `settings` is the one, its pods are the other."""

    s3: StoreServer
    proxy: FaultProxy
    settings: dict[str, Any]
    image: str


def kubeconfig_through(proxy: FaultProxy, cluster: Cluster, namespace: str) -> str:
    """The text of the shipped account's, which knows the API server by the proxy's address."""
    login = cluster.kubeconfig(namespace, "trainyard", token=cluster.token(namespace, "trainyard", seconds=LOGIN_SECONDS))
    document = json.loads(login.read_text())
    document["clusters"][0]["cluster"] = {"server": proxy.address}
    return json.dumps(document)


@pytest.fixture(scope="session")
def trainer_place(cluster: Cluster, s3: StoreServer) -> Iterator[TrainerPlace]:
    image = import_host_image(cluster)
    with cluster.namespace("trainer") as namespace, running_proxy(cluster.server, cluster.certificate) as proxy:
        cluster.apply(*shipped("rbac.yaml", namespace), namespace=namespace)
        given = host_settings(cluster, namespace, s3)
        login = {"kubeconfig_path": "", "kubeconfig": kubeconfig_through(proxy, cluster, namespace), "service_account": "trainyard-job"}
        yield TrainerPlace(s3, proxy, {**given, **login}, image)
