"""What Job, pods and events say of a run's state, without a cluster: objects as the API server writes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from blocks.attempt_objects import count_containers
from blocks.job import FailureReason, JobState, Waiting
from blocks.providers.kubernetes_causes import (
    explain_end,
    explain_failed_create,
    explain_pull,
    explain_unschedulable,
    explain_waiting,
)
from blocks.providers.kubernetes_request import CANCELLED_AT, INSTANCE, PRICE, STARTED_AT
from blocks.providers.kubernetes_status import Native, find_start, may_be_removed, parse_status, status_of_vanished
from trainer.contract import ExitRecord, Phase, Progress
from trainer.fencing import Claim
from trainer.storage import ObjectFolder

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
EARLIER = NOW - timedelta(minutes=30)


def stamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")


def job(*conditions: tuple[str, str], suspend: bool = False, cancelled: bool = False, queue: str = "", **status: Any) -> dict[str, Any]:
    annotations = {PRICE: "2", INSTANCE: "t4", **({CANCELLED_AT: stamp(NOW)} if cancelled else {})}
    labels = {"kueue.x-k8s.io/queue-name": queue} if queue else {}
    listed = [{"type": kind, "status": "True", "reason": reason, "lastTransitionTime": stamp(NOW)} for kind, reason in conditions]
    return {
        "metadata": {"name": "ty-r-1", "namespace": "n", "annotations": annotations, "labels": labels},
        "spec": {"suspend": suspend},
        "status": {"conditions": listed, **status},
    }


def pod(phase: str, *, container: dict[str, Any] | None = None, node: str = "node-1", **changes: Any) -> dict[str, Any]:
    conditions = changes.pop("conditions", [])
    metadata = {"name": "p", "namespace": "n", "uid": "u", "creationTimestamp": stamp(EARLIER), **changes.pop("metadata", {})}
    statuses = [{"name": "trainer", "image": "registry/trainer@sha256:0", "state": container}] if container else None
    status = {"phase": phase, "startTime": stamp(EARLIER), "conditions": conditions, "containerStatuses": statuses, **changes}
    return {"metadata": metadata, "spec": {"nodeName": node, "containers": [{"name": "trainer"}]}, "status": status}


def native(job: dict[str, Any], *pods: dict[str, Any], **changes: Any) -> Native:
    return Native(**{"job": job, "pods": list(pods), "events": [], "progress": None, "ended": None, "now": NOW, **changes})


def at(phase: Phase, updated: datetime = NOW) -> Progress:
    return Progress(attempt=1, phase=phase, epochs=3, updated_at=updated)


RUNNING = {"running": {"startedAt": stamp(EARLIER)}}
UNSCHEDULABLE = {
    "type": "PodScheduled",
    "status": "False",
    "reason": "Unschedulable",
    "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
}
DRAINED = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting"}
LEAVING = {"deletionTimestamp": stamp(NOW)}

CASES: dict[str, tuple[Native, JobState, str]] = {
    "no pod yet": (native(job()), JobState.QUEUED, "Pending"),
    "no status at all": (native({**job(), "status": None}), JobState.QUEUED, "Pending"),
    "unschedulable": (native(job(), pod("Pending", conditions=[UNSCHEDULABLE])), JobState.QUEUED, "Unschedulable"),
    "gets its image": (
        native(job(), pod("Pending", container={"waiting": {"reason": "ContainerCreating"}})),
        JobState.STARTING,
        "ContainerCreating",
    ),
    "no image": (
        native(job(), pod("Pending", container={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})),
        JobState.STARTING,
        "ImagePullBackOff",
    ),
    "started": (native(job(active=1), pod("Running", container=RUNNING)), JobState.STARTING, "Running"),
    "fetches data": (native(job(), pod("Running", container=RUNNING), progress=at(Phase.PREPARING)), JobState.STARTING, "Running"),
    "trains": (native(job(), pod("Running", container=RUNNING), progress=at(Phase.TRAINING)), JobState.RUNNING, "Running"),
    "evicted": (native(job(), pod("Running", metadata=LEAVING, conditions=[DRAINED])), JobState.STARTING, "Terminating"),
    "node lost": (
        native(job(), pod("Running", metadata=LEAVING, conditions=[{"type": "Ready", "status": "Unknown"}])),
        JobState.STARTING,
        "NodeLost",
    ),
    "between two pods": (native(job(failed=1), pod("Failed", conditions=[DRAINED])), JobState.STARTING, "Failed"),
    "queued by Kueue": (native(job(suspend=True, queue="gpu")), JobState.QUEUED, "Suspended"),
    "suspended by somebody": (native(job(suspend=True)), JobState.QUEUED, "Suspended"),
    "being cancelled": (native(job(suspend=True, cancelled=True, active=1), pod("Running")), JobState.STOPPING, "Suspended"),
    "still leaving": (native(job(suspend=True, cancelled=True, terminating=1)), JobState.STOPPING, "Suspended"),
    "cancelled": (native(job(suspend=True, cancelled=True)), JobState.CANCELLED, "Suspended"),
    "done before the cancel": (
        native(job(suspend=True, cancelled=True), ended=ExitRecord(exit_code=0, started_at=EARLIER)),
        JobState.SUCCEEDED,
        "Suspended",
    ),
    "done": (native(job(("SuccessCriteriaMet", "CompletionsReached"), ("Complete", "CompletionsReached"))), JobState.SUCCEEDED, "Complete"),
    "about to be done": (native(job(("SuccessCriteriaMet", "CompletionsReached"))), JobState.RUNNING, "SuccessCriteriaMet"),
    "about to fail": (native(job(("FailureTarget", "DeadlineExceeded"))), JobState.STOPPING, "FailureTarget"),
    "over its deadline": (native(job(("Failed", "DeadlineExceeded"))), JobState.FAILED, "DeadlineExceeded"),
    "a condition of a newer server": (native(job(("Rebalancing", "Why"))), JobState.UNKNOWN, "Rebalancing"),
    "a phase of a newer server": (native(job(), pod("Hibernating")), JobState.UNKNOWN, "Hibernating"),
}


@pytest.mark.parametrize("case", sorted(CASES))
def test_state_of_a_job(case: str) -> None:
    seen, state, word = CASES[case]
    status = parse_status(seen)
    assert (status.state, status.native_state) == (state, word)
    assert status.instance_type == "t4"
    assert (status.ended_at is not None) == status.state.is_terminal
    if status.reason is not None and status.state is not JobState.CANCELLED:
        assert status.message


def test_what_an_earlier_pod_wrote_is_not_the_new_ones_progress() -> None:
    old = pod("Failed", conditions=[DRAINED])
    new = pod("Running", container={"running": {"startedAt": stamp(NOW)}})
    before = native(job(failed=1, active=1), old, new, progress=at(Phase.TRAINING, EARLIER))
    assert parse_status(before).state is JobState.STARTING
    assert parse_status(before).restarts == 1
    after = native(job(failed=1, active=1), old, new, progress=at(Phase.TRAINING, NOW + timedelta(seconds=5)))
    assert parse_status(after).state is JobState.RUNNING


def test_cost_is_that_of_the_time_a_machine_was_held() -> None:
    assert parse_status(native(job(), pod("Running"))).cost_usd == 1.0
    ended = pod("Succeeded", container={"terminated": {"exitCode": 0, "finishedAt": stamp(EARLIER + timedelta(minutes=15))}})
    done = parse_status(native(job(("Complete", "x"), completionTime=stamp(EARLIER + timedelta(minutes=15))), ended))
    assert (done.cost_usd, done.started_at, done.ended_at) == (0.5, EARLIER, EARLIER + timedelta(minutes=15))
    assert parse_status(native(job())).cost_usd == 0.0


def test_cost_of_a_cancelled_job_whose_pods_are_gone() -> None:
    gone = job(("Suspended", "JobSuspended"), suspend=True, cancelled=True)
    assert parse_status(native(gone)).cost_usd == 0.0, "it never had a machine"
    gone["metadata"]["annotations"][STARTED_AT] = stamp(EARLIER)
    status = parse_status(native(gone))
    assert (status.cost_usd, status.started_at, status.ended_at) == (1.0, EARLIER, NOW)
    assert "about" in status.message


def test_time_of_pods_that_are_gone_is_counted_as_the_most_that_it_can_have_been() -> None:
    hour = NOW - timedelta(hours=1)
    late = pod("Running", container=RUNNING, metadata={"creationTimestamp": stamp(EARLIER)})
    evicted = parse_status(native(job(startTime=stamp(hour), active=1), late))
    assert (evicted.started_at, evicted.cost_usd) == (hour, 2.0), "the pod before this one is gone, and counts as no failure"
    ended = pod("Succeeded", container={"terminated": {"exitCode": 0, "finishedAt": stamp(NOW)}}, startTime=stamp(NOW))
    soon = pod("Succeeded", startTime=stamp(NOW), metadata={"creationTimestamp": stamp(hour)})
    one_of_two = job(("Complete", "x"), startTime=stamp(hour), completionTime=stamp(NOW), failed=1, succeeded=1)
    for seen in (native(one_of_two, ended), native(one_of_two, soon)):
        status = parse_status(seen)
        assert (status.state, status.cost_usd, status.restarts) == (JobState.SUCCEEDED, 2.0, 1)
        assert "at most" in status.message
    all_there = parse_status(native(job(("Complete", "x"), startTime=stamp(hour), completionTime=stamp(NOW), succeeded=1), soon))
    assert (all_there.cost_usd, all_there.message) == (0.0, ""), "it waited for its machine"


def test_a_job_over_its_deadline_costs_what_its_pods_may_have_had() -> None:
    late = job(("Failed", "DeadlineExceeded"), startTime=stamp(EARLIER), failed=1)
    status = parse_status(native(late, progress=at(Phase.TRAINING, EARLIER)))
    assert (status.cost_usd, status.started_at, status.ended_at) == (1.0, EARLIER, NOW)
    assert "at most" in status.message
    no_pod = parse_status(native(job(("Failed", "DeadlineExceeded"), startTime=stamp(EARLIER))))
    assert (no_pod.cost_usd, "at most" in no_pod.message) == (0.0, False), "a quota let none be made"
    waits = parse_status(native(job(startTime=stamp(EARLIER)), events=[]))
    assert (waits.started_at, waits.cost_usd) == (None, 0.0)


def test_the_start_that_a_cancel_notes_is_of_the_pods_that_are_gone_too() -> None:
    hour = NOW - timedelta(hours=1)
    assert find_start(native(job(startTime=stamp(hour), active=1), pod("Running"))).since == hour
    assert find_start(native(job(startTime=stamp(EARLIER), active=1), pod("Running"))).since == EARLIER


def test_the_trainers_own_word_counts_where_it_tells_the_same_end() -> None:
    exits = {"terminated": {"exitCode": 78, "message": "short. Next: do"}}
    record = ExitRecord(exit_code=78, reason=FailureReason.CONFIG, message="the whole story", hint="next", started_at=EARLIER)
    status = parse_status(native(job(("Failed", "PodFailurePolicy")), pod("Failed", container=exits), ended=record))
    assert (status.reason, status.message, status.hint, status.exit_code) == (FailureReason.CONFIG, "the whole story", "next", 78)
    status = parse_status(native(job(("Failed", "PodFailurePolicy")), pod("Failed", container=exits)))
    assert (status.reason, status.message, status.hint) == (FailureReason.CONFIG, "short", "do")
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    stale = ExitRecord(exit_code=75, reason=FailureReason.PREEMPTED, message="an earlier pod", started_at=EARLIER)
    status = parse_status(native(job(("Failed", "PodFailurePolicy")), pod("Failed", container=killed), ended=stale))
    assert status.reason is FailureReason.OUT_OF_MEMORY
    assert "OOMKilled" in status.message


def test_a_removed_job_is_what_its_record_says() -> None:
    record = ExitRecord(exit_code=130, cancelled=True, started_at=EARLIER, ended_at=NOW)
    cancelled = status_of_vanished(record, None, stopped=False, price=2.0)
    assert cancelled is not None
    assert (cancelled.state, cancelled.cost_usd) == (JobState.CANCELLED, 1.0)
    for code, reason in ((75, FailureReason.PREEMPTED), (70, FailureReason.USER_CODE)):
        told = ExitRecord(exit_code=code, reason=reason, started_at=EARLIER, ended_at=NOW)
        for stop, state in ((True, JobState.CANCELLED), (False, JobState.FAILED)):
            status = status_of_vanished(told, None, stopped=stop, price=None)
            assert status is not None
            assert (status.state, status.reason is None) == (state, stop)
    stopped = status_of_vanished(None, None, stopped=True, price=None)
    assert stopped is not None
    assert stopped.state is JobState.CANCELLED
    assert status_of_vanished(None, at(Phase.TRAINING), stopped=False, price=None) is None


def test_a_removed_job_of_several_pods_cost_at_most_its_time_since_it_was_made() -> None:
    last = ExitRecord(exit_code=0, started_at=NOW - timedelta(minutes=6), ended_at=NOW)
    status = status_of_vanished(last, None, stopped=False, price=2.0, made_at=EARLIER)
    assert status is not None
    assert (status.started_at, status.cost_usd) == (EARLIER, 1.0)
    assert "at most" in status.message


def test_the_containers_of_an_attempt_are_counted_by_the_trainers_own_claim(tmp_path: Path) -> None:
    objects = ObjectFolder(tmp_path.as_uri())
    assert count_containers(objects) == 0
    for number in (1, 2):
        Claim.take(objects.uri)
        assert count_containers(objects) == number


def test_only_a_job_that_was_stopped_is_removed_and_only_when_its_receipt_is_there() -> None:
    by_itself = job(("Failed", "PodFailurePolicy"))
    stopped = job(("Suspended", "JobSuspended"), suspend=True, cancelled=True)
    for recorded in (False, True):
        assert may_be_removed(stopped, None, recorded=recorded) is recorded
        assert may_be_removed(by_itself, ExitRecord(exit_code=130, cancelled=True, started_at=EARLIER), recorded=recorded) is recorded
        assert not may_be_removed(by_itself, None, recorded=recorded), "its pods tell why it failed, for as long as it is kept"
        assert not may_be_removed(job(("Complete", "x")), ExitRecord(exit_code=0, started_at=EARLIER), recorded=recorded)


SENTENCES = [
    (
        "0/3 nodes are available: 1 Insufficient nvidia.com/gpu, 2 node(s) had untolerated taint {a: b}.",
        FailureReason.CAPACITY,
        "free nvidia.com/gpu",
    ),
    ("0/1 nodes are available: 1 Insufficient cpu.", FailureReason.CAPACITY, "not enough cpu"),
    ("0/2 nodes are available: 2 node(s) had untolerated taint {team: a}.", FailureReason.CONFIG, "untolerated taint"),
    ("0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector.", FailureReason.CONFIG, "node affinity"),
    ("0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims.", FailureReason.CONFIG, "unbound"),
    ('0/1 nodes are available: persistentvolumeclaim "c" not found.', FailureReason.CONFIG, "not found"),
    ("a sentence of next year", FailureReason.CAPACITY, "next year"),
]


@pytest.mark.parametrize(("text", "reason", "told"), SENTENCES)
def test_the_schedulers_sentence_is_kept_and_explained(text: str, reason: FailureReason, told: str) -> None:
    cause = explain_unschedulable(text, [])
    assert cause.reason is reason
    assert told in cause.message
    assert text in cause.message
    assert cause.hint


NO_PULL = {"waiting": {"reason": "ErrImagePull", "message": "pull access denied, repository does not exist"}}
NO_LOGIN = {
    "reason": "FailedToRetrieveImagePullSecret",
    "message": "Unable to retrieve some image pull secrets (regcred); attempting to pull",
}
TOO_MUCH = "exceeded quota: q, requested: requests.cpu=2,pods=1, used: requests.cpu=0,pods=0, limited: requests.cpu=1500m,pods=9"
USED_UP = "exceeded quota: q, requested: requests.cpu=1, used: requests.cpu=1, limited: requests.cpu=1500m"
WAITS: dict[str, tuple[Native, Waiting | None]] = {
    "no GPU": (native(job(), pod("Pending", conditions=[UNSCHEDULABLE])), Waiting.MACHINE),
    "no pull": (native(job(), pod("Pending", container=NO_PULL)), Waiting.MENDING),
    "no answer of the registry": (
        native(job(), pod("Pending", container={"waiting": {"reason": "ErrImagePull", "message": "i/o timeout"}})),
        Waiting.MACHINE,
    ),
    "quota used up": (native(job(), events=[{"reason": "FailedCreate", "message": USED_UP}]), Waiting.MACHINE),
    "quota too small": (native(job(), events=[{"reason": "FailedCreate", "message": TOO_MUCH}]), Waiting.MENDING),
    "gets its image": (native(job(), pod("Pending", container={"waiting": {"reason": "ContainerCreating"}})), Waiting.MACHINE),
    "queued by Kueue": (native(job(suspend=True, queue="gpu")), None),
    "started": (native(job(active=1), pod("Running", container=RUNNING)), None),
    "between two pods": (native(job(failed=1), pod("Failed", conditions=[DRAINED])), None),
    "taken away": (native(job(), pod("Running", metadata=LEAVING, conditions=[DRAINED])), None),
    "over": (native(job(("Failed", "DeadlineExceeded"))), None),
}


@pytest.mark.parametrize("case", WAITS)
def test_what_a_job_waits_for(case: str) -> None:
    seen, waiting = WAITS[case]
    assert parse_status(seen).waiting is waiting


def test_a_pull_secret_that_is_missing_is_named() -> None:
    status = parse_status(native(job(), pod("Pending", container=NO_PULL), events=[NO_LOGIN]))
    assert "the pull secret 'regcred' is not there" in status.message
    assert "kubectl create secret docker-registry regcred" in status.hint


def test_what_the_autoscaler_does_is_told() -> None:
    text = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."
    scaling = explain_unschedulable(text, [{"reason": "TriggeredScaleUp", "message": "pool 0->1 (max: 5)"}])
    assert "adds a node" in scaling.message
    refused = explain_unschedulable(text, [{"reason": "NotTriggerScaleUp", "message": "1 max node group size reached"}])
    assert "max node group size reached" in refused.message
    both = [{"reason": "TriggeredScaleUp", "message": "pool 0->1"}, {"reason": "FailedScaleUp", "message": "out of stock"}]
    assert "out of stock" in explain_unschedulable(text, both).message, "the latest word counts"


PULLS = [
    ('failed to resolve reference "r/x": r/x: not found', "has no"),
    ("pull access denied, repository does not exist or may require authorization", "does not let"),
    ("unexpected status from HEAD request: 401 Unauthorized", "does not let"),
    ("no match for platform in manifest: not found", "architecture"),
    ("dial tcp: lookup r on 10.0.0.2:53: no such host", "does not reach"),
    ("x509: certificate signed by unknown authority", "does not reach"),
    ("", "says no more"),
]


@pytest.mark.parametrize(("text", "told"), PULLS)
def test_why_an_image_is_not_pulled(text: str, told: str) -> None:
    cause = explain_pull(text, "r/x")
    assert cause.reason is FailureReason.IMAGE
    assert told in cause.message
    assert cause.hint


NO_KEYS = {"reason": "CreateContainerConfigError", "message": 'secret "keys" not found'}


def test_other_waits() -> None:
    assert explain_waiting("ContainerCreating", "", "i", []) is None
    assert explain_waiting("PodInitializing", "", "i", []) is None
    wrong = explain_waiting("InvalidImageName", "", "A B", [])
    secret = parse_status(native(job(), pod("Pending", containerStatuses=[{"state": {"waiting": NO_KEYS}}])))
    assert wrong is not None
    assert wrong.reason is FailureReason.IMAGE
    assert "kubectl create secret generic keys -n n --from-literal=AWS_ACCESS_KEY_ID=... --from" in secret.hint


CREATES = [
    (
        'pods "p" is forbidden: exceeded quota: q, requested: requests.cpu=1, used: requests.cpu=0, limited: requests.cpu=1',
        FailureReason.QUOTA,
    ),
    ('error looking up service account n/missing: serviceaccount "missing" not found', FailureReason.CONFIG),
    ('pods "p" is forbidden: violates PodSecurity "restricted:latest": host namespaces (hostNetwork=true)', FailureReason.CONFIG),
    ('pods "p" is forbidden: no PriorityClass with name high was found', FailureReason.CONFIG),
    ('pods "p" is forbidden: maximum memory usage per Pod is 1Gi, but limit is 8Gi', FailureReason.QUOTA),
    ("something else", FailureReason.CONFIG),
]


@pytest.mark.parametrize(("text", "reason"), CREATES)
def test_why_no_pod_is_made(text: str, reason: FailureReason) -> None:
    cause = explain_failed_create(text)
    assert cause.reason is reason
    assert cause.hint


ENDS: list[tuple[dict[str, Any], FailureReason | None]] = [
    (pod("Failed", container={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}), FailureReason.OUT_OF_MEMORY),
    (pod("Failed", container={"terminated": {"exitCode": 137, "reason": "OOMKilled"}}, conditions=[DRAINED]), FailureReason.OUT_OF_MEMORY),
    (pod("Failed", container={"terminated": {"exitCode": 75}}, conditions=[DRAINED]), FailureReason.PREEMPTED),
    (pod("Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage."), FailureReason.PREEMPTED),
    (pod("Failed", container={"terminated": {"exitCode": 137, "reason": "ContainerStatusUnknown"}}), FailureReason.INFRASTRUCTURE),
    (pod("Failed", container={"terminated": {"exitCode": 137, "reason": "Error"}}), FailureReason.INFRASTRUCTURE),
    (pod("Failed", container={"terminated": {"exitCode": 128, "reason": "StartError", "message": "exec: not found"}}), FailureReason.IMAGE),
    (pod("Failed", container={"terminated": {"exitCode": 255, "message": "exec format error"}}), FailureReason.IMAGE),
    (pod("Failed", container={"terminated": {"exitCode": 65, "message": "bad data. Next: mend it"}}), FailureReason.DATA),
    (pod("Failed", reason="UnexpectedAdmissionError", message="no device"), FailureReason.INFRASTRUCTURE),
    (pod("Failed", reason="DeadlineExceeded"), None),
    (pod("Succeeded", container={"terminated": {"exitCode": 0}}), None),
]


@pytest.mark.parametrize(("ended", "reason"), ENDS)
def test_how_a_pod_ended(ended: dict[str, Any], reason: FailureReason | None) -> None:
    cause = explain_end(ended)
    assert (cause.reason if cause is not None else None) is reason
