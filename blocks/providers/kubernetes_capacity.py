"""Pure: what nodes and quotas have left, in words."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

from blocks.errors import REASON_EXITS
from blocks.job import CheckLine, FailureReason
from blocks.providers.kubernetes_objects import Object, child, children, condition, is_alive, word
from blocks.providers.kubernetes_settings import InstanceClass, KubernetesSettings

FACTORS = {
    **{"n": Decimal("1e-9"), "u": Decimal("1e-6"), "m": Decimal("1e-3"), "": Decimal(1)},
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("k", "M", "G", "T", "P", "E"), 1)},
    **{unit: Decimal(1024) ** power for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), 1)},
}


def parse_quantity(text: str) -> Decimal:
    """``500m``, ``8Gi``, ``1e3``: 0 for what is none."""
    found = re.fullmatch(r"([+-]?[0-9.]+(?:[eE][+-]?[0-9]+)?)([numkMGTPE]?i?)", text.strip())
    return Decimal(found[1]) * FACTORS[found[2]] if found and found[2] in FACTORS else Decimal(0)


def build_gpu_lines(settings: KubernetesSettings, nodes: list[Object], pods: list[Object] | None) -> Iterator[CheckLine]:
    """A line per instance class: how many nodes it finds, and the GPUs that are free there. `pods`: None where they may not be seen."""
    for name, kind in sorted(settings.instance_classes.items()) or [("any", InstanceClass())]:
        fitting = [node for node in nodes if _fits(node, kind)]
        up = [node for node in fitting if condition(node, "Ready").get("status") == "True"]
        ready = [node for node in up if not child(node, "spec").get("unschedulable")]
        label = f"nodes ({name})"
        if not fitting:
            message = f"no node has {_selector(kind)}; an autoscaler may add one"
            yield CheckLine(name=label, ok=True, message=message, fix="kubectl get nodes --show-labels")
        elif not up:
            yield CheckLine(name=label, ok=False, message=f"none of {len(fitting)} nodes is ready", fix="kubectl get nodes")
        elif not ready:
            fix = f"kubectl uncordon {word(up[0], 'metadata', 'name')}"
            message = f"{len(up)} of {len(fitting)} nodes are ready, but cordoned, so that a job waits: {fix}"
            yield CheckLine(name=label, ok=True, message=message, fix=fix)
        else:
            yield _gpu_line(label, kind, ready, pods)


def _gpu_line(label: str, kind: InstanceClass, ready: list[Object], pods: list[Object] | None) -> CheckLine:
    there = sum(_gpus_of(node, kind.gpu_resource) for node in ready)
    if kind.gpus and not there:
        message = f"{len(ready)} ready, and none offers {kind.gpu_resource}"
        return CheckLine(name=label, ok=False, message=message, fix="install the GPU's device plugin, or mend gpu_resource")
    if not there:
        return CheckLine(name=label, ok=True, message=f"{len(ready)} ready, without GPUs")
    if pods is None:
        return CheckLine(
            name=label, ok=True, message=f"{len(ready)} ready with {there} {kind.gpu_resource}; how many are free is not to be seen"
        )
    free = there - count_requested(pods, {word(node, "metadata", "name") for node in ready}, kind.gpu_resource)
    return CheckLine(name=label, ok=True, message=f"{len(ready)} ready, {free} of {there} {kind.gpu_resource} free")


def _fits(node: Object, kind: InstanceClass) -> bool:
    labels = child(node, "metadata", "labels")
    return all(labels.get(key) == value for key, value in kind.node_selector.items())


def _selector(kind: InstanceClass) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(kind.node_selector.items()))


def _gpus_of(node: Object, resource: str) -> int:
    return int(parse_quantity(word(node, "status", "allocatable", resource)))


def count_requested(pods: list[Object], nodes: set[str], resource: str) -> int:
    """What pods that are not over have asked for on these nodes."""
    here = (pod for pod in pods if word(pod, "spec", "nodeName") in nodes and is_alive(pod))
    wanted = (parse_quantity(word(box, "resources", "requests", resource)) for pod in here for box in children(pod, "spec", "containers"))
    return int(sum(wanted, Decimal(0)))


def build_quota_lines(namespace: str, quotas: list[Object]) -> Iterator[CheckLine]:
    """What is used up, and what is not."""
    for quota in quotas:
        name = word(quota, "metadata", "name")
        hard, used = child(quota, "status", "hard"), child(quota, "status", "used")
        full = [key for key, limit in sorted(hard.items()) if parse_quantity(str(used.get(key, "0"))) >= parse_quantity(str(limit)) > 0]
        shown = ", ".join(f"{key} {used.get(key, '0')} of {limit}" for key, limit in sorted(hard.items()))
        fix = f"kubectl describe resourcequota {name} -n {namespace}   ({', '.join(full)} used up)" if full else ""
        yield CheckLine(name=f"quota {name}", ok=not full, message=shown, fix=fix, exit_code=int(REASON_EXITS[FailureReason.QUOTA]))
