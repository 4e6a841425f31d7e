"""The Kubernetes provider on a real cluster: one Job per attempt, its causes in words, logs, cancel, and what becomes of it by time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from blocks.errors import ConfigError, JobNotFound, PlanChanged
from blocks.job import CheckLine, FailureReason, JobRef, JobState, Resources
from blocks.provider import Provider
from blocks.providers import kubernetes_client
from blocks.providers.kubernetes_client import NoAnswer
from blocks.providers.kubernetes_job import KubernetesProvider
from blocks.providers.kubernetes_objects import is_alive, is_over
from tests.cluster.cluster import Cluster
from tests.kubernetes_jobs import WAIT, Jobs, ended, jobs_in, watch, write_receipt
from tests.stack import wait_for
from tests.stores import StoreServer
from trainer.contract import AttemptLayout, ExitRecord, utc_now
from trainer.storage import ObjectFolder

GOLDEN = Path(__file__).parents[1] / "golden" / "kubernetes"
pytestmark = [pytest.mark.cluster, pytest.mark.e2e]


@pytest.fixture
def jobs(cluster: Cluster, s3: StoreServer, monkeypatch: pytest.MonkeyPatch, no_cloud: None) -> Iterator[Jobs]:
    with jobs_in(cluster, s3, monkeypatch) as made:
        yield made


def submit(provider: KubernetesProvider, jobs: Jobs, **changes: object) -> JobRef:
    return provider.submit(provider.plan(jobs.spec(**changes)))  # type: ignore[arg-type]


def read_log(provider: Provider, ref: JobRef, seconds: float = 60) -> list[str]:  # type: ignore[type-arg]
    lines: list[str] = []
    cursor, deadline = "", time.monotonic() + seconds
    while not (batch := provider.logs(ref, cursor)).ended:
        lines += batch.lines
        cursor = batch.cursor
        assert time.monotonic() < deadline, lines[-3:]
        if not batch.lines:
            time.sleep(0.3)
    return [*lines, *batch.lines]


def test_the_server_takes_every_golden_job(cluster: Cluster) -> None:
    provider = KubernetesProvider.from_settings({"kubeconfig_path": str(cluster.admin)})
    cases = sorted(GOLDEN.glob("*.json"))
    assert len(cases) >= 6
    for case in cases:
        body = json.loads(case.read_text())["job"]
        body["metadata"]["namespace"] = "default"
        query = {"dryRun": "All", "fieldValidation": "Strict"}
        made = provider.cluster.call("POST", "/apis/batch/v1/namespaces/default/jobs", body=body, query=query)
        assert made["spec"]["podFailurePolicy"] == body["spec"]["podFailurePolicy"], case.name
    assert "ty-goldenrun123-1" not in json.dumps(cluster.get("jobs", "", "default"))


def test_life_of_a_job(jobs: Jobs) -> None:
    keys = {"AWS_SESSION_TOKEN": "made-up-1", "AZURE_STORAGE_ACCOUNT_NAME": "made-up-2", "AZURE_STORAGE_ACCOUNT_KEY": "made-up-3"}
    jobs.cluster.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store-keys"}, "stringData": keys}, namespace=jobs.namespace
    )
    script = "echo hello $@; i=0; while [ $i -lt 3000 ]; do i=$((i+1)); echo line $i; done; sleep 2"
    provider = jobs.provider(f"{script}; echo {' '.join(f'${name}' for name in keys)}", env_secret="store-keys")
    plan = provider.plan(jobs.spec())
    provider.check_plan(plan)
    assert jobs.jobs() == []
    ref = provider.submit(plan)
    assert provider.submit(plan) == ref
    seen = watch(provider, ref, ended, pause=0.2)
    order = [JobState.QUEUED, JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED]
    states = [status.state for status in seen]
    assert states == sorted(states, key=order.index)
    assert states[-1] is JobState.SUCCEEDED
    assert seen[-1].cost_usd is not None
    assert 0 < seen[-1].cost_usd < 1
    lines = read_log(provider, ref)
    assert lines == [
        "hello --max-runtime-seconds 600 --grace-seconds 5",
        *(f"line {number + 1}" for number in range(3000)),
        " ".join(keys.values()),
    ]
    assert [(found.native_id, status.state) for found, status in provider.list_jobs()] == [(ref.native_id, JobState.SUCCEEDED)]


def test_a_lost_answer_makes_one_job(jobs: Jobs) -> None:
    provider = jobs.provider()
    plan = provider.plan(jobs.spec())
    real = kubernetes_client.Cluster.call

    def call(self: kubernetes_client.Cluster, method: str, path: str, **options: object) -> object:
        answer = real(self, method, path, **options)  # type: ignore[arg-type]
        if method == "POST":
            raise NoAnswer(TimeoutError("read"), "cluster", unsent=False)
        return answer

    with mock.patch.object(kubernetes_client.Cluster, "call", call):
        ref = provider.submit(plan)
    assert provider.submit(plan) == ref
    assert jobs.jobs() == [ref.native_id]
    other = provider.plan(jobs.spec(ref.run_id, max_runtime_seconds=700))
    with pytest.raises(PlanChanged):
        provider.submit(other)


def test_cancel_suspends_and_then_deletes(jobs: Jobs) -> None:
    provider = jobs.provider()
    ref = submit(provider, jobs)
    watch(provider, ref, lambda status: status.native_state == "Running")
    watch_log = provider.logs(ref)
    provider.cancel(ref)
    provider.cancel(ref)
    seen = watch(provider, ref, ended, pause=0.2)
    assert {status.state for status in seen} <= {JobState.STOPPING, JobState.CANCELLED}
    assert seen[-1].state is JobState.CANCELLED
    wait_for("no pod is left", lambda: not jobs.pods(ref), 15)  # its containers have ended; the object goes a moment later
    assert jobs.jobs() == [ref.native_id]
    gone = provider.poll(ref)
    assert gone.cost_usd is not None
    assert gone.cost_usd >= 0.01, "about a second at a cent each, although nothing tells of it any more"
    assert "about" in gone.message
    provider.cancel(ref)
    assert jobs.jobs() == [ref.native_id], "whoever watches it has not read it yet"
    write_receipt(ref)
    provider.cancel(ref)
    assert jobs.jobs() == []
    assert provider.poll(ref).state is JobState.CANCELLED
    provider.cancel(ref)
    assert provider.logs(ref, watch_log.cursor).ended


def test_a_job_that_ended_by_itself_is_read_and_not_removed_by_a_late_cancel(jobs: Jobs) -> None:
    """It was killed for want of memory, say, so that its trainer has written nothing."""
    provider = jobs.provider("echo the last word; exit 70")
    ref = submit(provider, jobs)
    wait_for("the Job to have failed", lambda: is_over(jobs.cluster.get("jobs", ref.native_id, jobs.namespace)), 60)
    provider.cancel(ref)
    status = provider.poll(ref)
    assert (status.state, status.reason) == (JobState.FAILED, FailureReason.USER_CODE)
    write_receipt(ref)
    provider.cancel(ref)
    assert read_log(provider, ref) == ["the last word"]


def test_a_job_that_time_or_a_hand_removed_is_never_made_again(jobs: Jobs) -> None:
    provider = jobs.provider("true", keep_seconds=1)
    plan = provider.plan(jobs.spec())
    ref = provider.submit(plan)
    deadline = time.monotonic() + 60
    while jobs.jobs():
        assert time.monotonic() < deadline
        time.sleep(0.5)
    again = provider.submit(plan)
    assert (again.native_id, again.fingerprint) == (ref.native_id, ref.fingerprint)
    assert jobs.jobs() == []
    with pytest.raises(JobNotFound):
        provider.poll(again)
    record = ExitRecord(exit_code=0, started_at=utc_now())
    ObjectFolder(ref.output_uri).put(AttemptLayout.EXIT, record.model_dump_json().encode())
    assert provider.poll(again).state is JobState.SUCCEEDED

    by_hand = jobs.provider()
    plan = by_hand.plan(jobs.spec())
    ref = by_hand.submit(plan)
    ObjectFolder(ref.output_uri).put(AttemptLayout.EXIT, ExitRecord(exit_code=75, started_at=utc_now()).model_dump_json().encode())
    jobs.cluster.kubectl("delete", "job", ref.native_id, "--namespace", jobs.namespace)
    assert by_hand.submit(plan).native_id == ref.native_id
    assert jobs.jobs() == []
    # Until its pod has ended, nothing may follow.
    seen = watch(by_hand, ref, ended, pause=0.2)
    assert {status.state for status in seen} <= {JobState.STOPPING, JobState.FAILED}

    # Nothing was recorded of it but that it was about to be created, and its trainer has not said a word.
    plan = by_hand.plan(jobs.spec())
    ref = by_hand.submit(plan)
    wait_for("the Job's pod", lambda: jobs.pods(ref), 30)
    jobs.cluster.kubectl("delete", "job", ref.native_id, "--namespace", jobs.namespace)
    assert by_hand.submit(plan).native_id == ref.native_id
    assert jobs.jobs() == []
    wait_for("its pod to end", lambda: not any(map(is_alive, jobs.pods(ref))), 60)
    with pytest.raises(JobNotFound):
        by_hand.poll(ref)
    by_hand.cancel(ref)

    # Nor is it lost, or stopped, because this cluster is not the one that has it.
    other = ref.model_copy(update={"console_url": ref.console_url.replace(jobs.cluster.server, "https://other.example:6443")})
    for act in (by_hand.poll, by_hand.cancel, by_hand.logs):
        with pytest.raises(ConfigError, match=r"was made at https://other\.example:6443: that may be another cluster"):
            act(other)
    ObjectFolder(ref.output_uri).put(AttemptLayout.EXIT, ExitRecord(exit_code=70, started_at=utc_now()).model_dump_json().encode())
    assert by_hand.poll(other).state is JobState.FAILED, "what the record tells closes the run, wherever the Job was"


def test_a_deleted_pod_is_followed_by_another_and_both_logs_are_read(jobs: Jobs) -> None:
    provider = jobs.provider('if [ ! -e /dev/null2 ]; then :; fi; echo "in $TRAINYARD_POD"; ' + WAIT)
    ref = submit(provider, jobs)
    watch(provider, ref, lambda status: status.native_state == "Running")
    first = jobs.pods(ref)[0]["metadata"]["name"]
    lines: list[str] = []
    deadline, cursor = time.monotonic() + 60, ""
    while len(lines) < 2 and time.monotonic() < deadline:
        batch = provider.logs(ref, cursor)
        lines, cursor = [*lines, *batch.lines], batch.cursor
    jobs.cluster.kubectl("delete", "pod", first, "--namespace", jobs.namespace, "--wait=false")
    watch(provider, ref, lambda status: status.native_state == "Running" and jobs.pods(ref)[0]["metadata"]["name"] != first)
    while f"in {first}" in lines and len([line for line in lines if line.startswith("in ")]) < 2 and time.monotonic() < deadline:
        batch = provider.logs(ref, cursor)
        lines, cursor = [*lines, *batch.lines], batch.cursor
    pods = [line for line in lines if line.startswith("in ")]
    assert len(pods) == 2, lines
    assert pods[0] != pods[1]
    assert len(jobs.jobs()) == 1


# Those of tests/e2e/test_kubernetes_causes.py, which a person reads, are left out.
CAUSES = [
    (
        "sleep 60",
        {"instance_classes": {"big": {"cpus": 0.05, "memory_gib": 30000}}},
        {},
        FailureReason.CAPACITY,
        "not enough memory",
        "memory_gib",
    ),
    ("sleep 60", {"instance_classes": {"far": {"node_selector": {"no": "such"}}}}, {}, FailureReason.CONFIG, "node", "node_selector"),
    ("sleep 60", {"env_secret": "missing"}, {}, FailureReason.CONFIG, "'missing'", "kubectl create secret"),
    ("sleep 60", {"service_account": "missing"}, {}, FailureReason.CONFIG, "service account", "serviceaccount missing"),
    ("sleep 60", {"priority_class": "missing"}, {}, FailureReason.CONFIG, "priority class", "priority"),
    ("sleep 60", {}, {"image": f"127.0.0.1:9/none@sha256:{'0' * 64}"}, FailureReason.IMAGE, "127.0.0.1:9", "reach"),
]


@pytest.mark.parametrize(("script", "settings", "changes", "reason", "told", "hint"), CAUSES)
def test_why_a_job_does_not_start_is_told_in_words(
    jobs: Jobs, script: str, settings: dict[str, object], changes: dict[str, object], reason: FailureReason, told: str, hint: str
) -> None:
    provider = jobs.provider(script, **settings)
    ref = submit(provider, jobs, **changes)
    status = watch(provider, ref, lambda status: status.reason is not None, seconds=30)[-1]
    assert status.state in (JobState.QUEUED, JobState.STARTING)
    assert (status.reason, told in status.message, hint in status.hint) == (reason, True, True), status


def test_an_unbound_claim_and_a_used_up_quota_are_seen_by_a_check(jobs: Jobs) -> None:
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "small"}, "spec": {"hard": {"configmaps": "1"}}}
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "unbound"},
        "spec": {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}, "storageClassName": "none"},
    }
    jobs.cluster.apply(claim, quota, namespace=jobs.namespace)
    provider = jobs.provider(enable_shared_cache=True, cache_pvc="unbound")

    def used_up() -> dict[str, CheckLine] | None:
        lines = {line.name: line for line in provider.check().lines}
        return lines if "quota small" in lines and not lines["quota small"].ok else None

    lines = wait_for("the quota to be counted", used_up, 30)  # each namespace has a config map of its own
    assert "kubectl describe resourcequota small" in lines["quota small"].fix
    assert not lines["shared cache"].ok
    assert "kubectl describe pvc unbound" in lines["shared cache"].fix


ENDS = [
    ("echo bad config > /dev/termination-log; exit 78", FailureReason.CONFIG, "bad config"),
    ("echo it raised; exit 70", FailureReason.USER_CODE, "it raised"),
]


@pytest.mark.parametrize(("script", "reason", "told"), ENDS)
def test_how_a_job_ended_is_told_in_words(jobs: Jobs, script: str, reason: FailureReason, told: str) -> None:
    provider = jobs.provider(script)
    ref = submit(provider, jobs)
    status = watch(provider, ref, ended, seconds=60)[-1]
    assert (status.state, status.reason) == (JobState.FAILED, reason), status
    assert told in status.message
    assert len(jobs.pods(ref)) == 1


def test_the_clusters_own_deadline_ends_a_job(jobs: Jobs) -> None:
    provider = jobs.provider(pending_limit_seconds=60)
    plan = provider.plan(jobs.spec(max_runtime_seconds=60))
    job = plan.request["job"]
    assert job["spec"]["activeDeadlineSeconds"] == 120  # type: ignore[index, call-overload]
    ref = provider.submit(plan)
    patch = json.dumps({"spec": {"activeDeadlineSeconds": 3}})
    jobs.cluster.kubectl("patch", "job", ref.native_id, "--namespace", jobs.namespace, "--patch", patch)
    status = watch(provider, ref, ended)[-1]
    assert (status.state, status.reason, status.native_state) == (JobState.FAILED, FailureReason.TIMEOUT, "DeadlineExceeded")
    wait_for("the pod is removed", lambda: not jobs.pods(ref), 30)
    status = provider.poll(ref)
    assert status.cost_usd is not None
    assert status.cost_usd >= 0.02, "three seconds at a cent each, although no pod tells of them"
    assert "at most" in status.message


def test_all_that_a_pod_may_not_do_is_forbidden(jobs: Jobs) -> None:
    words = "echo ids $(id -u) $(id -g); touch /x || echo readonly; touch /tmp/x && touch $HOME/x && touch /dev/shm/x && echo writable"
    provider = jobs.provider(f"{words}; grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/self/status; ls /var/run/secrets || echo no token")
    ref = submit(provider, jobs)
    watch(provider, ref, ended)
    lines = [line.replace("\t", " ") for line in read_log(provider, ref)]
    limits = {"NoNewPrivs: 1", "Seccomp: 2", "CapEff: 0000000000000000"}
    assert {"ids 1000 1000", "readonly", "writable", "no token"} | limits <= set(lines), lines


def test_a_request_that_the_server_refuses_names_the_field(jobs: Jobs) -> None:
    provider = jobs.provider(pod_patch={"noSuchField": 1})
    with pytest.raises(ConfigError, match="noSuchField"):
        provider.check_plan(provider.plan(jobs.spec()))
    assert not {line.name: line for line in provider.check().lines}["job"].ok
    missing = jobs.provider(namespace="no-such-namespace")
    with pytest.raises(ConfigError, match="no namespace"):
        submit(missing, jobs, resources=Resources())
