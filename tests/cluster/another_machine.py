"""The node's machine is replaced while the old one lives on, cut off: what a cluster that lost a machine cannot know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from tests.cluster import node
from tests.cluster.cluster import Cluster
from tests.cluster.place import Place
from tests.stack import free_port


@contextmanager
def another_machine(cluster: Cluster) -> Iterator[None]:
    """The kubelet has been stopped before. A kubelet and a container runtime of their own take the node's name meanwhile.

    At the end the first ones serve again, and end what the cluster no longer knows.
    """
    first = cluster.place
    second = Place(f"{first.folder}/another", {**first.ports, "kubelet": free_port()}, first.tokens)
    second.run.mkdir(parents=True)
    shutil.copy(first.kubeconfig("kubelet"), second.kubeconfig("kubelet"))
    try:
        node.start_containerd(second)
        node.start_kubelet(second)
        cluster.wait_until_ready()
        yield
    finally:
        node.stop_node(second)
        node.remove_run(second)
        shutil.rmtree(second.folder)
        cluster.start_kubelet()


def exit_code(place: Place, container_id: str) -> int | None:
    """As the machine's runtime has it, also of a container that the cluster no longer knows; None while it runs."""
    file = place.store / "io.containerd.grpc.v1.cri/containers" / container_id / "status"
    status = json.loads(file.read_text())
    return status["ExitCode"] if status["FinishedAt"] else None


def output(place: Place, pod_uid: str) -> str:
    """What the pod's containers have said, as their machine keeps it."""
    return "".join(path.read_text() for path in sorted((place.run / "pod-logs").glob(f"*_{pod_uid}/*/*.log")))
