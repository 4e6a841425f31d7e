"""What a person at the command line reads when a training on Kubernetes cannot start or ends: one cause, the next step, the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from blocks.credentials import AccessRef
from blocks.naming import job_name
from blocks.record import RunRecord
from tests.cluster.cluster import Cluster
from tests.docker_registry import running_registry
from tests.e2e.test_command_line import TINY
from tests.e2e.test_kubernetes_rights import shipped
from tests.kubernetes_images import push_image
from tests.kubernetes_jobs import ENTRYPOINT, SMALL_CLASS
from tests.stack import REPOSITORY, Stack
from tests.stores import CLOUD_PREFIXES, StoreServer
from trainer.contract import ExitCode

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]
SAVE = """
import json, sys
from flows import prefect_settings
prefect_settings.apply_defaults()
from blocks.profiles import save_profile
for name, fields in json.load(sys.stdin).items():
    save_profile(name, "kubernetes", fields)
"""
AT_MOST_SECONDS = 45.0  # from the Job to the end of the run; a wait for a machine is part of it
USER = ("puller", "made-up-77f0")


@dataclass(frozen=True)
class Case:
    """A profile that differs from one that works by `fields`; ``train`` with it, or ``plan --server``."""

    fields: dict[str, Any]
    code: ExitCode
    told: str
    next: str
    command: tuple[str, ...] = ("train",)
    has_job: bool = True


@dataclass
class Shop:
    """Everything that a case needs, in a namespace with the shipped accounts."""

    stack: Stack
    cluster: Cluster
    bucket: str
    endpoint: str
    namespace: str
    full: str  # another namespace, whose quota is less than a pod
    image: str
    private_image: str

    def fields(self, namespace: str = "", **changes: Any) -> dict[str, Any]:
        namespace = namespace or self.namespace
        login = {} if "api_server" in changes else {"kubeconfig_path": str(self.cluster.kubeconfig(namespace, "trainyard"))}
        return {
            **login,
            "namespace": namespace,
            "service_account": "trainyard-job",
            "store": self.bucket,
            "store_endpoint": self.endpoint,
            "image": self.image,
            "env": {"SCRIPT": "sleep 600"},
            "instance_classes": SMALL_CLASS,
            "grace_seconds": 10,
            "pending_limit_seconds": 10,
            "mending_limit_seconds": 0,
            **changes,
        }

    def token_login(self, token: str) -> dict[str, Any]:
        return {"api_server": self.cluster.server, "token": token, "ca_certificate": str(self.cluster.certificate)}

    def save(self, profiles: dict[str, dict[str, Any]]) -> None:
        done = subprocess.run(
            [sys.executable, "-c", SAVE],
            cwd=REPOSITORY,
            env=self.stack.environment,
            input=json.dumps(profiles),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def record(self, run_id: str) -> RunRecord:
        return RunRecord(f"{self.bucket}/runs", run_id, AccessRef(self.endpoint))


@pytest.fixture(scope="module")
def shop(stack: Stack, cluster: Cluster, s3: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    folder = tmp_path_factory.mktemp("shop")
    environment = {name: value for name, value in stack.environment.items() if not name.startswith((*CLOUD_PREFIXES, "KUBECONFIG"))}
    environment |= {**s3.environment, "TRAINYARD_HOME": str(folder / "home")}
    with ExitStack() as open_ones:
        enter = open_ones.enter_context
        namespaces = [enter(cluster.namespace("causes")), enter(cluster.namespace("full"))]
        for namespace in namespaces:
            cluster.apply(*shipped("rbac.yaml", namespace), namespace=namespace)
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"}, "spec": {"hard": {"requests.cpu": "10m"}}}
        cluster.apply(quota, namespace=namespaces[1])
        claim = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": "none"}
        cluster.apply(
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "unbound"}, "spec": claim}, namespace=namespaces[0]
        )
        everyone, private = enter(running_registry(folder / "open")), enter(running_registry(folder / "private", users=dict([USER])))
        yield Shop(
            replace(stack, environment=environment, folder=folder, workers=[]),
            cluster,
            s3.make_bucket(),
            s3.address,
            namespace=namespaces[0],
            full=namespaces[1],
            image=push_image(everyone.host, "team/script", ENTRYPOINT, ["PATH=/bin"]),
            private_image=push_image(private.host, "team/script", ENTRYPOINT, ["PATH=/bin"], USER),
        )


def make_cases(shop: Shop) -> dict[str, Case]:
    unbound = {"enable_shared_cache": True, "cache_pvc": "unbound"}
    login = {"registry_user": USER[0], "registry_password": USER[1]}
    none = shop.image.partition("@")[0].replace("script", "none") + ":1"
    expired = shop.token_login(shop.cluster.expired_token(shop.namespace, "trainyard"))
    hog = {"SCRIPT": "x=x; while true; do x=$x$x; done"}
    return {
        "no-gpu": Case(
            {"instance_classes": {"gpu": {"gpus": 16}}}, ExitCode.UNAVAILABLE, "no free nvidia.com/gpu", "kubectl describe nodes"
        ),
        "no-image": Case({"image": none}, ExitCode.CONFIG, "none", "image", command=("plan",), has_job=False),
        "no-pull-secret": Case(
            {"image": shop.private_image, "image_pull_secret": "regcred", **login},
            ExitCode.CONFIG,
            "the pull secret 'regcred' is not there",
            "kubectl create secret docker-registry regcred",
        ),
        "no-claim": Case({**unbound, "cache_pvc": "missing"}, ExitCode.CONFIG, "missing", "create the claim missing"),
        "unbound-claim": Case(unbound, ExitCode.CONFIG, "unbound", "kubectl describe pvc"),
        "out-of-memory": Case({"env": hog}, ExitCode.OUT_OF_MEMORY, "OOMKilled", "smaller batch size"),
        "no-quota": Case({"namespace": shop.full}, ExitCode.DISK_FULL, "exceeded quota: small", "ask for less"),
        "expired-token": Case(expired, ExitCode.PERMISSION, "has expired", "kubectl create token", has_job=False),
        "no-server": Case(
            {"api_server": "https://127.0.0.1:9", "token": "x"},
            ExitCode.UNAVAILABLE,
            "https://127.0.0.1:9 cannot be reached",
            "is the cluster up",
            command=("plan", "--server"),
            has_job=False,
        ),
    }


NAMES = ["no-gpu", "no-image", "no-pull-secret", "no-claim", "unbound-claim", "out-of-memory", "no-quota", "expired-token", "no-server"]


@pytest.fixture(scope="module")
def told(shop: Shop, shapes: Path) -> dict[str, tuple[Case, subprocess.CompletedProcess[str]]]:
    """All of them side by side: most of their time is waiting."""
    cases = make_cases(shop)
    assert list(cases) == NAMES
    shop.save({name: shop.fields(**case.fields) for name, case in cases.items()})

    def run(name: str) -> tuple[Case, subprocess.CompletedProcess[str]]:
        verb, *options = cases[name].command
        return cases[name], shop.stack.command("trainyard", verb, str(shapes), "--profile", name, *TINY, *options)

    with ThreadPoolExecutor(4) as pool:
        return dict(zip(cases, pool.map(run, cases), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_one_cause_and_the_next_step(
    name: str,
    shop: Shop,
    told: dict[str, tuple[Case, subprocess.CompletedProcess[str]]],
    s3: StoreServer,
    no_cloud: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case, done = told[name]
    assert done.returncode == case.code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    told_lines = done.stderr.splitlines()
    [cause] = [line for line in told_lines if line.startswith("error: ")]
    [step] = [line for line in told_lines if line.startswith("next:  ")]
    assert case.told in cause
    assert case.next in step
    for variable, value in s3.environment.items():
        monkeypatch.setenv(variable, value)
    runs = {word for line in told_lines for word in [line.partition("record at ")[2]] if word}
    assert len(runs) == case.has_job, told_lines
    if not runs:
        return
    record = shop.record(runs.pop().rpartition("/")[2])
    ref, outcome = record.ref(1), record.outcome(1)
    assert ref is not None
    assert outcome is not None
    assert (outcome.closed_at - ref.submitted_at).total_seconds() < AT_MOST_SECONDS
    assert record.attempts() == [1]
    status = shop.stack.command("trainyard", "status", record.run_id)
    assert (case.told in status.stdout, case.next in status.stdout) == (True, True), status.stdout
    # What was stopped by its limit is gone; what ended by itself stays for who wants to look.
    left = shop.cluster.get("jobs", "", ref.scope)["items"]
    by_itself = case.code is ExitCode.OUT_OF_MEMORY
    assert (job_name(record.run_id, 1) in {job["metadata"]["name"] for job in left}) is by_itself


def test_the_server_is_shown_a_plan_and_creates_nothing(shop: Shop, shapes: Path) -> None:
    registry = shop.image.partition("/")[0]
    unchecked = {"api_server": shop.cluster.server, "token": shop.cluster.token(shop.namespace, "trainyard"), "verify_ssl": False}
    shop.save(
        {
            "good": shop.fields(),
            "draft": shop.fields(image="", registry=registry, repository="team/not-built", **unchecked),
            "bad": shop.fields(pod_patch={"noSuchField": 1}),
        }
    )

    def plan(profile: str, *options: str) -> subprocess.CompletedProcess[str]:
        return shop.stack.command("trainyard", "plan", str(shapes), "--profile", profile, *TINY, "--server", *options)

    good = plan("good", "--json")
    assert good.returncode == 0, good.stderr
    answer = json.loads(good.stdout)
    assert (answer["provider"], answer["server"]["valid"], answer["server"]["message"]) == ("kubernetes", True, "ready")
    draft = plan("draft")
    assert draft.returncode == 0, draft.stderr
    assert "server    takes it (dry run: nothing was created); the image is not built yet" in draft.stdout
    assert f"warning   {shop.cluster.server}: the server's certificate is not checked" in draft.stdout
    bad = plan("bad", "--json")
    assert bad.returncode == ExitCode.CONFIG
    refused = json.loads(bad.stdout)["server"]
    assert not refused["valid"]
    assert "noSuchField" in refused["details"]["server"]
    assert "error: " in bad.stderr
    checked = shop.stack.command("trainyard", "check", "bad", "--json")
    assert checked.returncode == ExitCode.CONFIG
    assert set(json.loads(checked.stdout)) == {"valid", "message", "details"}
    assert not [job for job in shop.cluster.get("jobs", "", shop.namespace)["items"] if "draft" in job["metadata"]["name"]]
