"""Runs on the tests' cluster as a user has them: saved profiles, the shipped service accounts, and a bucket behind a counting proxy."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blocks.naming import job_name
from tests.cluster.cluster import Cluster
from tests.faults import FaultProxy, running_proxy
from tests.kubernetes_jobs import shipped
from tests.stack import REPOSITORY, Stack
from tests.stores import CLOUD_PREFIXES, RunsBucket, StoreServer, s3_client
from trainer.contract import AttemptLayout, Progress, ResultManifest

# By these the store's log tells who asked: moto takes any key.
FLOW_KEY, POD_KEY = "AKIDOFTHEFLOW", "AKIDOFTHEPODS"
DATASET_OBJECTS = re.compile(r"/data/(packs|files)/")
# As a person does in the Prefect UI under Blocks.
SAVE = """
import json, sys
from prefect_aws import AwsCredentials
from blocks.profiles import KubernetesProfile
given = json.load(sys.stdin)
for kind in (AwsCredentials, KubernetesProfile):
    kind.register_type_and_schema()
AwsCredentials(**given["credentials"]).save("kubernetes-store", overwrite=True)
for name, fields in given["profiles"].items():
    KubernetesProfile.model_validate(fields).save(name, overwrite=True)
"""


@dataclass
class KubernetesRuns(RunsBucket):
    """The stack's server, a namespace with the shipped accounts, and the bucket, which flow and pods reach by ``store``."""

    stack: Stack
    cluster: Cluster
    namespace: str
    store: FaultProxy
    fields: dict[str, Any]

    def save_profiles(self, **profiles: dict[str, Any]) -> None:
        """Each with what every one needs here beside its own fields."""
        credentials = {"aws_access_key_id": FLOW_KEY, "aws_secret_access_key": "of-the-flow", "region_name": "us-east-1"}
        given = {"credentials": credentials, "profiles": {name: {**self.fields, **fields} for name, fields in profiles.items()}}
        command = [sys.executable, "-c", SAVE]
        text = json.dumps(given)
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self.stack.environment, input=text, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr

    def train(self, *arguments: str) -> dict[str, Any]:
        done = self.stack.command("trainyard", "train", *arguments, "--new", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def pods(self, run_id: str) -> list[dict[str, Any]]:
        """Oldest first; those of a Job stay as long as it, but for those that somebody deleted."""
        found = self.cluster.get("pods", "", self.namespace, "--selector", f"trainyard.io/run-id={run_id}")["items"]
        return sorted(found, key=lambda pod: pod["metadata"]["creationTimestamp"])

    def jobs(self, run_id: str) -> list[str]:
        found = self.cluster.get("jobs", "", self.namespace, "--selector", f"trainyard.io/run-id={run_id}")["items"]
        return sorted(job["metadata"]["name"] for job in found)

    def attempt(self, run_id: str, number: int, name: str) -> Any:
        """An object of the attempt; None where it is not there."""
        key = f"runs/{run_id}/attempts/{number}/{name}"
        return self.json(key) if key in self.objects(key) else None

    def epochs(self, run_id: str, number: int = 1) -> list[int]:
        """Those that the attempt's record has, in its order."""
        key = f"runs/{run_id}/attempts/{number}/{AttemptLayout.PROGRESS_LINES}"
        lines = self.read(key).splitlines() if key in self.objects(key) else []
        return [Progress.model_validate_json(line).epoch for line in lines]

    def log(self, run_id: str, number: int = 1) -> str:
        """Of all pods of the attempt, one after another, as its record has it."""
        return self.read(f"runs/{run_id}/attempts/{number}/{AttemptLayout.LOG}").decode()

    def verified(self, run_id: str, number: int = 1) -> ResultManifest:
        """The attempt's result, every file of it compared with what the manifest says."""
        manifest = ResultManifest.model_validate(self.attempt(run_id, number, AttemptLayout.MANIFEST))
        assert (manifest.run_id, manifest.attempt) == (run_id, number)
        for name, file in manifest.files.items():
            content = self.read(f"runs/{run_id}/attempts/{number}/{name}")
            assert (hashlib.sha256(content).hexdigest(), len(content)) == (file.sha256, file.bytes), name
        return manifest

    def dataset_bytes(self) -> int:
        """What the store has sent to pods, so far, of the objects that hold datasets."""
        fetched = (answer for answer in self.store.answers if POD_KEY in answer.request.authorization and answer.request.method == "GET")
        return sum(answer.bytes_down for answer in fetched if DATASET_OBJECTS.search(answer.request.path))


def job_names(run_id: str, attempts: int = 1) -> list[str]:
    return [job_name(run_id, number) for number in range(1, attempts + 1)]


@contextmanager
def kubernetes_runs(stack: Stack, cluster: Cluster, s3: StoreServer, folder: Path) -> Iterator[KubernetesRuns]:
    """The flow is the shipped service account `trainyard`, the pods are `trainyard-job` and get their keys from a Secret.

    The command has a home of its own; of no cloud anything is in its environment.
    """
    environment = {name: value for name, value in stack.environment.items() if not name.startswith((*CLOUD_PREFIXES, "KUBECONFIG"))}
    own = replace(stack, environment={**environment, "TRAINYARD_HOME": str(folder / "home")}, folder=folder, workers=[])
    with cluster.namespace("runs") as namespace, running_proxy(s3.address) as proxy:
        keys = {"AWS_ACCESS_KEY_ID": POD_KEY, "AWS_SECRET_ACCESS_KEY": "of-the-pods"}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store-keys"}, "stringData": keys}
        cluster.apply(*shipped("rbac.yaml", namespace), secret, namespace=namespace)
        bucket = s3.make_bucket()
        fields: dict[str, Any] = {
            "namespace": namespace,
            "kubeconfig": cluster.kubeconfig(namespace, "trainyard").read_text(),
            "service_account": "trainyard-job",
            "env_secret": "store-keys",
            "env": {"AWS_REGION": "us-east-1"},
            "host_network": True,  # the store is on loopback
            "store": f"{bucket}/data",
            "output": f"{bucket}/runs",
            "store_endpoint": proxy.address,
            "store_credentials": "aws-credentials/kubernetes-store",
        }
        yield KubernetesRuns(bucket, s3_client(s3.address), own, cluster, namespace, proxy, fields)
