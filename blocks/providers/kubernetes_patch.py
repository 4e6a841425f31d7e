"""Pure: the last-resort patch of a pod's spec. Merged like `kubectl patch`, and refused where it would undo what a run relies on."""

from __future__ import annotations

from typing import Any, cast

from pydantic import JsonValue

from blocks.providers.kubernetes_objects import CONTAINER, children

MERGE_KEYS = ("name", "mountPath", "containerPort", "key")
# What runs, how often, and whose identity it has; told by the fields of the profile instead.
OWNED = {
    "restartPolicy": "a Job's pods are replaced by the Job",
    "activeDeadlineSeconds": "the run's maximum run time says it",
    "terminationGracePeriodSeconds": "set grace_seconds",
    "serviceAccountName": "set service_account",
    "hostNetwork": "set host_network",
    "imagePullSecrets": "set image_pull_secret",
    "priorityClassName": "set priority_class",
    "schedulingGates": "such a pod never starts",
}
OWNED_OF_CONTAINER = {"image": "set image", "command": "the image has it", "args": "the run has them", "envFrom": "set env_secret"}


def check_pod_patch(patch: dict[str, Any]) -> None:
    """Raises ValueError naming the first field that is not for a patch to change."""
    for field, instead in OWNED.items():
        if field in patch:
            raise ValueError(f"{field} is not to be patched: {instead}")
    containers = patch.get("containers", [])
    if not isinstance(containers, list):
        raise ValueError("containers is a list")
    for container in cast("list[Any]", containers):
        if not isinstance(container, dict) or "name" not in container:
            raise ValueError(f"each of the containers has a name; ours is {CONTAINER!r}")
        _check_container(cast("dict[str, Any]", container))


def _check_container(container: dict[str, Any]) -> None:
    if container["name"] != CONTAINER:
        raise ValueError(f"{container['name']!r} would be a second container, and a Job ends when all of them have: use initContainers")
    for field, instead in OWNED_OF_CONTAINER.items():
        if field in container:
            raise ValueError(f"{field} of the container is not to be patched: {instead}")
    for variable in children(container, "env"):
        if "value" in variable:
            raise ValueError("variables with a value go to env; a patch may only refer to others (valueFrom)")


def merge_patch(base: JsonValue, patch: JsonValue) -> JsonValue:
    """Objects by field, lists of named things by name, other lists and values replaced; null removes."""
    if isinstance(base, dict) and isinstance(patch, dict):
        merged = dict(base)
        for key, value in patch.items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = merge_patch(merged.get(key), value)
        return merged
    if isinstance(base, list) and isinstance(patch, list) and (key := _merge_key([*base, *patch])):
        return _merge_lists(base, patch, key)
    return patch


def _merge_key(items: list[JsonValue]) -> str:
    return next((key for key in MERGE_KEYS if all(isinstance(item, dict) and key in item for item in items)), "")


def _merge_lists(base: list[JsonValue], patch: list[JsonValue], key: str) -> list[JsonValue]:
    merged = list(base)
    for item in patch:
        assert isinstance(item, dict)
        places = [place for place, old in enumerate(merged) if isinstance(old, dict) and old[key] == item[key]]
        # Several taints have the key nvidia.com/gpu: of tolerations each is its own.
        if places and key != "key":
            merged[places[0]] = merge_patch(merged[places[0]], item)
        elif item not in merged:
            merged.append(item)
    return merged
