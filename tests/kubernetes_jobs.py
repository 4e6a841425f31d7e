"""Jobs of the Kubernetes provider on the tests' cluster whose container runs a few lines of shell instead of a trainer."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml

from blocks.job import JobRef, JobSpec, JobState, JobStatus
from blocks.providers.kubernetes_job import KubernetesProvider
from blocks.providers.kubernetes_settings import KubernetesSettings
from blocks.record import Receipt
from tests.cluster.cluster import Cluster
from tests.kubernetes_images import import_image
from tests.stack import REPOSITORY
from tests.stores import StoreServer, new_store
from trainer.contract import AttemptLayout, DatasetRef, TrainConfig, utc_now
from trainer.storage import ObjectFolder

SCRIPT_IMAGE = "trainyard.test/script"
# The trainer's arguments follow, as they would its image's entry point.
ENTRYPOINT = ["/bin/sh", "-c", 'eval "$SCRIPT"', "trainer"]
SMALL_CLASS = {"small": {"cpus": 0.05, "memory_gib": 0.0625, "usd_per_hour": 36.0}}
SHIPPED = REPOSITORY / "deployments" / "kubernetes"
WAIT = "trap 'echo leaving; exit 75' TERM; echo ready; while true; do sleep 0.2; done"


def import_script_image(cluster: Cluster) -> str:
    """Runs the variable SCRIPT."""
    return import_image(cluster, SCRIPT_IMAGE, ENTRYPOINT, ["PATH=/bin"])


def shipped(file: str, namespace: str) -> list[dict[str, Any]]:
    """A manifest as a person with a namespace of their own applies it. Objects of no namespace are named after it, too."""
    text = (SHIPPED / file).read_text().replace("namespace: trainyard", f"namespace: {namespace}")
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    for document in documents:
        if document["kind"].startswith("Cluster"):
            document["metadata"]["name"] = f"{namespace}-{document['metadata']['name']}"
            if "roleRef" in document:
                document["roleRef"]["name"] = f"{namespace}-{document['roleRef']['name']}"
    return documents


def granted(file: str, namespace: str) -> set[tuple[str, str, str]]:
    """Group, resource and verb of each right that a manifest's Role gives."""
    role = next(document for document in shipped(file, namespace) if document["kind"] == "Role")
    return {
        (group, resource, verb)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


# --- The trainer of this environment, without an image of gigabytes ----------------------------------------


def host_folders() -> list[str]:
    """What its interpreter needs of this machine."""
    return ["/usr", "/lib", "/lib64", "/etc/ssl", sys.base_prefix, sys.prefix, str(REPOSITORY / "trainer")]


def host_settings(cluster: Cluster, namespace: str, s3: StoreServer) -> dict[str, Any]:
    """For real small trainings. The store's keys come from a Secret, as they do anywhere without an identity."""
    keys = {name: value for name, value in s3.environment.items() if "KEY" in name}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store-keys"}, "stringData": keys}
    cluster.apply(secret, namespace=namespace)
    folders = {f"host-{number}": path for number, path in enumerate(host_folders()) if Path(path).exists()}
    mounts = [{"name": name, "mountPath": path, "readOnly": True} for name, path in folders.items()]
    volumes = [{"name": name, "hostPath": {"path": path}} for name, path in folders.items()]
    return {
        "kubeconfig_path": str(cluster.admin),
        "namespace": namespace,
        "env": {"AWS_REGION": s3.environment["AWS_REGION"]},
        "env_secret": "store-keys",
        "host_network": True,
        "grace_seconds": 20,
        "instance_classes": {"small": {"cpus": 0.1, "memory_gib": 3, "usd_per_hour": 1.0}},
        "pod_patch": {"containers": [{"name": "trainer", "volumeMounts": mounts}], "volumes": volumes},
    }


@dataclass(frozen=True)
class Jobs:
    """A namespace, a bucket, and a provider that is the administrator there, or whoever `settings` say."""

    cluster: Cluster
    namespace: str
    output_uri: str
    image: str
    login: Path | None = None

    def settings(self, script: str = WAIT, **changes: Any) -> KubernetesSettings:
        return KubernetesSettings.model_validate(
            {
                "kubeconfig_path": str(self.login or self.cluster.admin),
                "namespace": self.namespace,
                "env": {"SCRIPT": script},
                "instance_classes": SMALL_CLASS,
                "grace_seconds": 10,
                "host_network": True,  # the cluster has no other
                **changes,
            }
        )

    def provider(self, script: str = WAIT, **changes: Any) -> KubernetesProvider:
        return KubernetesProvider(self.settings(script, **changes))

    def spec(self, run_id: str | None = None, **changes: Any) -> JobSpec:
        run_id = run_id or f"run{uuid4().hex[:8]}"
        dataset = DatasetRef(
            root=self.output_uri,
            index_uri=f"{self.output_uri}/{run_id}/dataset.json",
            version="0" * 64,
            name="none",
            image_count=1,
            store_uri=self.output_uri,
        )
        values = {"name": "small", "config": TrainConfig(), "dataset": dataset, "output_uri": self.output_uri, "image": self.image}
        return JobSpec.model_validate({"run_id": run_id, "max_runtime_seconds": 600, **values, **changes})

    def pods(self, ref: JobRef) -> list[dict[str, Any]]:
        return self.cluster.get("pods", "", self.namespace, "--selector", f"batch.kubernetes.io/job-name={ref.native_id}")["items"]

    def jobs(self) -> list[str]:
        return [job["metadata"]["name"] for job in self.cluster.get("jobs", "", self.namespace)["items"]]


def watch(
    provider: KubernetesProvider, ref: JobRef, until: Callable[[JobStatus], bool], seconds: float = 90, pause: float = 0.5
) -> list[JobStatus]:
    """Every distinct observation until one fits. Fails the test after `seconds`."""
    seen: list[JobStatus] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        status = provider.poll(ref)
        if not seen or (seen[-1].state, seen[-1].native_state, seen[-1].message) != (status.state, status.native_state, status.message):
            seen.append(status)
        if until(status):
            return seen
        time.sleep(pause)
    raise AssertionError(f"still {seen[-1]} after {seconds} s")


def ended(status: JobStatus) -> bool:
    return status.state.is_terminal


def write_receipt(ref: JobRef) -> None:
    """As a run does when what it stopped is over."""
    receipt = Receipt(asked_by="tester", asked_at=utc_now(), state=JobState.CANCELLED, native_id=ref.native_id, ended_at=utc_now())
    ObjectFolder(ref.output_uri).put(AttemptLayout.RECEIPT, receipt.model_dump_json().encode())


@contextmanager
def jobs_in(cluster: Cluster, s3: StoreServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    """A namespace and a bucket of their own; the environment is set to reach the bucket."""
    name = import_script_image(cluster)
    with cluster.namespace("jobs") as namespace:
        yield Jobs(cluster, namespace, new_store(s3, monkeypatch), name)
