"""Who asks a cluster: every way to log in, from outside and in a pod, and the logins that are refused."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blocks.errors import AuthError, ConfigError, ServiceUnavailable
from blocks.job import CheckReport
from tests.cluster.cluster import Cluster, pod
from tests.kubernetes_jobs import Jobs, host_folders, jobs_in, shipped
from tests.stack import REPOSITORY, wait_for
from tests.stores import StoreServer

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]


@pytest.fixture
def jobs(cluster: Cluster, s3: StoreServer, monkeypatch: pytest.MonkeyPatch, no_cloud: None) -> Iterator[Jobs]:
    with jobs_in(cluster, s3, monkeypatch) as made:
        yield made


def test_every_way_to_log_in(jobs: Jobs, cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    token = cluster.token(jobs.namespace, "default")
    path = cluster.kubeconfig(jobs.namespace, "default")
    identity = f"system:serviceaccount:{jobs.namespace}:default"
    server = {"kubeconfig_path": "", "api_server": cluster.server, "token": token}
    for login in (
        {"kubeconfig_path": str(path)},
        {"kubeconfig_path": "", "kubeconfig": path.read_text()},
        {**server, "ca_certificate": str(cluster.certificate)},
        {**server, "ca_certificate": cluster.certificate.read_text()},
        {**server, "verify_ssl": False},
    ):
        caplog.clear()
        provider = jobs.provider(**login)
        report = provider.check()
        lines = {line.name: line for line in report.lines}
        assert lines["identity"].message == identity, report
        # On by default; whoever turns it off is warned wherever they look.
        warned = ["tls" in lines, "certificate is not checked" in caplog.text, bool(provider.plan(jobs.spec()).warnings)]
        assert warned == ["verify_ssl" in login] * 3
        assert not lines["rights"].ok
        assert "create jobs" in lines["rights"].message
        assert "kubectl apply" in lines["rights"].fix
        assert token not in report.model_dump_json()


IN_THE_POD = """
import sys
from blocks.providers.kubernetes_job import KubernetesProvider
from blocks.providers.kubernetes_objects import is_over
print(KubernetesProvider.from_settings({"namespace": sys.argv[1]}).check().model_dump_json())
"""


def test_in_a_pod_the_mounted_token_logs_in(jobs: Jobs, cluster: Cluster) -> None:
    """A real pod of the shipped account, with this environment's Python; nothing is set that a cluster does not set itself."""
    cluster.apply(*shipped("rbac.yaml", jobs.namespace), namespace=jobs.namespace)
    paths = [path for path in (*host_folders(), str(REPOSITORY / "blocks")) if Path(path).exists()]
    folders = {f"host-{number}": path for number, path in enumerate(paths)}
    variables = {"PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/tmp"}
    container = {
        "name": "flow",
        "image": cluster.small_image,
        "command": [sys.executable, "-P", "-c", IN_THE_POD, jobs.namespace],
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        "volumeMounts": [{"name": name, "mountPath": path, "readOnly": True} for name, path in folders.items()],
    }
    volumes = [{"name": name, "hostPath": {"path": path}} for name, path in folders.items()]
    cluster.apply(pod("flow", container, serviceAccountName="trainyard", hostNetwork=True, volumes=volumes), namespace=jobs.namespace)
    over = ("Succeeded", "Failed")
    wait_for("the pod's end", lambda: cluster.get("pod", "flow", jobs.namespace)["status"]["phase"] in over, 90)
    report = CheckReport.model_validate_json(cluster.kubectl("logs", "flow", "--namespace", jobs.namespace).stdout)
    lines = {line.name: line for line in report.lines}
    assert report.ok, report
    assert lines["identity"].message == f"system:serviceaccount:{jobs.namespace}:trainyard"
    assert cluster.server in lines["server"].message
    assert "tls" not in lines
    assert "dry run" in lines["job"].message


def test_refused_logins_are_told(jobs: Jobs, cluster: Cluster) -> None:
    server = {"kubeconfig_path": "", "api_server": cluster.server, "ca_certificate": str(cluster.certificate)}
    for login, kind, told in (
        ({**server, "token": cluster.expired_token(jobs.namespace, "default")}, AuthError, "expired"),
        ({**server, "token": cluster.token(jobs.namespace, "default")}, AuthError, "not allowed to get jobs"),
        ({**server, "ca_certificate": "", "token": "x"}, AuthError, "certificate"),
        ({"kubeconfig_path": "", "api_server": "https://127.0.0.1:9", "token": "x"}, ServiceUnavailable, "cannot be reached"),
        ({"kubeconfig_path": "/none"}, ConfigError, "no kubeconfig"),
    ):
        provider = jobs.provider(**login)
        started = time.monotonic()
        with pytest.raises(kind, match=told) as caught:
            provider.submit(provider.plan(jobs.spec()))
        assert caught.value.hint
        assert time.monotonic() - started < 10
        assert not provider.check().ok
