"""One Job per attempt, whatever the API server says when it is asked again. It is a small one of the tests' own; the bucket is S3's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from prefect.logging import disable_run_logger

from blocks.errors import AuthError, ConfigError, RunCancelled, ServiceUnavailable
from blocks.job import FailureReason, JobRef, JobState, Plan
from blocks.providers.kubernetes_job import KubernetesProvider
from blocks.record import CancelRequest, RunFile, RunRecord
from flows.job_tasks import submit_job
from flows.reconcile import tend
from tests.faults import Fault, FaultProxy, running_proxy
from tests.kubernetes_api import KubernetesApi, running_api, status_of
from tests.stores import StoreServer, new_store
from tests.unit.test_blocks_kubernetes_request import make_spec
from trainer.contract import EXIT_REASONS, AttemptLayout, ExitCode, ExitRecord, utc_now

NAMESPACE = "vision"


@dataclass
class Place:
    """A cluster, a proxy before it, and the record of a run there whose first attempt is planned."""

    api: KubernetesApi
    proxy: FaultProxy
    record: RunRecord
    plan: Plan = field(init=False)

    def __post_init__(self) -> None:
        self.plan = self.record.write_plan(self.make_plan())

    def make_plan(self, attempt: int = 1) -> Plan:
        store = make_spec().dataset.model_copy(update={"store_uri": f"{self.record.output_uri}/data"})
        spec = make_spec(run_id=self.record.run_id, attempt=attempt, output_uri=self.record.output_uri, dataset=store)
        return self.provider().plan(spec)

    def provider(self, **changes: Any) -> KubernetesProvider:
        settings = {"api_server": self.proxy.address, "token": "t", "namespace": NAMESPACE, **changes}
        return KubernetesProvider.from_settings(settings)

    def submit(self, provider: KubernetesProvider | None = None, plan: Plan | None = None) -> JobRef:
        """As the flow does."""
        with disable_run_logger():
            return submit_job.fn(provider or self.provider(), self.record, plan or self.plan)

    def end(self, exit_code: int) -> None:
        """As the trainer's last word."""
        word = ExitRecord(exit_code=exit_code, reason=EXIT_REASONS.get(exit_code), started_at=utc_now(), ended_at=utc_now())
        self.record.folder.put(f"attempts/1/{AttemptLayout.EXIT}", word.model_dump_json().encode())

    @property
    def name(self) -> str:
        return f"ty-{self.record.run_id}-1"


@pytest.fixture
def place(s3: StoreServer, monkeypatch: pytest.MonkeyPatch, no_cloud: None) -> Iterator[Place]:
    store = new_store(s3, monkeypatch)
    with running_api() as api, running_proxy(api.address) as proxy:
        yield Place(api, proxy, RunRecord(store, "once1234"))


def test_a_login_that_ends_does_not_close_the_attempt_whose_job_trains(place: Place) -> None:
    """The flow died before it wrote down which Job it had made."""
    made = place.provider().submit(place.plan)
    place.proxy.add(Fault("refuse", "GET", "/jobs/ty-", status=401))
    with pytest.raises(AuthError):
        place.submit()
    assert place.record.outcome(1) is None
    assert place.submit() == made == place.record.ref(1)
    assert place.api.created == [f"{NAMESPACE}/{place.name}"]


def test_a_job_that_was_refused_closes_the_attempt(place: Place) -> None:
    place.api.refusal = status_of(403, "Forbidden", "jobs.batch is forbidden: no right")
    with pytest.raises(AuthError, match="not allowed to create jobs"):
        place.submit()
    outcome = place.record.outcome(1)
    assert outcome is not None
    assert (outcome.state, place.api.created) == (JobState.FAILED, [])


def test_a_job_that_the_cluster_changed_out_of_sight_is_no_refusal(place: Place) -> None:
    place.api.strips_annotations = True
    with pytest.raises(ConfigError, match="has not made"):
        place.submit()
    assert place.record.outcome(1) is None, "it trains"


def test_a_wish_to_stop_finds_the_job_that_nobody_wrote_down(place: Place) -> None:
    place.provider().submit(place.plan)
    place.record.request_cancel(CancelRequest(attempt=1, asked_by="me"))
    assert place.submit().native_id == place.name
    receipt = place.record.receipt(1)
    assert receipt is not None
    assert (receipt.state, place.api.jobs) == (JobState.CANCELLED, {})


def test_a_job_that_nobody_wrote_down_is_found_when_the_login_is_mended(place: Place) -> None:
    """By then the flow has been restarted as often as it may."""
    settings = place.provider().settings.model_dump(mode="json")
    run = RunFile(run_id="once1234", name="n", request={}, request_hash="", provider="kubernetes", settings=settings, owner="me")
    place.record.open(run)
    assert tend(place.record, run) == []
    made = place.provider().submit(place.plan)
    place.proxy.add(Fault("refuse", "GET", "/jobs/ty-", status=401))
    with pytest.raises(AuthError):
        tend(place.record, run)
    assert tend(place.record, run) == []
    assert place.record.ref(1) == made
    place.api.jobs.clear()
    place.end(ExitCode.DATA)
    assert tend(place.record, run) == ["run once1234: closed, failed"]


def test_a_wish_to_stop_what_was_never_submitted_needs_no_job(place: Place) -> None:
    place.record.request_cancel(CancelRequest(attempt=1, asked_by="me"))
    with pytest.raises(RunCancelled, match="by me before it was submitted"):
        place.submit()
    outcome = place.record.outcome(1)
    assert outcome is not None
    assert (outcome.state, place.api.created) == (JobState.CANCELLED, [])


def test_a_job_that_another_cluster_may_have_is_not_made_in_this_one(place: Place) -> None:
    """The flow died before it wrote down where, and the context is another one now: two Jobs would take the attempt from each other."""
    place.provider().submit(place.plan)
    with running_api() as other:
        elsewhere = place.provider(api_server=other.address)
        with pytest.raises(ConfigError, match=f"was made at {place.proxy.address}: that may be another cluster"):
            place.submit(elsewhere)
        assert (other.created, place.record.outcome(1)) == ([], None)
        place.end(0)
        ref = place.submit(elsewhere)
        assert ref.console_url.startswith(place.proxy.address)
        assert (other.created, elsewhere.poll(ref).state) == ([], JobState.SUCCEEDED)


def test_the_namespace_is_the_plans_whatever_the_profile_says_by_now(place: Place) -> None:
    moved = place.provider(namespace="other")
    moved.check_plan(place.plan)
    place.api.refusal = status_of(403, "Forbidden", "jobs.batch is forbidden: no right")
    with pytest.raises(AuthError, match=f"create jobs in namespace {NAMESPACE}"):
        moved.submit(place.plan)
    place.api.refusal = None
    ref = place.submit(moved)
    assert (ref.scope, place.api.created) == (NAMESPACE, [f"{NAMESPACE}/{place.name}"])
    assert moved.find(place.plan) == ref


def test_a_wish_to_stop_between_two_attempts_keeps_the_next_one_from_being_submitted(place: Place) -> None:
    """It came when nothing ran, and the next attempt was planned by a flow that had looked before."""
    place.record.request_cancel(CancelRequest(attempt=1, asked_by="me"))
    second = place.record.write_plan(place.make_plan(2))
    with pytest.raises(RunCancelled, match="by me before it was submitted"):
        place.submit(plan=second)
    assert place.api.created == []


def test_a_404_of_a_proxy_is_no_missing_job(place: Place) -> None:
    ref = place.submit()
    place.proxy.add(Fault("refuse", "GET", "/jobs/ty-", status=404, times=2))
    for ask in (lambda: place.provider().observe(ref), lambda: place.provider().submit(place.plan)):
        with pytest.raises(ServiceUnavailable, match="in place of the API server"):
            ask()
    assert place.provider().observe(ref).state is JobState.QUEUED
    assert len(place.api.created) == 1


def test_nothing_follows_a_deleted_job_as_long_as_its_pod_lives(place: Place) -> None:
    ref, provider = place.submit(), place.provider()
    metadata = {"name": "p", "uid": "u", "namespace": NAMESPACE, "labels": {"batch.kubernetes.io/job-name": place.name}}
    pod: dict[str, Any] = {"metadata": metadata, "spec": {"nodeName": "n1"}, "status": {"phase": "Running"}}
    place.api.pods, place.api.jobs = [pod], {}
    place.end(ExitCode.PREEMPTED)  # an earlier pod's
    alive = provider.observe(ref)
    assert (alive.state, "its pod on n1 has not ended" in alive.message) == (JobState.STOPPING, True)
    assert "kubectl delete pod p" in alive.hint
    assert not provider.logs(ref).ended
    pod["metadata"]["deletionTimestamp"] = "2026-11-24T12:00:00Z"
    assert "kubectl delete node n1" in provider.observe(ref).hint
    pod["status"] = {"phase": "Failed"}
    over = provider.observe(ref)
    assert (over.state, over.reason) == (JobState.FAILED, FailureReason.PREEMPTED)
    assert provider.logs(ref).ended


def test_an_end_after_which_a_job_goes_on_is_none_where_the_job_may_be_elsewhere(place: Place) -> None:
    ref, stop = place.submit(), f"attempts/1/{AttemptLayout.STOP}"
    with running_api() as other:
        elsewhere = place.provider(api_server=other.address)
        for code in (None, ExitCode.PREEMPTED, ExitCode.UNAVAILABLE):
            if code is not None:
                place.end(code)
            with pytest.raises(ConfigError, match="may be another cluster"):
                elsewhere.observe(ref)
        place.record.folder.put(stop, b"")
        with pytest.raises(ConfigError, match="may be another cluster"):
            elsewhere.observe(ref)
        place.end(ExitCode.DATA)
        assert elsewhere.observe(ref).state is JobState.CANCELLED, "asked to stop, and over"
