"""What a check says mends a profile, by a cluster that is a set of namespaces and who may do what there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from blocks.job import CheckLine
from blocks.providers.kubernetes_capacity import build_gpu_lines
from blocks.providers.kubernetes_causes import explain_unschedulable
from blocks.providers.kubernetes_client import ApiError, Cluster
from blocks.providers.kubernetes_job import KubernetesProvider
from blocks.providers.kubernetes_settings import KubernetesSettings

pytest.importorskip("kubernetes")
SHIPPED = "system:serviceaccount:trainyard:trainyard"


@dataclass(kw_only=True)
class World:
    """Who asks, which namespaces there are, and whether the asker has the rights of the shipped Role."""

    user: str
    namespaces: tuple[str, ...] = ("other", "trainyard")
    granted: bool = False
    sees_namespaces: bool = False

    def call(self, method: str, path: str, *, body: Any = None, **_options: Any) -> Any:
        if path == "/version":
            return {"major": "1", "minor": "37", "gitVersion": "v1.37.2"}
        if path.endswith("selfsubjectreviews"):
            return {"status": {"userInfo": {"username": self.user}}}
        if path.endswith("selfsubjectaccessreviews"):
            return {"status": {"allowed": self.granted}}
        kind, name = path.split("/")[-2:]
        if kind == "namespaces" and self.sees_namespaces:
            if name in self.namespaces:
                return {"metadata": {"name": name}}
            raise ApiError(method, path, 404, {"reason": "NotFound", "message": f'namespaces "{name}" not found'})
        if name == "jobs" and self.granted:
            return body
        raise ApiError(method, path, 403, {"reason": "Forbidden", "message": "forbidden"})

    def check(self, monkeypatch: pytest.MonkeyPatch, namespace: str) -> dict[str, CheckLine]:
        monkeypatch.setattr(Cluster, "call", lambda _, *asked, **options: self.call(*asked, **options))
        settings = {"namespace": namespace, "api_server": "https://cluster", "token": "t"}
        return {line.name: line for line in KubernetesProvider.from_settings(settings).check().lines}


@pytest.mark.parametrize(
    ("user", "namespace", "fix"),
    [
        ("system:serviceaccount:other:trainyard", "other", "sed 's/namespace: trainyard/namespace: other/'"),
        (SHIPPED, "trainyard", "kubectl apply -f deployments/kubernetes/rbac.yaml"),
        (
            SHIPPED,
            "other",
            "create rolebinding trainyard-trainyard-trainyard -n other --role=trainyard --serviceaccount=trainyard:trainyard",
        ),
        ("Ann B@x.org", "trainyard", "create rolebinding trainyard-ann-b-x.org -n trainyard --role=trainyard --user='Ann B@x.org'"),
        ("", "trainyard", "kubectl apply -f deployments/kubernetes/rbac.yaml"),
    ],
)
def test_missing_rights_are_given_to_whoever_asks(monkeypatch: pytest.MonkeyPatch, user: str, namespace: str, fix: str) -> None:
    """The shipped RoleBinding is for the account of its own namespace."""
    rights = World(user=user, sees_namespaces=True).check(monkeypatch, namespace)["rights"]
    assert not rights.ok
    assert fix in rights.fix
    assert ("create rolebinding" in rights.fix) is ("create rolebinding" in fix)


def test_a_namespace_that_is_missing_is_told_and_made_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = World(user="admin", namespaces=(), granted=True, sees_namespaces=True).check(monkeypatch, "nonesuch")
    assert (seen["namespace"].ok, seen["namespace"].fix) == (False, "kubectl create namespace nonesuch")
    assert "rights" not in seen, "all else would only repeat it"
    unseen = World(user=SHIPPED, namespaces=()).check(monkeypatch, "nonesuch")["rights"]
    assert "if there is such a namespace" in unseen.message
    assert unseen.fix.startswith("kubectl get namespace nonesuch || kubectl create namespace nonesuch; sed ")
    assert "namespace" not in World(user=SHIPPED, granted=True).check(monkeypatch, "other"), "it is there, whoever may look at it"


def node(name: str, *, ready: bool = True, cordoned: bool = False) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True" if ready else "Unknown"}]
    return {"metadata": {"name": name}, "spec": {"unschedulable": cordoned}, "status": {"conditions": conditions}}


def test_cordoned_nodes_are_told_as_such_and_refuse_no_training() -> None:
    """A person opens them again, as one takes a taint away: the job waits. A node that is down may stay so."""

    def look(*nodes: dict[str, Any]) -> CheckLine:
        return next(build_gpu_lines(KubernetesSettings(), list(nodes), None))

    waits = look(node("a", cordoned=True), node("b", cordoned=True), node("c", ready=False))
    assert (waits.ok, waits.fix) == (True, "kubectl uncordon a")
    assert "2 of 3 nodes are ready, but cordoned, so that a job waits: kubectl uncordon a" in waits.message
    assert look(node("a", cordoned=True), node("b")).message == "1 ready, without GPUs"
    assert not look(node("a", ready=False, cordoned=True)).ok
    cause = explain_unschedulable("0/2 nodes are available: 1 node(s) had untolerated taint {a: b}, 1 node(s) were unschedulable.", [])
    assert "kubectl uncordon NODE" in cause.hint
