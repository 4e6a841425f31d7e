"""What the shipped Role is good for: all that a run needs, and no rule that it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from blocks.errors import AuthError
from blocks.job import JobRef, JobState
from blocks.providers.kubernetes_check import RIGHTS
from blocks.providers.kubernetes_job import KubernetesProvider
from tests.cluster.cluster import Cluster
from tests.kubernetes_jobs import Jobs, ended, granted, jobs_in, shipped, watch, write_receipt
from tests.stores import StoreServer

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]


@pytest.fixture
def jobs(cluster: Cluster, s3: StoreServer, monkeypatch: pytest.MonkeyPatch, no_cloud: None) -> Iterator[Jobs]:
    """As the shipped service account, with pods as the other one."""
    with jobs_in(cluster, s3, monkeypatch) as made:
        cluster.apply(*shipped("rbac.yaml", made.namespace), namespace=made.namespace)
        yield replace(made, login=cluster.kubeconfig(made.namespace, "trainyard"))


def take_right(jobs: Jobs, resource: str, verb: str) -> None:
    """The Role without one verb."""
    role = next(document for document in shipped("rbac.yaml", jobs.namespace) if document["kind"] == "Role")
    rule = next(rule for rule in role["rules"] if resource in rule["resources"])
    rule["verbs"].remove(verb)
    role["rules"] = [rule for rule in role["rules"] if rule["verbs"]]
    jobs.cluster.apply(role, namespace=jobs.namespace)


def test_the_shipped_account_runs_a_job_and_sees_what_a_check_needs(jobs: Jobs) -> None:
    provider = jobs.provider("echo done", service_account="trainyard-job")
    report = provider.check()
    assert report.ok, report
    assert next(line for line in report.lines if line.name == "nodes").fix
    plan = provider.plan(jobs.spec())
    provider.check_plan(plan)
    ref = provider.submit(plan)
    assert watch(provider, ref, ended)[-1].state is JobState.SUCCEEDED
    assert "done" in provider.logs(ref).lines
    assert [found.native_id for found, _ in provider.list_jobs()] == [ref.native_id]

    extra = shipped("check.yaml", jobs.namespace)
    jobs.cluster.apply(*extra, namespace=jobs.namespace)
    try:
        report = provider.check()
        assert report.ok, report
        names = {line.name: line for line in report.lines}
        assert "ready" in names["nodes (small)"].message
        assert not any("not for this identity" in line.message for line in report.lines), report
    finally:
        for document in extra:
            if document["kind"].startswith("Cluster"):
                jobs.cluster.kubectl("delete", document["kind"], document["metadata"]["name"])


def test_the_role_has_what_the_check_asks_for_and_no_more() -> None:
    asked = {(group, f"{resource}/{sub}" if sub else resource, verb) for group, resource, sub, verbs in RIGHTS for verb in verbs}
    assert granted("rbac.yaml", "any") == asked


def cancel_twice(provider: KubernetesProvider, ref: JobRef) -> None:
    provider.cancel(ref)
    watch(provider, ref, ended)
    write_receipt(ref)
    provider.cancel(ref)


CALLS: list[tuple[str, str, Callable[[KubernetesProvider, JobRef], object]]] = [
    ("jobs", "get", lambda provider, ref: provider.poll(ref)),
    ("jobs", "list", lambda provider, _: list(provider.list_jobs())),
    ("jobs", "patch", lambda provider, ref: provider.cancel(ref)),
    ("jobs", "delete", cancel_twice),
    ("pods", "list", lambda provider, ref: provider.poll(ref)),
    ("pods/log", "get", lambda provider, ref: provider.logs(ref)),
]


@pytest.mark.parametrize(("resource", "verb", "call"), CALLS, ids=[f"{verb} {resource}" for resource, verb, _ in CALLS])
def test_without_a_right_the_error_names_verb_and_resource(
    jobs: Jobs, resource: str, verb: str, call: Callable[[KubernetesProvider, JobRef], object]
) -> None:
    provider = jobs.provider()
    ref = provider.submit(provider.plan(jobs.spec()))
    watch(provider, ref, lambda status: status.native_state == "Running")
    take_right(jobs, resource, verb)
    with pytest.raises(AuthError, match=f"not allowed to {verb} {resource} in namespace {jobs.namespace}") as caught:
        call(provider, ref)
    assert "rbac.yaml" in caught.value.hint
    line = next(line for line in provider.check().lines if line.name == "rights")
    assert f"{verb} {resource}" in line.message


def test_without_create_a_submission_is_refused_and_without_events_the_cause_is_missing(jobs: Jobs) -> None:
    provider = jobs.provider(service_account="missing")
    plan = provider.plan(jobs.spec())
    take_right(jobs, "jobs", "create")
    with pytest.raises(AuthError, match=f"not allowed to create jobs in namespace {jobs.namespace}"):
        provider.submit(plan)
    take_right(jobs, "events", "list")  # and gives create back
    ref = provider.submit(plan)
    assert provider.poll(ref).reason is None
    assert "list events" in next(line for line in provider.check().lines if line.name == "rights").message
