"""The whole product inside a cluster: the Prefect worker as a pod, its flow runs and their trainings as Jobs, by in-cluster identity.

What the API server takes is tested always; with `-m full` the worker really runs there, in the shipped images.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

import pytest
import yaml

from flows.reconcile import SETTLE
from tests.cluster.cluster import Cluster, pod
from tests.image_layers import MIB, pushed_layers
from tests.kubernetes_jobs import SHIPPED, granted, shipped
from tests.newcomer import NAMESPACE, Clone, fill_in_profile, make_clone, named_namespace, shell_blocks
from tests.stack import Stack, free_port, running_stack, wait_for
from tests.stores import StoreServer
from tests.trainer_image import TrainerImage
from trainer.shapes import write_shapes

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]
POOL = "trainyard-kubernetes"
DEPLOYMENT = "train/kubernetes"
# The server asks for none; what the pods would say to one that does must not be read in any manifest.
PASSWORD = "flows:made-up-91c4"
# Which Prefect wants in a pod's spec, and the API server does not know there.
PREFECTS_OWN = {"spec.template.spec.parallelism", "spec.template.spec.completions"}


def shipped_pool(namespace: str, **defaults: Any) -> dict[str, Any]:
    template = json.loads((SHIPPED / "work-pool.json").read_text())
    for name, value in {"namespace": namespace, **defaults}.items():
        template["variables"]["properties"][name]["default"] = value
    return template


def job_of_a_flow_run(pool: dict[str, Any]) -> dict[str, Any]:
    """As the worker makes it of the work pool's template."""
    from prefect.client.schemas.objects import FlowRun
    from prefect.utilities.templating import apply_values
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    fields = pool["variables"]["properties"].items()
    defaults = {name: field["default"] for name, field in fields if "default" in field}
    made = KubernetesWorkerJobConfiguration(**apply_values(pool["job_configuration"], defaults))
    made.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="train-bccd"))
    return made.job_manifest


def test_the_server_takes_the_worker_and_the_job_of_a_flow_run(cluster: Cluster, namespace: str) -> None:
    """In a namespace where only the strictest pods are let in."""
    cluster.kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    cluster.apply(*shipped("rbac.yaml", namespace), *shipped("worker.yaml", namespace), namespace=namespace)
    wait_for("the worker's pod to be let in", lambda: cluster.get("pods", "", namespace)["items"], 30)
    job, login = job_of_a_flow_run(shipped_pool(namespace)), cluster.kubeconfig(namespace, "trainyard-worker")
    taken = cluster.kubectl("create", "--dry-run=server", "--validate=warn", "-f", "-", stdin=json.dumps(job), login=login)
    assert set(re.findall(r'unknown field "(.+?)"', taken.stderr)) == PREFECTS_OWN
    spec = {name: value for name, value in job["spec"]["template"]["spec"].items() if f"spec.template.spec.{name}" not in PREFECTS_OWN}
    let_in = {**pod("flow", {}), "spec": spec}
    cluster.kubectl("create", "--dry-run=server", "--namespace", namespace, "-f", "-", stdin=json.dumps(let_in))
    assert spec["containers"][0]["args"] == ["prefect", "flow-run", "execute"]
    refused = cluster.kubectl("get", "secrets", "--namespace", namespace, login=login, check=False)
    assert 'cannot list resource "secrets"' in refused.stderr


# --- With the worker as a pod ----------------------------------------------------------------------------------

# The tests' base image lacks the bundle that its package makes when it is installed, and an HTTP client wants one before it says a word.
CERTIFICATES = "/opt/flow-runner/lib/python3.11/site-packages/certifi/cacert.pem"
CONFIG = {"model": "yolo11-pico", "epochs": 2, "batch_size": 4, "image_size": 64, "workers": 0, "device": "cpu"}
PATIENCE = 600  # seconds; a start takes ten where nothing else runs
LONG = 1000  # epochs, more than anybody waits for
EPOCH = "running, epoch"


@dataclass(frozen=True)
class Inside:
    """A namespace with the worker, and a Prefect server, a store and a registry outside it, on loopback."""

    cluster: Cluster
    namespace: str
    stack: Stack
    clone: Clone
    store: str
    figures: dict[str, float]

    def command(self, words: str, run_id: str = "") -> str:
        """That of WORKER.md's second block which has these words, for this store."""
        [line] = [line for line in shell_blocks("WORKER.md")[1] if f" {words} " in line]
        shapes = write_shapes(self.stack.folder / "shapes", train=8, val=4, test=4, size=64)
        return line.replace("DATASET", str(shapes)).replace("s3://BUCKET/trainyard", self.store).replace("RUN", run_id)

    def start_run(self, **values: Any) -> str:
        deployment = self.stack.api(f"/deployments/name/{DEPLOYMENT}")
        return self.stack.api(f"/deployments/{deployment['id']}/create_flow_run", values)["id"]

    def jobs(self, selector: str) -> list[dict[str, Any]]:
        return self.cluster.get("jobs", "", self.namespace, "--selector", selector)["items"]

    def jobs_of(self, flow_run_id: str) -> list[dict[str, Any]]:
        return self.jobs(f"prefect.io/flow-run-id={flow_run_id}")

    def pod_of(self, flow_run_id: str) -> str:
        """Its newest one."""
        pods = self.cluster.get("pods", "", self.namespace, "--selector", f"prefect.io/flow-run-id={flow_run_id}")["items"]
        return max(pods, key=lambda found: found["metadata"]["creationTimestamp"])["metadata"]["name"]

    def training(self) -> list[dict[str, Any]]:
        return self.jobs("app.kubernetes.io/managed-by=trainyard")

    def started(self, flow_run_id: str) -> dict[str, Any]:
        """The flow run's Job, once Prefect was told of its pod."""

        def told() -> bool:
            return self.stack.flow_run(flow_run_id)["state_name"] in ("InfrastructurePending", "Running")

        wait_for("the flow run's pod", told, PATIENCE)
        return self.jobs_of(flow_run_id)[-1]

    def log(self, flow_run_id: str) -> str:
        lines = self.stack.api("/logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run_id]}}, "sort": "TIMESTAMP_ASC"})
        return "\n".join(line["message"] for line in lines)

    def manifests(self) -> str:
        """All that somebody may read who may read no Secret."""
        return json.dumps([self.cluster.get(kind, "", self.namespace) for kind in ("jobs", "pods", "deployments", "configmaps", "events")])


def on_this_machine(worker: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The test's servers are reached on the host's network; the port there may be taken."""
    template = next(document for document in worker if document["kind"] == "Deployment")["spec"]["template"]["spec"]
    container, port = template["containers"][0], free_port()
    template["hostNetwork"] = True
    container["ports"][0]["containerPort"] = port
    container["env"].append({"name": "PREFECT_WORKER_WEBSERVER_PORT", "value": str(port)})
    return worker


def fill_in(clone: Clone) -> None:
    """The manifests, for servers that are reached on the host's network."""
    worker = clone.manifests / "worker.yaml"
    worker.write_text(yaml.safe_dump_all(on_this_machine(list(yaml.safe_load_all(worker.read_text())))))
    template = shipped_pool(NAMESPACE, host_network=True, env={"SSL_CERT_FILE": CERTIFICATES})
    (clone.manifests / "work-pool.json").write_text(json.dumps(template))


def set_up(clone: Clone) -> str:
    """By the commands of WORKER.md. Returns the flow runner's image."""
    address = '--from-literal=PREFECT_API_URL="$PREFECT_API_URL"'
    commands = "\n".join(shell_blocks("WORKER.md")[0])
    assert commands.count(address) == 1
    commands = commands.replace(address, f"{address} --from-literal=PREFECT_API_AUTH_STRING={PASSWORD}")
    # Not what the page says: no pods of `reconcile` beside what is tested.
    said = clone.shell(f"{commands}\nuv run prefect deployment schedule pause --all\necho $IMAGE", timeout=1800)
    return said.splitlines()[-1]


@pytest.fixture(scope="module")
def inside(cluster: Cluster, trainer_image: TrainerImage, s3: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    folder, engine, figures = tmp_path_factory.mktemp("inside"), trainer_image.engine, dict[str, float]()
    began = time.monotonic()
    cluster.pull(trainer_image.reference)
    figures["trainer, s to pull"] = time.monotonic() - began
    # Its own server: the others' deployments stay with the work pool that they have.
    patience = {"PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS": "10"}  # in place of 300
    with running_stack(folder, **patience) as stack, named_namespace(cluster) as namespace:
        clone = make_clone(folder / "clone", stack, cluster, s3, engine)
        clone.environment.update(s3.settings(), IMAGE=f"{engine.registry.host}/trainyard-test/flow-runner")
        store = fill_in_profile(clone, s3, trainer_image)
        fill_in(clone)
        runner = set_up(clone)
        for name, image in (("flow runner", runner), ("trainer", trainer_image.reference)):
            repository, _, digest = image.partition("/")[2].partition("@")
            figures[f"{name}, MiB compressed"] = sum(layer.size for layer in pushed_layers(engine.registry, repository, digest)) / MIB
        reached = replace(stack, environment={**stack.environment, **s3.settings()})
        made = Inside(cluster, namespace, reached, clone, store, figures)
        clone.shell(made.command("dataset stage"))

        def polls() -> bool:
            return any(worker["status"] == "ONLINE" for worker in stack.api(f"/work_pools/{POOL}/workers/filter", {}))

        try:
            wait_for("the worker to poll", polls, PATIENCE)
            yield made
        finally:
            log = cluster.kubectl("logs", "deployment/trainyard-worker", "--namespace", namespace, check=False)
            (folder / "worker-pod.log").write_text(log.stdout + log.stderr)


@pytest.mark.full
def test_from_a_dataset_in_the_bucket_to_a_collected_model(inside: Inside, s3: StoreServer, trainer_image: TrainerImage) -> None:
    began = time.monotonic()
    inside.clone.shell(inside.command("deployment run"), timeout=900)
    inside.figures["s from `prefect deployment run` to a collected model"] = time.monotonic() - began

    [training] = inside.training()
    assert training["spec"]["template"]["spec"]["containers"][0]["image"] == trainer_image.reference
    inside.clone.shell(inside.command("collect", training["metadata"]["labels"]["trainyard.io/run-id"]))
    assert (inside.clone.folder / "model/model/model.pt").stat().st_size > 10_000
    assert "map50" in json.loads((inside.clone.folder / "model/metrics.json").read_text())

    flow_run_id = training["metadata"]["annotations"]["trainyard.io/flow-run-id"]
    [flow] = inside.jobs_of(flow_run_id)
    accounts = [job["spec"]["template"]["spec"]["serviceAccountName"] for job in (flow, training)]
    assert accounts == ["trainyard", "trainyard-job"]
    assert inside.cluster.rights_asked(inside.namespace, "trainyard")["allow"] >= {("batch", "jobs", "create"), ("batch", "jobs", "get")}
    assert inside.cluster.rights_asked(inside.namespace, "trainyard-job") == {"allow": set(), "forbid": set()}
    assert PASSWORD not in inside.manifests() + inside.log(flow_run_id)
    assert s3.environment["AWS_SECRET_ACCESS_KEY"] not in inside.manifests()
    print(*(f"{name}: {figure:.0f}" for name, figure in inside.figures.items()), sep="\n")


@pytest.mark.full
def test_flow_runs_that_are_evicted_and_killed_are_taken_up_again_and_one_that_is_cancelled_stops(inside: Inside) -> None:
    """Prefect itself goes on with one that was told to leave; of one that was killed it tells, and `reconcile` in the cluster goes on.
    There is one training all the while."""
    flow_run_id = inside.start_run(parameters={"dataset": f"{inside.store}#first", "config": {**CONFIG, "epochs": LONG}})
    before = len(inside.training())
    wait_for("the training's Job", lambda: len(inside.training()) > before, PATIENCE)
    [first] = inside.jobs_of(flow_run_id)
    inside.cluster.kubectl("delete", "pod", "--selector", f"job-name={first['metadata']['name']}", "--namespace", inside.namespace)
    wait_for("a second flow run's Job", lambda: len(inside.jobs_of(flow_run_id)) == 2, PATIENCE)
    wait_for("its flow", lambda: inside.stack.flow_run(flow_run_id)["state_type"] == "RUNNING", PATIENCE)
    inside.cluster.kill_pod(inside.namespace, inside.pod_of(flow_run_id))
    wait_for("Prefect to know", lambda: inside.stack.flow_run(flow_run_id)["state_type"] == "CRASHED", PATIENCE)
    seen = inside.log(flow_run_id).count(EPOCH)
    time.sleep(SETTLE.total_seconds())  # until then a crash may still be reported once more
    done = inside.stack.command("prefect", "deployment", "run", "reconcile/local", "--watch")
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for("the third one to see the training go on", lambda: inside.log(flow_run_id).count(EPOCH) > seen, PATIENCE)
    assert len(inside.jobs_of(flow_run_id)) == 3
    assert len(inside.training()) == before + 1
    inside.stack.api(f"/flow_runs/{flow_run_id}/set_state", {"state": {"type": "CANCELLING"}})
    assert inside.stack.wait_final(flow_run_id, PATIENCE)["state_type"] == "CANCELLED", inside.log(flow_run_id)
    wait_for("the training's Job to go", lambda: len(inside.training()) == before, PATIENCE)


@pytest.mark.full
def test_the_worker_needs_each_right_of_its_role_and_no_other(inside: Inside) -> None:
    """A flow run that falls at its first step, one that is cancelled before it begins, and one whose Job somebody deletes."""
    small = {"image": inside.cluster.small_image}
    waiting = {"job_variables": {**small, "command": "sleep 600"}, "parameters": {"dataset": "none"}}
    falls = inside.start_run(
        job_variables={**small, "command": "sh -c 'echo it has no such module; exit 1'"}, parameters={"dataset": "none"}
    )
    cancelled, deleted = inside.start_run(**waiting), inside.start_run(**waiting)
    inside.started(cancelled)
    inside.stack.api(f"/flow_runs/{cancelled}/set_state", {"state": {"type": "CANCELLING"}})
    gone = inside.started(deleted)["metadata"]["name"]
    inside.cluster.kubectl("delete", "job", gone, "--namespace", inside.namespace, "--wait=false")
    ends = {name: inside.stack.wait_final(name, PATIENCE)["state_type"] for name in (falls, cancelled, deleted)}
    assert list(ends.values()) == ["CRASHED", "CANCELLED", "CRASHED"]
    wait_for("the last words of the one that fell", lambda: "it has no such module" in inside.log(falls), PATIENCE)
    wait_for("the cancelled run's Job to go", lambda: not inside.jobs_of(cancelled), PATIENCE)

    assert inside.cluster.rights_asked(inside.namespace, "trainyard-worker") == {
        "allow": granted("worker.yaml", inside.namespace),
        "forbid": set(),
    }
