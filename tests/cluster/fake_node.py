"""A node that is only an object: the scheduler counts with it, and what it puts there stays Pending."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from tests.cluster.cluster import GPU, Cluster
from tests.stack import wait_for

RENEWED_EVERY_SECONDS = 3


def renew(cluster: Cluster, name: str) -> None:
    """As a kubelet does, so that the node counts as alive."""
    spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")}
    lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": spec}
    cluster.apply(lease, namespace="kube-node-lease")


def taint_keys(cluster: Cluster, name: str) -> set[str]:
    return {taint["key"] for taint in cluster.get("node", name)["spec"].get("taints", [])}


@contextmanager
def fake_node(
    cluster: Cluster, name: str, *, labels: Mapping[str, str] | None = None, taints: list[dict[str, str]] | None = None, gpus: int = 0
) -> Iterator[None]:
    """`taints` as a node's specification has them. It leaves with the context."""
    capacity: dict[str, str] = {"cpu": "64", "memory": "256Gi", "ephemeral-storage": "500Gi", "pods": "100", GPU: str(gpus)}
    metadata = {"name": name, "labels": {"kubernetes.io/hostname": name, "kubernetes.io/arch": "amd64", "kubernetes.io/os": "linux"}}
    metadata["labels"] |= labels or {}
    cluster.apply({"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": taints or []}})
    ready = {"type": "Ready", "status": "True", "reason": "Fake", "message": "an object only"}
    status: dict[str, Any] = {"status": {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}}
    cluster.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "--patch", json.dumps(status))
    ended = threading.Event()

    def renew_until_ended() -> None:
        while not ended.wait(RENEWED_EVERY_SECONDS):
            renew(cluster, name)

    renew(cluster, name)
    renewing = threading.Thread(target=renew_until_ended)
    renewing.start()
    try:
        wait_for("the fake node to be let in", lambda: "node.kubernetes.io/not-ready" not in taint_keys(cluster, name), 30)
        yield
    finally:
        ended.set()
        renewing.join()
        cluster.kubectl("delete", "node", name)
