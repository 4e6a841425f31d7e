"""The tests' own Kubernetes cluster: what other tests rely on."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.cluster import cgroups, images, node, programs
from tests.cluster.cluster import GPU, Cluster, pod
from tests.cluster.fake_node import fake_node
from tests.cluster.place import NODE, cluster_folder
from tests.cluster.rig import start_or_find, stop_cluster
from tests.docker_engine import mounts_below
from tests.stack import REPOSITORY, wait_for

pytestmark = pytest.mark.cluster
STRICT = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def shell(cluster: Cluster, script: str, **container: Any) -> dict[str, Any]:
    return {"name": "main", "image": cluster.small_image, "command": ["sh", "-c", script], "securityContext": STRICT, **container}


def phase(cluster: Cluster, name: str, namespace: str) -> str:
    return cluster.get("pod", name, namespace)["status"]["phase"]


def condition(cluster: Cluster, kind: str, name: str, namespace: str, wanted: str) -> dict[str, Any]:
    found = cluster.get(kind, name, namespace)["status"].get("conditions", [])
    return next((entry for entry in found if entry["type"] == wanted), {})


def test_a_strict_job_runs_to_its_end_writes_its_claim_and_its_log_is_read(cluster: Cluster, namespace: str) -> None:
    folder = cluster.make_volume(namespace, "shared")
    container = shell(cluster, "id -u; echo kept > /shared/file", volumeMounts=[{"name": "shared", "mountPath": "/shared"}])
    volumes = [{"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}]
    template = {"spec": {"restartPolicy": "Never", "containers": [container], "volumes": volumes}}
    spec = {"backoffLimit": 0, "template": template}
    cluster.apply({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "tiny"}, "spec": spec}, namespace=namespace)
    wait_for("the Job to be complete", lambda: condition(cluster, "job", "tiny", namespace, "Complete"), 60)
    assert cluster.kubectl("logs", "job/tiny", "--namespace", namespace).stdout == "1000\n"
    assert (folder / "file").read_text() == "kept\n"


def test_memory_above_the_limit_is_ended_as_out_of_memory(cluster: Cluster, namespace: str) -> None:
    hungry = shell(cluster, "head -c 200m /dev/zero | tail -c 200m", resources={"limits": {"memory": "32Mi"}})
    cluster.apply(pod("hungry", hungry), namespace=namespace)
    wait_for("the pod to fail", lambda: phase(cluster, "hungry", namespace) == "Failed", 60)
    ended = cluster.get("pod", "hungry", namespace)["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"]) == ("OOMKilled", 137)


def test_gpus_are_counted_and_the_scheduler_says_when_there_are_too_few(cluster: Cluster, namespace: str) -> None:
    cluster.set_gpus(2)
    for name, count in (("fits", "2"), ("waits", "3")):
        container = shell(cluster, "true", resources={"limits": {GPU: count}})
        cluster.apply(pod(name, container), namespace=namespace)
    wait_for("the pod that fits", lambda: phase(cluster, "fits", namespace) == "Succeeded", 60)
    told = wait_for("the scheduler", lambda: condition(cluster, "pod", "waits", namespace, "PodScheduled").get("message"), 30)
    assert "1 Insufficient nvidia.com/gpu" in told
    with fake_node(cluster, f"big-{namespace}", labels={"pool": "big"}, gpus=8):
        wait_for("the fake node to take it", lambda: cluster.get("pod", "waits", namespace)["spec"].get("nodeName"), 30)
        assert phase(cluster, "waits", namespace) == "Pending"


def test_a_service_account_may_do_what_its_role_says_and_nothing_else(cluster: Cluster, namespace: str) -> None:
    cluster.kubectl("create", "role", "reader", "--verb=list", "--resource=pods", "--namespace", namespace)
    grant = ["--role=reader", f"--serviceaccount={namespace}:default", "--namespace", namespace]
    cluster.kubectl("create", "rolebinding", "reader", *grant)
    login = cluster.kubeconfig(namespace, "default")
    assert "No resources found" in cluster.kubectl("get", "pods", login=login).stderr
    refused = cluster.kubectl("create", "job", "x", "--image=x", login=login, check=False)
    assert f'cannot create resource "jobs" in API group "batch" in the namespace "{namespace}"' in refused.stderr
    expired = cluster.kubeconfig(namespace, "default", token=cluster.expired_token(namespace, "default"))
    refused = cluster.kubectl("get", "pods", login=expired, check=False)
    assert "Unauthorized" in refused.stderr or "must be logged in" in refused.stderr


def test_a_pod_on_the_hosts_network_reaches_the_api_server_as_its_service_account(cluster: Cluster, namespace: str) -> None:
    token_file = "/var/run/secrets/kubernetes.io/serviceaccount/token"
    script = f"nc -w 5 $KUBERNETES_SERVICE_HOST $KUBERNETES_SERVICE_PORT < /dev/null && cat {token_file}"
    cluster.apply(pod("asks", shell(cluster, script), hostNetwork=True), namespace=namespace)
    wait_for("the pod's end", lambda: phase(cluster, "asks", namespace) == "Succeeded", 60)
    token = cluster.kubectl("logs", "asks", "--namespace", namespace).stdout
    login = cluster.kubeconfig(namespace, "default", token=token)
    identity = cluster.kubectl("auth", "whoami", "--output", "jsonpath={.status.userInfo.username}", login=login).stdout
    assert identity == f"system:serviceaccount:{namespace}:default"


def test_a_node_that_is_lost_and_comes_back(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("lives", {"name": "main", "image": cluster.small_image}), namespace=namespace)
    wait_for("the pod to run", lambda: phase(cluster, "lives", namespace) == "Running", 60)
    cluster.stop_kubelet()
    try:
        assert cluster.kill_pod(namespace, "lives") >= 2  # the container's and the pause container's
        wait_for("its processes to end", lambda: not cluster.pod_processes(namespace, "lives"), 10)
        wait_for("the node to be missed", lambda: not cluster.ready(), 40)
        cluster.delete_node()
    finally:
        cluster.start_kubelet(gpus=1)
    wait_for("the pod to be forgotten", lambda: not cluster.exists("pod", "lives", namespace), 90)
    assert cluster.get("node", NODE)["status"]["allocatable"][GPU] == "1"


def test_an_api_server_that_was_away_answers_again(cluster: Cluster) -> None:
    cluster.stop_api_server()
    try:
        assert "refused" in cluster.kubectl("get", "nodes", check=False).stderr
    finally:
        cluster.start_api_server()
    cluster.wait_until_ready()


@pytest.fixture
def folder_beside() -> Iterator[Path]:
    """Not `tmp_path`, too long for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="cluster-") as folder:
        yield Path(folder)


def test_nothing_of_a_stopped_cluster_is_left(cluster: Cluster, folder_beside: Path) -> None:
    """Of one beside the shared one: no process, no mount, no control group, no link."""
    beside = start_or_find(folder_beside)
    place = beside.place
    try:
        memory = [{"name": "memory", "emptyDir": {"medium": "Memory"}}]
        container = shell(beside, "trap '' TERM; sleep 1000", volumeMounts=[{"name": "memory", "mountPath": "/memory"}])
        beside.apply(pod("stays", container, volumes=memory))
        wait_for("the pod to run", lambda: phase(beside, "stays", "default") == "Running", 60)
        assert mounts_below(place.run)
        assert node.shims(place)
    finally:
        stop_cluster(folder_beside)
    commands = [" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if str(folder_beside) in command]
    assert not mounts_below(folder_beside)
    assert not [hierarchy for hierarchy in cgroups.hierarchies() if (hierarchy / place.cgroup).exists()]
    assert not place.run.exists()
    assert cluster.ready()  # the other one was left alone


def test_by_hand_the_cluster_says_what_to_set(cluster: Cluster) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.cluster", "env"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    script = f'{done.stdout}\nkubectl get --raw /version && echo "$KUBECONFIG"'
    told = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True).stdout
    assert json.loads(told[: told.rindex("}") + 1])["gitVersion"] == programs.VERSION
    assert told.strip().endswith(str(cluster_folder() / "run/admin.kubeconfig"))


def test_what_is_not_here_is_told_with_the_command_that_gets_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    monkeypatch.delenv("TRAINYARD_REQUIRE_COMPONENTS", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=r"not here: etcd .*python -m tests\.cluster build.*Go 1"):
        programs.require_programs()
    (tmp_path / "etcd").touch()
    monkeypatch.setenv("KUBEBUILDER_ASSETS", str(tmp_path))
    assert programs.kubernetes_program("etcd") == str(tmp_path / "etcd")


def test_of_each_repository_the_last_images_are_kept_whatever_its_registrys_port() -> None:
    names = [f"127.0.0.1:{port}/team/trainer@sha256:{port}" for port in range(1, 6)] + ["trainyard.test/busybox:1"]
    assert sorted(images.surplus(names)) == names[:2]
