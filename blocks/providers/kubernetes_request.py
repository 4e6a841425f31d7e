"""Pure: the Job of an attempt, as the API server takes it, beside the config that its container reads from the bucket."""

from __future__ import annotations

import json
import math
from typing import Any, cast

from pydantic import JsonValue

from blocks.attempt_objects import build_container_job
from blocks.job import JobSpec
from blocks.naming import job_name, slug
from blocks.providers.kubernetes_objects import CONTAINER
from blocks.providers.kubernetes_patch import merge_patch
from blocks.providers.kubernetes_settings import (
    NAME,
    OWN_PREFIX,
    SPOT_SELECTORS,
    SPOT_TOLERATIONS,
    InstanceClass,
    KubernetesSettings,
    Toleration,
    choose_class,
    find_price,
)
from trainer.contract import FATAL_EXITS, AttemptLayout, ExitCode

MANAGED_BY = {"app.kubernetes.io/managed-by": "trainyard"}
FINGERPRINT = f"{OWN_PREFIX}fingerprint"
OUTPUT = f"{OWN_PREFIX}output-uri"
FLOW_RUN = f"{OWN_PREFIX}flow-run-id"
PRICE = f"{OWN_PREFIX}usd-per-hour"
INSTANCE = f"{OWN_PREFIX}instance-class"
CANCELLED_AT = f"{OWN_PREFIX}cancelled-at"
STARTED_AT = f"{OWN_PREFIX}started-at"  # noted when it is cancelled: a suspended Job forgets it, and its pods go
# What may differ between two submissions of one plan.
VOLATILE = (FLOW_RUN, PRICE, FINGERPRINT)

# What counts for nothing: the pod was told to stop, and saved. What counts is a pod that lost the attempt to another container: a machine
# that lived on unseen is a disruption by then, and of two Jobs of one attempt each would take it back from the other without end.
IGNORED_EXITS = (int(ExitCode.PREEMPTED),)
# Another machine would end the same way. 137 without a disruption is the kernel's, for want of memory.
FATAL = (*sorted(int(code) for code in FATAL_EXITS), 137)
MARGIN_SECONDS = 5  # from the trainer's own end to SIGKILL
CACHE_PATH = "/cache"
HOME_PATH = "/home/trainyard"


def build_request(spec: JobSpec, settings: KubernetesSettings) -> tuple[dict[str, JsonValue], str]:
    """The native request and the instance class. Raises ConfigError where no class fits."""
    name, kind = choose_class(settings, spec.resources)
    return {"job": build_job(spec, settings, name, kind), "config": build_config(spec, settings)}, name


def build_config(spec: JobSpec, settings: KubernetesSettings) -> dict[str, JsonValue]:
    """``config.json`` of the attempt, but for the fingerprint that covers it."""
    shared: dict[str, Any] = {}
    if settings.enable_shared_cache and spec.dataset.store_uri is not None:
        shared = {"cache_dir": f"{CACHE_PATH}/datasets", "cache_limit_gib": settings.cache_limit_gib}
    values = build_container_job(spec, **shared).model_dump(mode="json", exclude={"fingerprint"})
    return {**values, "dataset": spec.dataset.model_dump(mode="json", exclude_none=True)}


def build_job(spec: JobSpec, settings: KubernetesSettings, class_name: str, kind: InstanceClass) -> dict[str, JsonValue]:
    labels = build_labels(spec, settings)
    annotations = {f"{OWN_PREFIX}{key}": value for key, value in _words(spec).items() if value}
    price = find_price(class_name, kind, spot=spec.resources.spot)
    of_job: dict[str, JsonValue] = {
        **settings.annotations,
        **annotations,
        OUTPUT: spec.attempt_uri,
        INSTANCE: class_name,
        **({FLOW_RUN: spec.flow_run_id} if spec.flow_run_id else {}),
        **({PRICE: f"{price.usd_per_hour:g}"} if price is not None else {}),
    }
    queue = {"kueue.x-k8s.io/queue-name": settings.queue_name} if settings.queue_name else {}
    pod = merge_patch(build_pod(spec, settings, kind), settings.pod_patch)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(spec.run_id, spec.attempt),
            "namespace": settings.namespace,
            "labels": {**labels, **queue},
            "annotations": of_job,
        },
        "spec": {
            "parallelism": 1,
            "completions": 1,
            "backoffLimit": settings.pod_retries,
            "activeDeadlineSeconds": deadline_seconds(spec, settings),
            "ttlSecondsAfterFinished": settings.keep_seconds,
            # A second trainer only when the first one's end is known.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": build_failure_policy(),
            "template": {"metadata": {"labels": labels, "annotations": {**settings.annotations, **annotations}}, "spec": pod},
        },
    }


def deadline_seconds(spec: JobSpec, settings: KubernetesSettings) -> int:
    """From the Job's start, over all its pods, of which each may train for the maximum run time."""
    return spec.max_runtime_seconds + settings.pending_limit_seconds


def build_failure_policy() -> dict[str, JsonValue]:
    """In this order: a pod that was taken away counts for nothing, with whatever code it ended."""
    return {
        "rules": [
            {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
            _on_exits("Ignore", IGNORED_EXITS),
            _on_exits("FailJob", FATAL),
        ]
    }


def _on_exits(action: str, codes: tuple[int, ...]) -> dict[str, JsonValue]:
    return {"action": action, "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(codes)}}


def build_labels(spec: JobSpec, settings: KubernetesSettings) -> dict[str, JsonValue]:
    words = {key: slug(value) for key, value in _words(spec).items() if value}
    own = {"run-id": spec.run_id, "attempt": str(spec.attempt), **words}
    return {**settings.labels, **MANAGED_BY, **{f"{OWN_PREFIX}{key}": value for key, value in own.items()}}


def _words(spec: JobSpec) -> dict[str, str]:
    words = {"name": spec.name, "owner": spec.owner, "project": spec.project, "cost-centre": spec.cost_centre, "profile": spec.profile}
    return {key: value for key, value in words.items() if value}


# --- The pod -------------------------------------------------------------------------------------------------


def build_pod(spec: JobSpec, settings: KubernetesSettings, kind: InstanceClass) -> dict[str, JsonValue]:
    spot = kind.platform if spec.resources.spot else ""
    gpus = spec.resources.accelerator_count or kind.gpus
    tolerations = [*kind.tolerations, *SPOT_TOLERATIONS.get(spot, ())]
    if gpus:
        # The taint that most clusters give their GPU nodes, by the resource's name.
        tolerations.append(Toleration(key=kind.gpu_resource, operator="Exists", effect="NoSchedule"))
    selector = {**kind.node_selector, **SPOT_SELECTORS.get(spot, {})}
    user = settings.run_as_user
    optional: dict[str, JsonValue] = {
        "nodeSelector": dict(selector),
        "tolerations": [toleration.model_dump(exclude_defaults=True) for toleration in dict.fromkeys(tolerations)],
        "serviceAccountName": settings.service_account,
        "imagePullSecrets": [{"name": settings.image_pull_secret}] if settings.image_pull_secret else [],
        "priorityClassName": settings.priority_class,
        "hostNetwork": settings.host_network,
        "dnsPolicy": "ClusterFirstWithHostNet" if settings.host_network else "",
    }
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": math.ceil(settings.grace_seconds),
        # The training asks nothing of this cluster; identities for buckets come by other mounts.
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": user,
            "runAsGroup": user,
            "fsGroup": user,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [build_container(spec, settings, kind, gpus)],
        "volumes": build_volumes(settings, kind),
        **{key: value for key, value in optional.items() if value},
    }


def build_container(spec: JobSpec, settings: KubernetesSettings, kind: InstanceClass, gpus: int) -> dict[str, JsonValue]:
    variables = {
        **settings.env,
        **store_variables(spec),
        "HOME": HOME_PATH,
        "TMPDIR": MOUNTS["tmp"],
        "TRAINYARD_PLATFORM": NAME,
        "TRAINYARD_CONFIG": f"{spec.attempt_uri}/{AttemptLayout.CONFIG}",
    }
    mounts: list[JsonValue] = [{"name": name, "mountPath": path} for name, path in MOUNTS.items()]
    if settings.enable_shared_cache:
        mounts.append({"name": "cache", "mountPath": CACHE_PATH})
    limits, requests = build_resources(spec, kind, gpus)
    container: dict[str, JsonValue] = {
        "name": CONTAINER,
        "image": spec.image or "",
        "args": ["--max-runtime-seconds", str(spec.max_runtime_seconds), "--grace-seconds", f"{settings.grace_seconds - MARGIN_SECONDS:g}"],
        "env": [{"name": name, "value": value} for name, value in sorted(variables.items())],
        "resources": {"limits": limits, "requests": requests},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
        # What the trainer writes there is told to people; where it was killed, the log's end is.
        "terminationMessagePolicy": "FallbackToLogsOnError",
    }
    references: list[JsonValue] = [
        # With the node's network, a pod has the node's name.
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}
        for name, path in (("TRAINYARD_NODE", "spec.nodeName"), ("TRAINYARD_POD", "metadata.name"))
    ]
    if settings.env_secret:
        container["envFrom"] = [{"secretRef": {"name": settings.env_secret}}]
    for name, reference in sorted(spec.secrets.items()):
        secret, _, key = reference.partition("/")
        references.append({"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key or name}}})
    container["env"] = [*cast("list[JsonValue]", container["env"]), *references]
    return container


def build_resources(spec: JobSpec, kind: InstanceClass, gpus: int) -> tuple[dict[str, JsonValue], dict[str, JsonValue]]:
    """Limits and requests. No limit of cores: idle ones may be used, and a limit slows what it should not."""
    memory = mebibytes(spec.resources.memory_gib or kind.memory_gib)
    limits: dict[str, JsonValue] = {"memory": memory}
    disk = spec.resources.disk_gib or kind.disk_gib
    if disk is not None:
        limits["ephemeral-storage"] = mebibytes(disk)
    if gpus:
        limits[kind.gpu_resource] = str(gpus)
    return limits, {**limits, "cpu": f"{round((spec.resources.cpus or kind.cpus) * 1000)}m"}


MOUNTS = {"tmp": "/tmp", "home": HOME_PATH, "shm": "/dev/shm"}  # noqa: S108 (in the container)


def build_volumes(settings: KubernetesSettings, kind: InstanceClass) -> list[JsonValue]:
    volumes: list[JsonValue] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "home", "emptyDir": {}},
        # Data loaders hand images over in it; counted as the container's memory.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": mebibytes(max(kind.memory_gib / 4, 0.0625))}},
    ]
    if settings.enable_shared_cache:
        volumes.append({"name": "cache", "persistentVolumeClaim": {"claimName": settings.cache_pvc}})
    return volumes


def store_variables(spec: JobSpec) -> dict[str, str]:
    """The address of a store that is not its cloud's own, by the name that the store's library reads."""
    endpoint = spec.output_endpoint or spec.dataset.store_endpoint
    if not endpoint:
        return {}
    if spec.output_uri.startswith("s3://"):
        plain = {"AWS_ALLOW_HTTP": "true"} if endpoint.startswith("http://") else {}
        return {"AWS_ENDPOINT_URL": endpoint, **plain}
    return {"AZURE_STORAGE_ENDPOINT": endpoint} if spec.output_uri.startswith("az://") else {}


def mebibytes(gib: float) -> str:
    return f"{max(1, round(gib * 1024))}Mi"


# --- Around it -----------------------------------------------------------------------------------------------


def without_volatile(request: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """The request without what differs between two submissions of the same plan."""
    copy: dict[str, Any] = json.loads(json.dumps(request))
    annotations = copy["job"]["metadata"]["annotations"]
    for key in VOLATILE:
        annotations.pop(key, None)
    return copy


def with_fingerprint(request: dict[str, JsonValue], fingerprint: str) -> dict[str, Any]:
    """The Job to create: the plan's, and which plan that was."""
    job: dict[str, Any] = json.loads(json.dumps(request["job"]))
    job["metadata"]["annotations"][FINGERPRINT] = fingerprint
    return job


def set_image(job: dict[str, Any], image: str) -> None:
    for container in job["spec"]["template"]["spec"]["containers"]:
        if container["name"] == CONTAINER:
            container["image"] = image
