"""Pure: why a pod does not start, or how it ended, in words and with the next step. The cluster's own sentence stays part of it."""

from __future__ import annotations

import re
from typing import NamedTuple

from blocks.job import FailureReason
from blocks.providers.kubernetes_capacity import parse_quantity
from blocks.providers.kubernetes_objects import CONTAINER, Object, child, children, container_state, true_conditions, word
from trainer.contract import EXIT_REASONS, ExitCode


class Cause(NamedTuple):
    reason: FailureReason
    message: str
    hint: str = ""
    for_good: bool = False  # waiting does not mend it


def broken(reason: FailureReason, message: str, hint: str) -> Cause:
    """What stays so until somebody mends it."""
    return Cause(reason, message, hint, for_good=True)


# What the cluster's autoscaler, or Karpenter, says of a pod.
SCALES = ("TriggeredScaleUp", "NominatedClaim", "Nominated")
SCALES_NOT = ("NotTriggerScaleUp", "FailedScaleUp")
MEMORY_HINT = "use a smaller batch size, image size or number of workers, or an instance class with more memory_gib"


# --- Before a pod runs -------------------------------------------------------------------------------------


def explain_unschedulable(text: str, events: list[Object]) -> Cause:
    """The scheduler's sentence, ``0/5 nodes are available: 3 Insufficient nvidia.com/gpu, 2 ...``, and what it means."""
    scaling = next((event for event in reversed(events) if word(event, "reason") in (*SCALES, *SCALES_NOT)), Object())
    if word(scaling, "reason") in SCALES:
        return Cause(FailureReason.CAPACITY, f"the cluster adds a node for it: {word(scaling, 'message')}", "wait; nothing is to be done")
    beside = f"; the autoscaler adds none: {word(scaling, 'message')}" if scaling else ""
    message = f"no node takes the pod: {text}{beside}"
    if found := re.search(r'persistentvolumeclaim "?([^"\s]+)"? not found', text):
        return broken(FailureReason.CONFIG, message, f"create the claim {found[1]}, or mend cache_pvc in the profile")
    if "unbound immediate PersistentVolumeClaims" in text or "unbound PersistentVolumeClaims" in text:
        return Cause(
            FailureReason.CONFIG, message, "kubectl describe pvc   (has its StorageClass a provisioner, and is there a volume left?)"
        )
    # A free GPU is what most wait for, so it is named first even where other nodes have other reasons.
    if found := re.search(r"Insufficient ([a-z0-9.-]+/[A-Za-z0-9._-]+)", text):
        hint = f"wait until one is free, or add a node that has it: kubectl describe nodes | grep {found[1]}"
        return Cause(FailureReason.CAPACITY, f"no free {found[1]}: {message}", hint)
    if found := re.search(r"Insufficient (cpu|memory|ephemeral-storage|pods)", text):
        hint = "wait until other pods end, ask for less (cpus, memory_gib, disk_gib), or add a node"
        return Cause(FailureReason.CAPACITY, f"not enough {found[1]}: {message}", hint)
    # Before taints and selectors, which keep it from the nodes of others all the time.
    if "were unschedulable" in text:
        hint = "open a node that is cordoned: kubectl get nodes; kubectl uncordon NODE"
        return Cause(FailureReason.CAPACITY, message, hint)
    if "untolerated taint" in text or "had taint" in text:
        return Cause(
            FailureReason.CONFIG, message, "add the taint's toleration to the instance class: kubectl describe nodes | grep Taints"
        )
    if "didn't match Pod's node affinity/selector" in text or "node selector" in text:
        return Cause(FailureReason.CONFIG, message, "mend node_selector of the instance class: kubectl get nodes --show-labels")
    return Cause(FailureReason.CAPACITY, message, "kubectl describe pod tells more")


def explain_waiting(reason: str, text: str, image: str, events: list[Object], namespace: str = "") -> Cause | None:
    """A container that waits. None while it is on its way."""
    if reason in ("ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "RegistryUnavailable"):
        return explain_pull(text, image, find_missing_pull_secret(events), namespace)
    if reason in ("InvalidImageName", "ErrInvalidImageName"):
        return broken(FailureReason.IMAGE, f"{image!r} is no name of an image", "mend image, or registry and repository, in the profile")
    if reason == "CreateContainerConfigError":
        return explain_config(text, namespace)
    if reason in ("CreateContainerError", "RunContainerError"):
        if "exec format error" in text:
            return _wrong_architecture(image)
        return Cause(
            FailureReason.CONFIG, f"the container could not be made: {text}", "is it the trainer's image? see image in the profile"
        )
    return None


def find_missing_pull_secret(events: list[Object]) -> str:
    """The secrets that the kubelet did not find; it tries without them."""
    told = (word(event, "message") for event in reversed(events) if word(event, "reason") == "FailedToRetrieveImagePullSecret")
    found = re.search(r"\(([^)]+)\)", next(told, ""))
    return found[1] if found else ""


def explain_pull(text: str, image: str, missing_secret: str = "", namespace: str = "") -> Cause:
    if re.search(r"(?i)no match for platform|no matching manifest|exec format", text):
        return _wrong_architecture(image)
    if re.search(r"(?i)unauthori[sz]ed|authentication required|403 Forbidden|denied|no basic auth", text):
        if missing_secret:
            message = (
                f"the pull secret {missing_secret!r} is not there, and without it the registry does not let the node pull {image}: {text}"
            )
            create = f"kubectl create secret docker-registry {missing_secret} -n {namespace or '...'}"
            login = "--docker-server=... --docker-username=... --docker-password=..."
            hint = f"{create} {login}   (or mend image_pull_secret in the profile)"
            return broken(FailureReason.IMAGE, message, hint)
        hint = f"name the Secret that logs in by image_pull_secret: kubectl create secret docker-registry ... -n {namespace or '...'}"
        return broken(FailureReason.IMAGE, f"the registry does not let the node pull {image}: {text}", hint)
    if re.search(r"(?i)not found|manifest unknown|NotFound|does not exist", text):
        return broken(
            FailureReason.IMAGE, f"the registry has no {image}: {text}", "push it (`trainyard image push`), or mend image in the profile"
        )
    if re.search(r"(?i)no such host|timeout|refused|unreachable|x509|TLS", text):
        return Cause(
            FailureReason.IMAGE, f"the node does not reach the registry of {image}: {text}", "can the nodes reach it, and do they trust it?"
        )
    return Cause(FailureReason.IMAGE, f"{image} cannot be pulled: {text or 'the node says no more yet'}", "kubectl describe pod tells more")


def _wrong_architecture(image: str) -> Cause:
    hint = "build it for the nodes' architecture (image_platform in the profile), or choose others by node_selector kubernetes.io/arch"
    return broken(FailureReason.IMAGE, f"{image} is not made for the node's architecture", hint)


def explain_config(text: str, namespace: str = "") -> Cause:
    if found := re.search(r'secret "([^"]+)" not found', text):
        create = f"kubectl create secret generic {found[1]} -n {namespace or '...'}"
        keys = "--from-literal=AWS_ACCESS_KEY_ID=... --from-literal=AWS_SECRET_ACCESS_KEY=..."
        hint = f"{create} {keys}   (or mend env_secret in the profile)"
        return broken(FailureReason.CONFIG, f"the secret {found[1]!r} that the pod refers to is not there", hint)
    if found := re.search(r"couldn't find key (\S+) in Secret", text):
        return broken(FailureReason.CONFIG, f"the secret has no key {found[1]}: {text}", "add it: kubectl edit secret")
    if found := re.search(r'configmap "([^"]+)" not found', text):
        return broken(
            FailureReason.CONFIG, f"the config map {found[1]!r} that pod_patch refers to is not there", "create it, or mend pod_patch"
        )
    if "runAsNonRoot" in text:
        return broken(FailureReason.CONFIG, text, "set run_as_user to a number that is not 0")
    return Cause(FailureReason.CONFIG, f"the container cannot be set up: {text}", "kubectl describe pod tells more")


# The Job has its pod, or the pod its volumes and network: what was said of them before is mended.
GOES_ON = ("SuccessfulCreate", "Pulling", "Pulled")


def explain_events(events: list[Object]) -> Cause | None:
    """What keeps a pod from being made, or from getting its volumes; the latest word counts."""
    for event in reversed(events):
        reason, text = word(event, "reason"), word(event, "message")
        if reason in GOES_ON:
            return None
        if reason == "FailedCreate":
            return explain_failed_create(text)
        if reason == "FailedCreatePodSandBox":
            return Cause(
                FailureReason.INFRASTRUCTURE, f"the node cannot set up the pod: {text}", "look at the node's network plugin and kubelet"
            )
        if reason in ("FailedMount", "FailedAttachVolume"):
            if found := re.search(r'(secret|configmap) "([^"]+)" not found', text):
                return broken(
                    FailureReason.CONFIG, f"the {found[1]} {found[2]!r} to mount is not there", f"create the {found[1]}, or mend pod_patch"
                )
            return Cause(FailureReason.INFRASTRUCTURE, f"a volume cannot be mounted: {text}", "kubectl describe pvc, and the node's events")
    return None


def explain_failed_create(text: str) -> Cause:
    if "exceeded quota" in text:
        if is_above_quota(text):
            hint = "ask for less (cpus, memory_gib, GPUs), or have the quota raised: kubectl describe resourcequota"
            return broken(FailureReason.QUOTA, f"the namespace's quota is less than the pod alone asks for: {text}", hint)
        hint = "kubectl describe resourcequota; wait until other pods end, ask for less, or have the quota raised"
        return Cause(FailureReason.QUOTA, f"the namespace's quota is used up: {text}", hint)
    if "must specify" in text or "limitrange" in text.lower() or "maximum" in text:
        return broken(FailureReason.QUOTA, f"the namespace's limits refuse the pod: {text}", "kubectl describe limitrange,resourcequota")
    if found := re.search(r"serviceaccount \"?([^\"\s]+)\"? not found", text):
        return broken(
            FailureReason.CONFIG, f"there is no service account {found[1]}", f"kubectl create serviceaccount {found[1].split('/')[-1]}"
        )
    if "PodSecurity" in text:
        hint = "host_network and pod_patch may ask for what the namespace forbids (label pod-security.kubernetes.io/enforce)"
        return broken(FailureReason.CONFIG, f"the namespace's security level refuses the pod: {text}", hint)
    if found := re.search(r"no PriorityClass with name (\S+) was found", text):
        return broken(FailureReason.CONFIG, f"there is no priority class {found[1]}", "kubectl get priorityclasses; mend priority_class")
    return Cause(FailureReason.CONFIG, f"the cluster makes no pod: {text}", "kubectl describe job tells more")


def is_above_quota(text: str) -> bool:
    """Whether even an empty namespace has too little: ``requested: requests.cpu=2, used: requests.cpu=0, limited: requests.cpu=1``."""
    requested, limited = (
        dict(re.findall(r"([\w./-]+)=([\w.]+)", found[1])) if (found := re.search(rf"{part}: ([^:]*?)(?:, \w+:|$)", text)) else {}
        for part in ("requested", "limited")
    )
    return any(parse_quantity(amount) > parse_quantity(limited[name]) for name, amount in requested.items() if name in limited)


# --- After a pod ran ---------------------------------------------------------------------------------------


def explain_end(pod: Object) -> Cause | None:
    """How a pod failed. None where it did not, or leaves nothing to tell."""
    status = child(pod, "status")
    disrupted = true_conditions(pod).get("DisruptionTarget")
    ended = child(container_state(pod), "terminated")
    node = word(pod, "spec", "nodeName") or "its node"
    reason, said = word(status, "reason"), word(status, "message")
    if ended.get("reason") == "OOMKilled":
        limit = _memory_limit(pod)
        return Cause(FailureReason.OUT_OF_MEMORY, f"the container used more than its memory{limit}: OOMKilled", MEMORY_HINT)
    if reason == "DeadlineExceeded":
        return None  # of the Job, which tells it
    if disrupted is not None:
        return explain_disruption(disrupted, node)
    if reason == "Evicted":
        return Cause(FailureReason.PREEMPTED, f"{node} evicted the pod: {said}", "ask for the disk_gib and memory_gib it uses")
    if reason in ("NodeLost", "NodeShutdown", "Terminated", "Shutdown"):
        return Cause(FailureReason.PREEMPTED, f"{node} went away: {said or reason}")
    if ended.get("reason") == "ContainerStatusUnknown":
        return Cause(FailureReason.INFRASTRUCTURE, f"{node} lost the container: {word(ended, 'message')}")
    if reason in ("UnexpectedAdmissionError", "OutOfcpu", "OutOfmemory", "OutOfpods", "NodeAffinity"):
        return Cause(FailureReason.INFRASTRUCTURE, f"{node} refused the pod: {said or reason}")
    return explain_exit(ended) if ended.get("exitCode") else None


def explain_disruption(condition: Object, node: str) -> Cause:
    reason, text = word(condition, "reason"), word(condition, "message")
    words = {
        "PreemptionByScheduler": f"a pod of higher priority took its place on {node}",
        "DeletionByTaintManager": f"{node} was given a taint that the pod does not stand",
        "EvictionByEvictionAPI": f"the pod was evicted from {node}, as when a node is drained",
        "DeletionByPodGC": f"{node} is gone, and the pod with it",
        "TerminationByKubelet": f"{node} shuts down, or ran short of memory or disk",
    }
    return Cause(FailureReason.PREEMPTED, f"{words.get(reason, f'the pod was taken from {node} ({reason})')}{f': {text}' if text else ''}")


def explain_exit(ended: Object) -> Cause:
    code = int(ended["exitCode"])
    said = word(ended, "message").strip()
    if "exec format error" in said:
        return _wrong_architecture("the image")
    if code == 137:
        return Cause(FailureReason.INFRASTRUCTURE, "the container was killed (SIGKILL)", "`kubectl describe pod` may tell by whom")
    if code in (126, 127, 128):
        message = f"the container did not start the trainer (exit code {code}): {said or word(ended, 'reason')}"
        return Cause(FailureReason.IMAGE, message, "is it the trainer's image? see image in the profile")
    reason = EXIT_REASONS.get(code, FailureReason.UNKNOWN if code in (ExitCode.UNEXPECTED, ExitCode.USAGE) else FailureReason.USER_CODE)
    text, _, hint = said.partition(". Next: ")
    # Where the trainer left no word, the text is the log's end.
    return Cause(
        reason, text if "\n" not in said and text else f"the trainer ended with exit code {code}", hint if "\n" not in said else ""
    )


def _memory_limit(pod: Object) -> str:
    for container in children(pod, "spec", "containers"):
        if container.get("name") == CONTAINER and (limit := word(container, "resources", "limits", "memory")):
            return f" of {limit}"
    return ""


def explain_job_failure(condition: Object, pods: list[Object]) -> Cause:
    """Why the Job failed: its own word, made plain by the latest pod's end."""
    reason, text = word(condition, "reason"), word(condition, "message")
    if reason == "DeadlineExceeded":
        hint = "raise --max-runtime-seconds, or pending_limit_seconds where it waited for a machine; `trainyard resume` goes on"
        return Cause(FailureReason.TIMEOUT, "the Job was over its deadline: maximum run time and waiting for a machine", hint)
    ends = [cause for pod in reversed(pods) if (cause := explain_end(pod)) is not None]
    if ends:
        return ends[0]
    if found := re.search(r"exit code (\d+)", text):
        return explain_exit({"exitCode": int(found[1])})
    return Cause(FailureReason.UNKNOWN, f"the Job failed: {text or reason}", "kubectl describe job tells more")
