"""What a proxy does on other clusters: a pod on the host's network finds the API server where Kubernetes tells it to look."""

from __future__ import annotations

from typing import Any

API = "admissionregistration.k8s.io/v1"
NAME = "api-server-address"
VARIABLE = 'Object.spec.containers.env{{name: "{name}", value: "{value}"}}'
# Merged by the names of containers and variables, as a server-side apply would.
EXPRESSION = (
    "Object{{spec: Object.spec{{containers: object.spec.containers.map(one, Object.spec.containers{{name: one.name, env: [{env}]}})}}}}"
)


def policy(port: int) -> list[dict[str, Any]]:
    """Sets, in each new pod on the host's network, the variables that every client's in-cluster configuration reads."""
    variables = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(port)}
    env = ", ".join(VARIABLE.format(name=name, value=value) for name, value in variables.items())
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    spec = {
        "matchConstraints": {"resourceRules": [rule]},
        "matchConditions": [{"name": "host-network", "expression": "has(object.spec.hostNetwork) && object.spec.hostNetwork"}],
        "failurePolicy": "Fail",
        "reinvocationPolicy": "Never",
        "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": EXPRESSION.format(env=env)}}],
    }
    return [
        {"apiVersion": API, "kind": "MutatingAdmissionPolicy", "metadata": {"name": NAME}, "spec": spec},
        {"apiVersion": API, "kind": "MutatingAdmissionPolicyBinding", "metadata": {"name": NAME}, "spec": {"policyName": NAME}},
    ]
