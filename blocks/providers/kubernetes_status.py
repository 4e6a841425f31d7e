"""Pure: what Job, pods and events of an attempt, and the trainer's own words in the bucket, say of its state.

Sources: "Jobs" and "Pod Lifecycle" of Kubernetes 1.37; names of conditions and reasons from k8s.io/api v0.37. A word that is not
known gives UNKNOWN, so that a newer server ends no run.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from pydantic import BaseModel

from blocks.attempt_objects import PHASE_STATES, parse_exit
from blocks.job import FailureReason, JobState, JobStatus, Waiting, seconds_between
from blocks.providers.kubernetes_causes import (
    Cause,
    explain_end,
    explain_events,
    explain_job_failure,
    explain_unschedulable,
    explain_waiting,
)
from blocks.providers.kubernetes_objects import (
    Object,
    child,
    children,
    condition,
    container_state,
    is_alive,
    number,
    time_at,
    true_conditions,
    word,
)
from blocks.providers.kubernetes_request import CANCELLED_AT, INSTANCE, PRICE, STARTED_AT
from trainer.contract import ExitRecord, Phase, Progress, utc_now

CONDITIONS = frozenset({"Suspended", "FailureTarget", "SuccessCriteriaMet", "Complete", "Failed"})

# A pod has its machine: what waits in it, waits for no other.
POD_STATES = {**PHASE_STATES, Phase.QUEUED: JobState.STARTING}


HELD_BACK = ("Suspended", "SchedulingGated")  # by a queue, for as long as it wants
# After the time that a pod has to save, the node kills it and says so. API reference: `deletionTimestamp` is the end of that time.
OVERDUE_SECONDS = 30.0
HAS_A_MACHINE = ("Running", "Terminating", "NodeLost", "Failed")  # or had one, and the Job makes the next pod


class Native(NamedTuple):
    """One look at an attempt."""

    job: Object
    pods: list[Object]  # oldest first
    events: list[Object]  # oldest first; asked for only where a pod does not start
    progress: Progress | None
    ended: ExitRecord | None
    now: datetime


class View(BaseModel):
    """State, the platform's word for it, and why."""

    state: JobState
    native: str
    cause: Cause | None = None
    message: str = ""


def parse_status(native: Native) -> JobStatus:
    view = look(native)
    over = view.state.is_terminal
    start, ended = find_start(native), find_end(native) if over else None
    annotations = child(native.job, "metadata", "annotations")
    price = word(annotations, PRICE)
    record = native.ended if over else None
    # The trainer's own word says more than the platform's, where both tell the same end.
    tells = record is not None and record.exit_code != 0 and view.state is JobState.FAILED and _agrees(record, view.cause)
    cause = Cause(record.reason or FailureReason.UNKNOWN, record.message, record.hint) if record is not None and tells else view.cause
    message = cause.message if cause is not None else view.message
    held = find_held(native, start, ended)
    return JobStatus(
        state=view.state,
        native_state=view.native,
        reason=cause.reason if cause is not None else None,
        message=add_bound(message) if over and held.at_most else message,
        hint=cause.hint if cause is not None else "",
        waiting=find_wait(view),
        exit_code=record.exit_code if record is not None else None,
        restarts=max(0, count_pods(native) - 1),
        progress=native.progress,
        instance_type=word(annotations, INSTANCE),
        cost_usd=None if not price else round(float(price) * held.seconds / 3600, 4),
        started_at=start.since,
        ended_at=ended,
        observed_at=native.now,
    )


def find_wait(view: View) -> Waiting | None:
    """What the Job waits for, as long as its pod runs nothing."""
    if view.state not in (JobState.QUEUED, JobState.STARTING) or view.native in (*HELD_BACK, *HAS_A_MACHINE):
        return None
    return Waiting.MENDING if view.cause is not None and view.cause.for_good else Waiting.MACHINE


def _agrees(record: ExitRecord, cause: Cause | None) -> bool:
    """Whether the record is of the end that the platform tells; an earlier pod may have left it, or the pod was killed after it."""
    return cause is None or cause.reason in (record.reason, FailureReason.UNKNOWN, FailureReason.USER_CODE, FailureReason.INFRASTRUCTURE)


def look(native: Native) -> View:
    conditions = true_conditions(native.job)
    if "Complete" in conditions:
        return View(state=JobState.SUCCEEDED, native="Complete")
    cancelled = CANCELLED_AT in child(native.job, "metadata", "annotations")
    if "Failed" in conditions:
        if cancelled or (native.ended is not None and native.ended.cancelled):
            return View(state=JobState.CANCELLED, native="Failed", message="stopped as asked")
        failed = conditions["Failed"]
        return View(state=JobState.FAILED, native=word(failed, "reason") or "Failed", cause=explain_job_failure(failed, native.pods))
    if cancelled:
        return _look_cancelled(native)
    if native.job["spec"].get("suspend"):
        return _look_suspended(native)
    if "FailureTarget" in conditions:
        return View(state=JobState.STOPPING, native="FailureTarget", cause=explain_job_failure(conditions["FailureTarget"], native.pods))
    if "SuccessCriteriaMet" in conditions:
        return View(state=JobState.RUNNING, native="SuccessCriteriaMet", message="done; the pod ends")
    if strange := sorted(set(conditions) - CONDITIONS):
        return View(state=JobState.UNKNOWN, native=strange[0], message=f"the Job is {strange[0]}, which this version does not know")
    return look_at_pods(native)


def _look_cancelled(native: Native) -> View:
    status = child(native.job, "status")
    alive = [pod for pod in native.pods if is_alive(pod)]
    if silent := next((pod for pod in alive if is_silent(pod, native.now)), None):
        node = word(silent, "spec", "nodeName") or "its node"
        message = f"asked to stop, but {node} does not say that its pod has ended: it may still run, and cost"
        hint = f"kubectl get node {node}; where it is gone for good: kubectl delete node {node}   (then the stop comes to its end)"
        return View(state=JobState.STOPPING, native="NodeLost", cause=Cause(FailureReason.INFRASTRUCTURE, message, hint))
    if alive or status.get("active") or status.get("terminating"):
        return View(state=JobState.STOPPING, native="Suspended", message="asked to stop; saving")
    if native.ended is not None and native.ended.exit_code == 0:
        return View(state=JobState.SUCCEEDED, native="Suspended", message="it was done when it was asked to stop")
    gone = not native.pods and native.ended is None and STARTED_AT in child(native.job, "metadata", "annotations")
    about = "; its pods are gone, so that its time and cost are about right" if gone else ""
    return View(state=JobState.CANCELLED, native="Suspended", message=f"stopped as asked{about}")


def _look_suspended(native: Native) -> View:
    queue = word(native.job, "metadata", "labels", "kueue.x-k8s.io/queue-name")
    if queue:
        return View(state=JobState.QUEUED, native="Suspended", message=f"waits in the queue {queue}")
    name, namespace = word(native.job, "metadata", "name"), word(native.job, "metadata", "namespace")
    hint = f'kubectl patch job {name} -n {namespace} -p \'{{"spec":{{"suspend":false}}}}\''
    cause = Cause(FailureReason.CAPACITY, "somebody has suspended the Job", hint)
    return View(state=JobState.QUEUED, native="Suspended", cause=cause)


def look_at_pods(native: Native) -> View:
    alive = [pod for pod in native.pods if is_alive(pod)]
    if not alive:
        ended = [pod for pod in native.pods if word(pod, "status", "phase") == "Failed"]
        if ended:
            cause = explain_end(ended[-1])
            why = cause.message if cause is not None else "the pod failed"
            return View(state=JobState.STARTING, native="Failed", message=f"a new pod follows: {why}")
        if native.pods:
            return View(state=JobState.RUNNING, native="Succeeded", message="done; the Job ends")
        return View(state=JobState.QUEUED, native="Pending", cause=explain_events(native.events), message="the cluster makes the pod")
    pod = alive[-1]
    phase = word(pod, "status", "phase") or "Pending"
    if pod["metadata"].get("deletionTimestamp"):
        return _look_leaving(pod)
    if phase == "Pending":
        return look_pending(pod, native.events)
    if phase == "Running":
        return _look_running(native, pod)
    if phase == "Unknown":
        node = word(pod, "spec", "nodeName") or "its node"
        cause = Cause(
            FailureReason.INFRASTRUCTURE, f"{node} does not answer", f"kubectl get node {node}; delete the Node where the machine is gone"
        )
        return View(state=JobState.UNKNOWN, native="Unknown", cause=cause)
    return View(state=JobState.UNKNOWN, native=phase, message=f"the pod is {phase}, which this version does not know")


def _look_leaving(pod: Object) -> View:
    """Being taken away; the Job starts another one when this one is known to have ended."""
    node = word(pod, "spec", "nodeName") or "no node"
    disrupted = explain_end(pod)
    why = f": {disrupted.message}" if disrupted is not None else ""
    hint = f"where {node} is gone for good: kubectl delete node {node}   (until then no second trainer starts)"
    cause = Cause(FailureReason.PREEMPTED, f"the pod on {node} is taken away; a new one follows when it has ended{why}", hint)
    return View(state=JobState.STARTING, native="NodeLost" if _is_lost(pod) else "Terminating", cause=cause)


def is_silent(pod: Object, now: datetime) -> bool:
    """Whether its node says nothing of a pod that is taken away: its time to save is over, and it is still there."""
    gone_by = time_at(pod, "metadata", "deletionTimestamp")
    return _is_lost(pod) or (gone_by is not None and seconds_between(gone_by, now) > OVERDUE_SECONDS)


def _is_lost(pod: Object) -> bool:
    return condition(pod, "Ready").get("status") == "Unknown" or word(pod, "status", "reason") == "NodeLost"


def look_pending(pod: Object, events: list[Object]) -> View:
    scheduled = condition(pod, "PodScheduled")
    if scheduled.get("status") == "False":
        reason = word(scheduled, "reason") or "Pending"
        if reason == "SchedulingGated":
            return View(state=JobState.QUEUED, native=reason, message="something holds the pod back: its scheduling gates")
        return View(state=JobState.QUEUED, native=reason, cause=explain_unschedulable(word(scheduled, "message"), events))
    for status in (*children(pod, "status", "initContainerStatuses"), *children(pod, "status", "containerStatuses")):
        waiting = child(status, "state", "waiting")
        place = word(pod, "metadata", "namespace")
        cause = explain_waiting(word(waiting, "reason"), word(waiting, "message"), word(status, "image"), events, place)
        if cause is not None:
            return View(state=JobState.STARTING, native=word(waiting, "reason"), cause=cause)
    node = word(pod, "spec", "nodeName")
    if not node:
        return View(state=JobState.QUEUED, native="Pending", message="waits for a node")
    return View(
        state=JobState.STARTING, native="ContainerCreating", cause=explain_events(events), message=f"{node} gets the image and volumes"
    )


def _look_running(native: Native, pod: Object) -> View:
    progress = native.progress
    restarted = count_pods(native) > 1
    # What an earlier pod wrote is not this one's.
    began = time_at(container_state(pod), "running", "startedAt")
    if progress is None or (restarted and began is not None and progress.updated_at < began):
        return View(state=JobState.STARTING, native="Running", message="the container has started")
    return View(state=POD_STATES[progress.phase], native="Running", message=progress.message)


def may_be_removed(job: Object, ended: ExitRecord | None, *, recorded: bool) -> bool:
    """Whether a Job may go before its time to live ends: one that was stopped, when the record tells its end. Suspended, it has none."""
    return recorded and (CANCELLED_AT in child(job, "metadata", "annotations") or (ended is not None and ended.cancelled))


# --- Times -----------------------------------------------------------------------------------------------


# From a Job's start to its first pod. One that is made later is not the first, unless a quota let none be made before.
FIRST_POD_SECONDS = 60.0
AT_MOST = "not all of its pods are known any more: its time and cost are at most this"


class Start(NamedTuple):
    """From when a machine was held, None where none was; `at_most`: it was not before that, and may have been later."""

    since: datetime | None
    at_most: bool = False


def count_pods(native: Native) -> int:
    """How many pods the Job has had, as far as it remembers: those that it has counted may be gone."""
    return max(len(native.pods), sum(number(native.job, "status", name) for name in ("failed", "succeeded", "active")))


def first_start(pods: list[Object]) -> datetime | None:
    return min((found for pod in pods if (found := time_at(pod, "status", "startTime"))), default=None)


def find_start(native: Native) -> Start:
    """A pod's node is paid for from the moment that the pod is on it. Of pods that are gone, the Job's own start is the bound."""
    words = [time_at(native.job, "metadata", "annotations", STARTED_AT), native.ended.started_at if native.ended is not None else None]
    known = min((time for time in (first_start(native.pods), *words) if time is not None), default=None)
    began = time_at(native.job, "status", "startTime")
    first = time_at(native.pods[0], "metadata", "creationTimestamp") if native.pods else None
    all_there = first is not None and count_pods(native) == len(native.pods)
    held = known is not None or native.progress is not None or number(native.job, "status", "failed") > 0
    if not held or began is None or (all_there and first is not None and seconds_between(began, first) <= FIRST_POD_SECONDS):
        return Start(known)
    return Start(min(began, known or began), at_most=True)


class Held(NamedTuple):
    """For how long a machine was held; `at_most`: it may have been less."""

    seconds: float
    at_most: bool = False


def find_held(native: Native, start: Start, ended: datetime | None) -> Held:
    """Each pod from its start to its end, where all are there: between two of them, the Job may wait for a machine and holds none."""
    if start.since is None:
        return Held(0.0)
    until, pods = ended or native.now, native.pods
    ends = [find_pod_end(pod, until) for pod in pods]
    made = [time_at(pod, "metadata", "creationTimestamp") for pod in pods[1:]]
    # A Job makes a pod when the last one has ended. One that was asked to stop may have had another since, which is gone.
    cancelled = CANCELLED_AT in child(native.job, "metadata", "annotations")
    follows = [*zip(ends, made, strict=False), *([(ends[-1], ended)] if ends and cancelled and ended is not None else [])]
    gaps = [end is None or after is None or seconds_between(end, after) > FIRST_POD_SECONDS for end, after in follows]
    if start.at_most or any(gaps) or len(pods) < 2:
        return Held(seconds_between(start.since, until), at_most=start.at_most or any(gaps))
    starts = [time_at(pod, "status", "startTime") for pod in pods]
    return Held(sum(seconds_between(began, end or until) for began, end in zip(starts, ends, strict=True) if began is not None))


def find_pod_end(pod: Object, until: datetime) -> datetime | None:
    """None where nothing tells it."""
    if is_alive(pod):
        return until
    return time_at(container_state(pod), "terminated", "finishedAt") or time_at(condition(pod, "DisruptionTarget"), "lastTransitionTime")


def find_end(native: Native) -> datetime:
    """Until when a machine was held by a Job that is over."""
    over = [
        time_at(native.job, "status", "completionTime"),
        *(time_at(condition(native.job, kind), "lastTransitionTime") for kind in ("Failed", "Suspended")),
        *(time_at(container_state(pod), "terminated", "finishedAt") for pod in native.pods),
        native.ended.ended_at if native.ended is not None else None,
    ]
    return max((time for time in over if time is not None), default=native.now)


def add_bound(message: str) -> str:
    return f"{message}; {AT_MOST}" if message else AT_MOST


def status_of_vanished(
    ended: ExitRecord | None, progress: Progress | None, *, stopped: bool, price: float | None, made_at: datetime | None = None
) -> JobStatus | None:
    """The state of a Job that the cluster no longer has, as the bucket tells it. None where it tells no end.

    `made_at`: when the Job was made, where the record is of its last container alone.
    """
    if ended is not None:
        started = min(ended.started_at, made_at or ended.started_at)
        status = parse_exit(ended, progress, None if price is None else round(price * seconds_between(started, ended.ended_at) / 3600, 4))
        if stopped and status.state is JobState.FAILED:  # a trainer that got TERM before it saw why, or while it loaded
            status = status.model_copy(update={"state": JobState.CANCELLED, "reason": None})
        message = status.message if made_at is None else add_bound(status.message)
        return status.model_copy(update={"native_state": "removed", "started_at": started, "message": message})
    if stopped:
        return JobStatus(
            state=JobState.CANCELLED, native_state="removed", message="stopped as asked", progress=progress, ended_at=utc_now()
        )
    return None


def status_of_orphan(pod: Object, progress: Progress | None) -> JobStatus:
    """Of a Job that the cluster no longer has, while a pod of it lives: nothing may follow, as that one trains or saves."""
    name, namespace = word(pod, "metadata", "name"), word(pod, "metadata", "namespace")
    node = word(pod, "spec", "nodeName") or "no node"
    leaves = bool(word(pod, "metadata", "deletionTimestamp"))
    hint = f"kubectl delete node {node}, where that is gone for good" if leaves else f"kubectl delete pod {name} -n {namespace}, to stop it"
    return JobStatus(
        state=JobState.STOPPING,
        native_state="Terminating" if leaves else word(pod, "status", "phase"),
        message=f"its Job was deleted; its pod on {node} has not ended yet",
        hint=hint,
        progress=progress,
        started_at=time_at(pod, "status", "startTime"),
    )
