"""The cluster as tests use it: by kubectl, as an administrator or as a service account, and by what can happen to its node."""

from __future__ import annotations

import json
import os
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import cgroups, control_plane, images, node
from tests.cluster.place import NODE, Place, kubeconfig
from tests.cluster.programs import kubernetes_program
from tests.stack import wait_for

GPU = "nvidia.com/gpu"
Right = tuple[str, str, str]  # API group, resource, verb


@dataclass(frozen=True)
class Cluster:
    place: Place

    @property
    def server(self) -> str:
        return self.place.server

    @property
    def certificate(self) -> Path:
        """The certificate authority of the API server."""
        return self.place.certificate

    @property
    def admin(self) -> Path:
        """The administrator's kubeconfig."""
        return self.place.kubeconfig("admin")

    @property
    def environment(self) -> dict[str, str]:
        """Makes this cluster, and a kubectl of its version, those that a program finds."""
        path = f"{Path(kubernetes_program('kubectl')).parent}{os.pathsep}{os.environ['PATH']}"
        return {"KUBECONFIG": str(self.admin), "PATH": path}

    def kubectl(
        self, *argv: str, stdin: str | None = None, login: Path | None = None, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """As the administrator, or as who `login` (a kubeconfig) is."""
        command = [kubernetes_program("kubectl"), "--kubeconfig", str(login or self.admin), *argv]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
        assert not check or done.returncode == 0, f"kubectl {' '.join(argv)}: {done.stderr}"
        return done

    def get(self, kind: str, name: str = "", namespace: str = "default", *options: str) -> dict[str, Any]:
        """The object, or with no name the list of them."""
        names = [name] if name else []
        return json.loads(self.kubectl("get", kind, *names, "--namespace", namespace, "--output", "json", *options).stdout)

    def apply(self, *manifests: dict[str, Any], namespace: str = "default") -> None:
        """What names a namespace keeps it."""
        content = json.dumps({"apiVersion": "v1", "kind": "List", "items": list(manifests)})
        self.kubectl("apply", "--namespace", namespace, "--filename", "-", stdin=content)

    @contextmanager
    def namespace(self, prefix: str = "test") -> Iterator[str]:
        """A new one with its default service account; at the end it goes with all that is in it."""
        name = f"{prefix}-{uuid.uuid4().hex[:8]}"
        self.kubectl("create", "namespace", name)
        try:
            self.wait_for_service_account(name)
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")

    def wait_for_service_account(self, namespace: str) -> None:
        """The default one, without which a namespace takes no pod."""
        wait_for("the default service account", lambda: self.exists("serviceaccount", "default", namespace), 60)

    def exists(self, kind: str, name: str, namespace: str = "default") -> bool:
        return bool(self.kubectl("get", kind, name, "--namespace", namespace, "--ignore-not-found", "--output", "name").stdout)

    # --- Who asks ------------------------------------------------------------------------------------

    def token(self, namespace: str, service_account: str, *, seconds: int = 3600) -> str:
        """Its own, as a pod gets it. The API server gives none for less than ten minutes."""
        words = ["create", "token", service_account, "--namespace", namespace, "--duration", f"{seconds}s"]
        return self.kubectl(*words).stdout.strip()

    def expired_token(self, namespace: str, service_account: str) -> str:
        """A token as it is an hour after its end, signed with the API server's own key."""
        import jwt

        claims = jwt.decode(self.token(namespace, service_account), options={"verify_signature": False})
        earlier = {name: claims[name] - 7200 for name in ("exp", "iat", "nbf")}
        return jwt.encode({**claims, **earlier}, control_plane.signing_key(self.place).read_text(), algorithm="RS256")

    def kubeconfig(self, namespace: str, service_account: str, *, token: str | None = None) -> Path:
        """A file that makes its reader that service account, with `namespace` as its default."""
        file = self.place.run / f"{namespace}.{service_account}.{uuid.uuid4().hex[:8]}.kubeconfig"
        file.touch(mode=0o600)
        file.write_text(json.dumps(kubeconfig(self.place, token or self.token(namespace, service_account), namespace)))
        return file

    def rights_asked(self, namespace: str, service_account: str) -> dict[str, set[Right]]:
        """What it did since the cluster's start, as the API server wrote it down: each right under `allow` or `forbid`."""
        found: dict[str, set[Right]] = {"allow": set(), "forbid": set()}
        for line in control_plane.audit_log(self.place).read_text().splitlines():
            entry = json.loads(line)
            if entry["user"]["username"] == f"system:serviceaccount:{namespace}:{service_account}" and (thing := entry.get("objectRef")):
                resource = "/".join(filter(None, (thing["resource"], thing.get("subresource"))))
                right = (thing.get("apiGroup", ""), resource, entry["verb"])
                found[entry["annotations"]["authorization.k8s.io/decision"]].add(right)
        return found

    # --- What a pod gets -----------------------------------------------------------------------------

    @property
    def small_image(self) -> str:
        """A shell and a few commands; needs no pull. With no command it waits."""
        return images.SMALL_IMAGE

    def import_image(self, archive: bytes) -> None:
        """What `docker save` wrote, as if it had been pulled."""
        images.ctr(node.socket(self.place), "images", "import", "-", stdin=archive)

    def has_image(self, reference: str) -> bool:
        return reference in images.listed(node.socket(self.place))

    def pull(self, reference: str, *, seconds: float = 600) -> None:
        """By the kubelet. Kept from run to run: layers that are there are neither fetched nor unpacked again."""
        container = {"name": "pull", "image": reference, "command": ["true"], "imagePullPolicy": "Always"}
        with self.namespace("pull") as namespace:
            self.apply(pod("pull", container), namespace=namespace)

            def pulled() -> bool:
                status = self.get("pod", "pull", namespace)["status"]
                state = status.get("containerStatuses", [{}])[0]
                waiting = state.get("state", {}).get("waiting", {})
                assert waiting.get("reason") not in {"ErrImagePull", "InvalidImageName"}, waiting
                return bool(state.get("imageID"))

            wait_for(f"the pull of {reference}", pulled, seconds)

    def make_volume(self, namespace: str, name: str) -> Path:
        """A claim, bound to a folder of this machine that every user may write; returns the folder."""
        folder = self.place.run / "volumes" / f"{namespace}-{name}"
        folder.mkdir(parents=True)
        folder.chmod(0o777)
        size, modes = {"storage": "10Gi"}, ["ReadWriteMany"]
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": folder.name},
                "spec": {
                    "capacity": size,
                    "accessModes": modes,
                    "hostPath": {"path": str(folder), "type": "Directory"},
                    "claimRef": {"namespace": namespace, "name": name},
                    "storageClassName": "",
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": name},
                "spec": {"accessModes": modes, "resources": {"requests": size}, "storageClassName": "", "volumeName": folder.name},
            },
            namespace=namespace,
        )
        wait_for("the claim to be bound", lambda: self.get("pvc", name, namespace)["status"]["phase"] == "Bound", 30)
        return folder

    def set_gpus(self, count: int, node_name: str = NODE) -> None:
        """Scheduler and kubelet count them; no device appears in a container."""
        path = f"/status/capacity/{GPU.replace('/', '~1')}"
        patch = [{"op": "add", "path": path, "value": str(count)}]
        self.kubectl("patch", "node", node_name, "--subresource=status", "--type=json", "--patch", json.dumps(patch))

        def allocatable() -> bool:
            return self.get("node", node_name)["status"]["allocatable"].get(GPU) == str(count)

        if node_name == NODE:
            wait_for("the kubelet to count its GPUs", allocatable, 30)

    # --- What can happen to it -----------------------------------------------------------------------

    def ready(self) -> bool:
        done = self.kubectl("get", "node", NODE, "--output", "json", check=False)
        conditions = json.loads(done.stdout)["status"].get("conditions", []) if done.returncode == 0 else []
        return any(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)

    def wait_until_ready(self, seconds: float = 90) -> None:
        wait_for("the node to be Ready", self.ready, seconds)

    def stop_kubelet(self) -> None:
        """Containers live on. The node is NotReady ten seconds later; pods that tolerate nothing are told to leave after five more."""
        self.place.stop("kubelet")

    def start_kubelet(self, *, gpus: int | None = None) -> None:
        """Where it runs already, nothing happens. A Node object that was deleted is made anew, with no GPU until they are set."""
        if self.place.pid("kubelet") is None:
            node.start_kubelet(self.place)
        self.wait_until_ready()
        if gpus is not None:
            self.set_gpus(gpus)

    def delete_node(self) -> None:
        self.kubectl("delete", "node", NODE)

    def pod_processes(self, namespace: str, name: str) -> list[int]:
        return cgroups.processes(self.place.cgroup, f"pod{self.get('pod', name, namespace)['metadata']['uid']}")

    def kill_pod(self, namespace: str, name: str) -> int:
        """All its processes at once, by SIGKILL and behind the kubelet's back. Returns how many there were."""
        return cgroups.kill(self.place.cgroup, f"pod{self.get('pod', name, namespace)['metadata']['uid']}")

    def stop_api_server(self) -> None:
        self.place.stop("kube-apiserver")

    def start_api_server(self) -> None:
        if self.place.pid("kube-apiserver") is None:
            control_plane.start_api_server(self.place)
        control_plane.wait_for_api_server(self.place)


def pod(name: str, container: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """Of one container. It is given no time to leave, unless `spec` says so."""
    made = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container], **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": made}
