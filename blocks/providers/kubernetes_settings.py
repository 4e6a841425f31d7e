"""Settings of the provider `kubernetes`: which cluster, its machines, and what every pod gets. No SDK; secrets stay out of dumps."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, SecretStr, StringConstraints, field_validator, model_validator

from blocks.errors import ConfigError
from blocks.job import Price, Resources
from blocks.pricing import lookup_price
from blocks.providers.kubernetes_patch import check_pod_patch
from trainer.contract import UserInput

Dns = Annotated[str, StringConstraints(pattern=r"^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?)?$")]
_WORD = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_DNS_NAME = r"(?=[^/]{1,253}/)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
LABEL_VALUE = re.compile(rf"({_WORD})?\Z")
LABEL_KEY = re.compile(rf"({_DNS_NAME}/)?{_WORD}\Z")  # so are taints and extended resources named, too
ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
# As ``scheme://user:password@host``, also amidst other text. A port is no password, whatever follows it; a password may have a slash.
URL_PASSWORD = re.compile(r"""://[^\s/?#@:\[]*:(?!\d+([/?#,;"']|$))[^\s@]+@""")
SECRET_NAME = re.compile(r"(?i)(secret|password|passwd|token|credential|private|(access|api|account|sas)_?key)")
# A Job that goes as soon as it is over may be gone before a run has seen how it ended, which then counts as lost, and costs an attempt. A
# flow looks every 33 s, every 66 s where the API server does not answer (`flows.watching.next_delay`); the one that goes on for a flow
# that was killed comes within some three minutes (`flows.reconcile`).
LEAST_KEEP_SECONDS = 600
NAME = "kubernetes"
OWN_PREFIX = "trainyard.io/"
Platform = Literal["", "eks", "karpenter", "gke", "aks"]


class Toleration(UserInput):
    """As in a pod: a taint that the job's pods may stand."""

    key: str = ""
    operator: Literal["Equal", "Exists"] = "Equal"
    value: str = ""
    effect: Literal["", "NoSchedule", "PreferNoSchedule", "NoExecute"] = ""

    @model_validator(mode="after")
    def _taint_is_named(self) -> Self:
        if self.key and not LABEL_KEY.match(self.key):
            raise ValueError(f"{self.key!r} is no key of a taint")
        if not self.key and self.operator != "Exists":
            raise ValueError("a toleration without a key stands every taint: that needs operator Exists")
        return self


# How each platform marks spot machines ("Managed node groups", "Karpenter: Scheduling", "Spot VMs" of GKE, "Spot node pool" of AKS).
SPOT_SELECTORS: dict[str, dict[str, str]] = {
    "eks": {"eks.amazonaws.com/capacityType": "SPOT"},
    "karpenter": {"karpenter.sh/capacity-type": "spot"},
    "gke": {"cloud.google.com/gke-spot": "true"},
    "aks": {"kubernetes.azure.com/scalesetpriority": "spot"},
}
SPOT_TOLERATIONS: dict[str, tuple[Toleration, ...]] = {
    "gke": (Toleration(key="cloud.google.com/gke-spot", value="true", effect="NoSchedule"),),
    "aks": (Toleration(key="kubernetes.azure.com/scalesetpriority", value="spot", effect="NoSchedule"),),
}


class InstanceClass(UserInput):
    """Machines of one kind: how a pod gets there, and what it gets of them."""

    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels that such nodes have.")
    tolerations: tuple[Toleration, ...] = Field(default=(), description="Taints that such nodes have, beside that of GPUs.")
    accelerator: str = Field(default="", description="GPU model, such as T4, L4, A100-80GB.")
    gpus: int = Field(default=0, ge=0, le=16, description="GPUs of a machine; a job gets as many as it asks for, up to these.")
    gpu_resource: str = Field(default="nvidia.com/gpu", description="Name under which the cluster counts GPUs.")
    cpus: float = Field(default=2.0, gt=0, le=1024, description="CPU cores of a job, less than a node has: its own programs need some.")
    memory_gib: float = Field(default=8.0, gt=0, le=32_768, description="Memory of a job, less than a node has.")
    disk_gib: float | None = Field(default=None, gt=0, description="Disk of the node for a job. Empty: not asked for.")
    platform: Platform = Field(default="", description="Whose spot machines: eks (managed groups), karpenter, gke, aks. Empty: none.")
    machine: str = Field(default="", description="Machine type to look the price up by, such as g5.xlarge. Empty: the class's name.")
    usd_per_hour: float | None = Field(default=None, ge=0, description="What you pay for a machine. Empty: the list price, where known.")
    spot_usd_per_hour: float | None = Field(
        default=None, ge=0, description="The same as spot. Empty: counted as on demand, so at most that."
    )

    @field_validator("gpu_resource")
    @classmethod
    def _resource_is_named(cls, value: str) -> str:
        if "/" not in value or not LABEL_KEY.match(value):
            raise ValueError("an extended resource is named domain/name, such as nvidia.com/gpu")
        return value

    @field_validator("node_selector")
    @classmethod
    def _selector_is_of_labels(cls, value: dict[str, str]) -> dict[str, str]:
        return check_labels(value)


class KubernetesSettings(UserInput):
    """Settings of the provider `kubernetes`. Secrets are no part of a dump: a run's record has `credentials` to find them again."""

    kubeconfig_path: str = Field(
        default="", description="Path of a kubeconfig. Empty: $KUBECONFIG, ~/.kube/config, or the pod's own identity."
    )
    kubeconfig: SecretStr = Field(default=SecretStr(""), exclude=True, repr=False, description="Text of a kubeconfig.")
    context: str = Field(default="", description="Context of the kubeconfig. Empty: its current one.")
    api_server: str = Field(default="", description="Address of the API server, https://...; together with a token.")
    token: SecretStr = Field(default=SecretStr(""), exclude=True, repr=False, description="Token for api_server.")
    ca_certificate: str = Field(default="", description="Certificate that signed api_server's: PEM text or a path. Empty: the system's.")
    verify_ssl: bool = Field(default=True, description="Check the server's certificate. Off: whoever sits between can read the token.")
    credentials: str = Field(
        default="", pattern=r"^([a-z0-9-]+/[a-z0-9-]+)?$", description="Saved block that has kubeconfig or token, as type/name."
    )
    namespace: Dns = Field(default="default", min_length=1, description="Namespace of the jobs.")
    service_account: Dns = Field(default="", description="Identity of the pods, for buckets without keys. Empty: default.")
    image_pull_secret: Dns = Field(default="", description="Secret to pull the image with.")
    env_secret: Dns = Field(default="", description="Secret whose keys become variables of the pod: a store's AWS_ACCESS_KEY_ID and so on.")
    env: dict[str, str] = Field(default_factory=dict, description="Variables of the pod; no secrets: they would be shown with the Job.")
    enable_shared_cache: bool = Field(default=False, description="Keep datasets on cache_pvc, for the jobs after this one.")
    cache_pvc: Dns = Field(default="", description="PersistentVolumeClaim, ReadWriteMany where jobs run on several nodes.")
    cache_limit_gib: float = Field(default=200.0, gt=0, description="Least recently used datasets leave the shared cache above this.")
    instance_classes: dict[str, InstanceClass] = Field(default_factory=dict, description="Kinds of machines, by a name of yours.")
    priority_class: Dns = Field(default="", description="PriorityClass of the pods.")
    queue_name: str = Field(default="", description="LocalQueue of Kueue; becomes the Job's label.")
    host_network: bool = Field(default=False, description="Use the node's network, as NCCL over RDMA may need.")
    labels: dict[str, str] = Field(default_factory=dict, description="Further labels of Job and pods.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Further annotations of Job and pods.")
    pod_patch: dict[str, JsonValue] = Field(default_factory=dict, description="Last resort: merged into the pod's spec; lists by name.")
    run_as_user: int = Field(default=1000, ge=1, le=2**31 - 1, description="User and group of the container; never root.")
    grace_seconds: float = Field(
        default=60.0, ge=10, le=3600, description="Time to save and send a checkpoint, between being asked to stop and being killed."
    )
    pending_limit_seconds: int = Field(
        default=3600, ge=10, le=7 * 86_400, description="A job that waits longer for its machine is stopped. Waits in a queue count not."
    )
    mending_limit_seconds: int = Field(
        default=60,
        ge=0,
        le=7 * 86_400,
        description="The same for a job that waits for what only a person mends: a missing image, secret or claim. 0: at once.",
    )
    keep_seconds: int = Field(
        default=86_400, ge=0, le=30 * 86_400, description="A finished Job is removed after so many seconds, 600 at least."
    )
    pod_retries: int = Field(default=3, ge=0, le=20, description="New pods of a Job after failures that another machine may not have.")

    @field_validator("labels")
    @classmethod
    def _labels_fit(cls, value: dict[str, str]) -> dict[str, str]:
        return check_labels(value, own=OWN_PREFIX)

    @field_validator("annotations")
    @classmethod
    def _annotations_fit(cls, value: dict[str, str]) -> dict[str, str]:
        for key in value:
            if not LABEL_KEY.match(key) or key.startswith(OWN_PREFIX):
                raise ValueError(f"{key!r} is no name of an annotation, or one of Trainyard's own")
        return value

    @field_validator("env")
    @classmethod
    def _env_has_no_secret(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not ENV_NAME.match(name):
                raise ValueError(f"{name!r} is no name of a variable")
            if name.startswith("TRAINYARD_"):
                raise ValueError(f"{name} is for Trainyard to set")
            if SECRET_NAME.search(name):
                raise ValueError(
                    f"{name} looks like a secret, and would be shown with the Job: keep it in a Secret and name that by env_secret"
                )
        return value

    @field_validator("instance_classes")
    @classmethod
    def _classes_are_named(cls, value: dict[str, InstanceClass]) -> dict[str, InstanceClass]:
        for name in value:
            if not name or not LABEL_VALUE.match(name):
                raise ValueError(f"{name!r} is no name of a class: letters, digits, '-', '_' and '.', at most 63")
        return value

    @field_validator("queue_name")
    @classmethod
    def _queue_is_a_label(cls, value: str) -> str:
        if not LABEL_VALUE.match(value):
            raise ValueError(f"{value!r} is no name of a queue")
        return value

    @field_validator("pod_patch")
    @classmethod
    def _patch_leaves_ours_alone(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        check_pod_patch(value)
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.api_server and not re.match(r"^https?://[^/\s]+", self.api_server):
            raise ValueError("api_server is a URL such as https://cluster.example.com:6443")
        if self.api_server and (self.kubeconfig_path or self.kubeconfig.get_secret_value()):
            raise ValueError("give a kubeconfig or an API server with a token, not both")
        if self.kubeconfig_path and self.kubeconfig.get_secret_value():
            raise ValueError("give the kubeconfig's text or its path, not both")
        if self.token.get_secret_value() and not self.api_server:
            raise ValueError("a token needs api_server, the address of the cluster that gave it")
        if self.enable_shared_cache and not self.cache_pvc:
            raise ValueError("enable_shared_cache needs cache_pvc, the claim to keep datasets on")
        return self


def is_pem(certificate: str) -> bool:
    """Whether it is a certificate's text, not its path."""
    return certificate.lstrip().startswith("-----BEGIN")


def check_labels(value: dict[str, str], own: str = "") -> dict[str, str]:
    for key, text in value.items():
        if not LABEL_KEY.match(key) or (own and key.startswith((own, "app.kubernetes.io/managed-by", "batch.kubernetes.io/"))):
            raise ValueError(f"{key!r} is no name of a label, or one that is not yours to set")
        if not LABEL_VALUE.match(text):
            raise ValueError(f"{text!r} is no value of a label ({key}): at most 63 letters, digits, '-', '_' and '.'")
    return value


# --- Which machine -----------------------------------------------------------------------------------------


ANY = "any"  # where the profile names no classes


def choose_class(settings: KubernetesSettings, resources: Resources) -> tuple[str, InstanceClass]:
    """The named class, or the least one that fits: by price, then GPUs, memory and cores. Raises ConfigError where none fits."""
    classes = settings.instance_classes
    if resources.instance_type:
        if resources.instance_type not in classes:
            known = ", ".join(sorted(classes)) or "none"
            raise ConfigError(f"the profile has no instance class {resources.instance_type!r}", hint=f"its classes: {known}")
        chosen = classes[resources.instance_type]
        problems = list(_lacks(chosen, resources))
        if problems:
            raise ConfigError(
                f"instance class {resources.instance_type!r} has {'; '.join(problems)}", hint="choose another, or ask for less"
            )
        return resources.instance_type, chosen
    if not classes:
        return ANY, _class_as_asked(resources)
    fitting = {name: kind for name, kind in classes.items() if not list(_lacks(kind, resources))}
    if not fitting:
        reasons = "; ".join(f"{name} has {', '.join(_lacks(kind, resources))}" for name, kind in sorted(classes.items()))
        raise ConfigError(f"no instance class of the profile fits: {reasons}", hint="ask for less, or add a class to the profile")
    name = min(fitting, key=lambda name: _size(name, fitting[name], spot=resources.spot))
    return name, fitting[name]


def _class_as_asked(resources: Resources) -> InstanceClass:
    """Any node that has what is asked for."""
    values: dict[str, Any] = {"gpus": resources.accelerator_count, "disk_gib": resources.disk_gib}
    if resources.cpus is not None:
        values["cpus"] = resources.cpus
    if resources.memory_gib is not None:
        values["memory_gib"] = resources.memory_gib
    return InstanceClass.model_validate(values)


def _size(name: str, kind: InstanceClass, *, spot: bool) -> tuple[float, int, float, float, str]:
    price = find_price(name, kind, spot=spot)
    return (price.usd_per_hour if price is not None else float("inf"), kind.gpus, kind.memory_gib, kind.cpus, name)


def find_price(name: str, kind: InstanceClass, *, spot: bool) -> Price | None:
    """The profile's own price, else the list's for the machine. Spot without a price of its own counts as on demand."""
    own = kind.spot_usd_per_hour if spot and kind.spot_usd_per_hour is not None else kind.usd_per_hour
    if own is not None:
        return Price(usd_per_hour=own, as_of="now", source="the profile")
    return lookup_price(NAME, kind.machine or name, "*")


def _lacks(kind: InstanceClass, resources: Resources) -> list[str]:
    lacks: list[str] = []
    if resources.accelerator and resources.accelerator.lower() != kind.accelerator.lower():
        lacks.append(f"{kind.accelerator or 'no'} GPU, not {resources.accelerator}")
    if resources.accelerator_count > kind.gpus:
        lacks.append(f"{kind.gpus} GPUs, not {resources.accelerator_count}")
    if resources.cpus is not None and resources.cpus > kind.cpus:
        lacks.append(f"{kind.cpus:g} cores, not {resources.cpus:g}")
    if resources.memory_gib is not None and resources.memory_gib > kind.memory_gib:
        lacks.append(f"{kind.memory_gib:g} GiB of memory, not {resources.memory_gib:g}")
    if resources.disk_gib is not None and kind.disk_gib is not None and resources.disk_gib > kind.disk_gib:
        lacks.append(f"{kind.disk_gib:g} GiB of disk, not {resources.disk_gib:g}")
    if resources.spot and not kind.platform:
        lacks.append("no spot machines (its `platform` is empty)")
    return lacks
