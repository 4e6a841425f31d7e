"""Etcd, API server, controller manager and scheduler. Flags that are not obvious have their reason beside them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.cluster.place import USERS, Place, kubeconfig
from tests.cluster.programs import kubernetes_program
from tests.stack import wait_for

# Kubernetes' own defaults wait five minutes for a node that is gone; a test waits seconds.
NODE_LOST_AFTER = "10s"
PODS_LEAVE_AFTER_SECONDS = 5
PROGRAMS = ("kube-scheduler", "kube-controller-manager", "kube-apiserver", "etcd")


def start_etcd(place: Place) -> None:
    clients, peers = (f"http://127.0.0.1:{place.ports[name]}" for name in ("etcd", "etcd-peer"))
    options = {
        "name": "test",
        "data-dir": place.run / "etcd",
        "listen-client-urls": clients,
        "advertise-client-urls": clients,
        "listen-peer-urls": peers,
        "initial-advertise-peer-urls": peers,
        "initial-cluster": f"test={peers}",
        "unsafe-no-fsync": "true",  # nothing here outlives a power cut
    }
    place.start("etcd", [kubernetes_program("etcd")], options)


def signing_key(place: Place) -> Path:
    """Of the service accounts' tokens."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    file = place.run / "service-accounts.key"
    if not file.exists():
        kind = serialization.PrivateFormat.TraditionalOpenSSL
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        file.write_bytes(key.private_bytes(serialization.Encoding.PEM, kind, serialization.NoEncryption()))
    return file


# What service accounts asked for; not those of Kubernetes' own programs, who ask all the time.
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "Metadata", "userGroups": ["system:serviceaccounts"]},
    ],
}


def audit_log(place: Place) -> Path:
    return place.run / "audit.log"


def start_api_server(place: Place) -> None:
    policy = place.run / "audit.json"
    policy.write_text(json.dumps(AUDIT_POLICY))
    tokens = place.run / "tokens.csv"
    tokens.write_text("".join(f"{place.tokens[user]},{name},{name}{group and f',{group}'}\n" for user, (name, group) in USERS.items()))
    options = {
        "etcd-servers": f"http://127.0.0.1:{place.ports['etcd']}",
        "bind-address": "127.0.0.1",
        "advertise-address": "127.0.0.1",
        "endpoint-reconciler-type": "none",  # else it refuses a loopback address
        "secure-port": place.ports["api-server"],
        "cert-dir": place.run / "certificates",
        "service-account-key-file": signing_key(place),
        "service-account-signing-key-file": signing_key(place),
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-cluster-ip-range": "10.0.0.0/24",
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "token-auth-file": tokens,
        "kubelet-preferred-address-types": "Hostname",
        "allow-privileged": "true",
        "audit-policy-file": policy,
        "audit-log-path": audit_log(place),
        "default-not-ready-toleration-seconds": PODS_LEAVE_AFTER_SECONDS,
        "default-unreachable-toleration-seconds": PODS_LEAVE_AFTER_SECONDS,
    }
    place.start("kube-apiserver", [kubernetes_program("kube-apiserver")], options)


def wait_for_api_server(place: Place) -> None:
    def ready() -> bool:
        assert place.pid("kube-apiserver"), place.log("kube-apiserver").read_text()[-4000:]
        if not place.certificate.exists():
            return False
        for user, token in place.tokens.items():
            place.kubeconfig(user).write_text(json.dumps(kubeconfig(place, token)))
        command = [kubernetes_program("kubectl"), "--kubeconfig", str(place.kubeconfig("admin")), "get", "--raw", "/readyz"]
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0

    wait_for("the API server", ready, 90)


def start_controller_manager(place: Place) -> None:
    login = place.kubeconfig("controller-manager")
    options = {
        "kubeconfig": login,
        "secure-port": 0,  # nobody asks it
        "use-service-account-credentials": "true",
        "service-account-private-key-file": signing_key(place),
        "root-ca-file": place.certificate,
        "leader-elect": "false",
        "node-monitor-period": "1s",
        "node-monitor-grace-period": NODE_LOST_AFTER,
    }
    place.start("kube-controller-manager", [kubernetes_program("kube-controller-manager")], options)


def start_scheduler(place: Place) -> None:
    options = {"kubeconfig": place.kubeconfig("scheduler"), "secure-port": 0, "leader-elect": "false"}
    place.start("kube-scheduler", [kubernetes_program("kube-scheduler")], options)


def start_control_plane(place: Place) -> None:
    start_etcd(place)
    start_api_server(place)
    wait_for_api_server(place)
    start_controller_manager(place)
    start_scheduler(place)


def stop_control_plane(place: Place) -> None:
    for program in PROGRAMS:
        place.stop(program)
