"""Kubernetes as a provider: an attempt is a batch/v1 Job, on any cluster.

Idempotency: the Job's name, `ty-<run>-<attempt>`. Before it is created, a note in the attempt's folder says so; a Job that is no
longer there although the note is old, or although the trainer has written, was removed (by its time to live, or by hand) and is
never created again. Cancel suspends the Job, and deletes it once no pod is left and the record tells of its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any, ClassVar, cast
from urllib.parse import quote

from pydantic import JsonValue

from blocks.attempt_objects import count_containers, read_exit, read_log, read_progress, write_job
from blocks.errors import ConfigError, JobNotFound, ProviderError
from blocks.job import Capabilities, CheckReport, JobRef, JobSpec, JobStatus, LogBatch, Plan, Price, Problem, Waiting, seconds_between
from blocks.naming import job_name
from blocks.provider import AlreadyExists, Provider
from blocks.providers.kubernetes_check import EXAMPLE_IMAGE, Check
from blocks.providers.kubernetes_client import MERGE_PATCH, ApiError, Cluster, NoAnswer, find_exposure, made_elsewhere, translate
from blocks.providers.kubernetes_logs import LogCursor, place_in_log, pods_to_read, read_pod
from blocks.providers.kubernetes_objects import Object, by_age, child, children, is_alive, is_over, word
from blocks.providers.kubernetes_refs import SUBMISSION, Submission, build_ref, parse_ref, read_submission, refuse_stranger
from blocks.providers.kubernetes_request import (
    CANCELLED_AT,
    FATAL,
    STARTED_AT,
    build_request,
    deadline_seconds,
    set_image,
    with_fingerprint,
    without_volatile,
)
from blocks.providers.kubernetes_settings import NAME, KubernetesSettings, find_price
from blocks.providers.kubernetes_status import Native, find_start, may_be_removed, parse_status, status_of_orphan, status_of_vanished
from blocks.store_check import check_store
from trainer.contract import AttemptLayout, TrainJob, UserInput, utc_now
from trainer.storage import ObjectFolder

PAGE = "500"


class KubernetesProvider(Provider[KubernetesSettings]):
    NAME: ClassVar[str] = NAME
    SETTINGS: ClassVar[type[UserInput]] = KubernetesSettings
    PRICE_HINT: ClassVar[str] = "give the profile an instance class with usd_per_hour, or with the machine of the price list"
    CAPABILITIES: ClassVar[Capabilities] = Capabilities(
        spot=True, nodes=1, needs_image=True, max_runtime_seconds=28 * 86_400, poll_seconds=(2.0, 30.0)
    )

    @cached_property
    def cluster(self) -> Cluster:
        return Cluster(self.settings)

    def check(self, output_uri: str = "") -> CheckReport:
        report = Check(self.cluster, self.settings).report()
        if not output_uri:
            return report
        return report.model_copy(update={"lines": (*report.lines, check_store(self.objects(output_uri)))})

    def check_plan(self, plan: Plan) -> None:
        """Has the API server look at the Job without creating it: schema, rights, quota, admission. Raises as `submit` would.

        A draft that has no image yet is shown with another name, since the server refuses a container without one.
        """
        job = with_fingerprint(plan.request, plan.fingerprint)
        if plan.spec.image is None:
            set_image(job, EXAMPLE_IMAGE)
        with self._translated(plan.spec.run_id):
            self.cluster.call("POST", self._jobs_in(plan.region), body=job, query={"dryRun": "All", **STRICT})

    def pending_limits(self) -> Mapping[Waiting, float]:
        return {Waiting.MENDING: self.settings.mending_limit_seconds, Waiting.MACHINE: self.settings.pending_limit_seconds}

    def poll(self, ref: JobRef) -> JobStatus:
        with self._translated(ref.run_id):
            objects = self.objects(ref.output_uri)
            job = self._get_job(ref.native_id, ref.scope)
            if job is None or (job["metadata"].get("deletionTimestamp") and not self._pods(ref.native_id, ref.scope)):
                return self._vanished(ref, objects)
            return parse_status(self._look(job, objects))

    def list_jobs(self) -> Iterator[tuple[JobRef, JobStatus]]:
        """Two requests per 500 jobs, and two small objects of each."""
        with self._translated():
            pods: dict[str, list[Object]] = {}
            for pod in self._list(f"/api/v1/namespaces/{self.settings.namespace}/pods", MANAGED):
                pods.setdefault(word(pod, "metadata", "labels", "batch.kubernetes.io/job-name"), []).append(pod)
            for job in self._list(self._jobs_in(self.settings.namespace), MANAGED):
                ref = parse_ref(job, self.cluster.host)
                if ref is not None:
                    yield ref, parse_status(self._look(job, self.objects(ref.output_uri), pods.get(ref.native_id, [])))

    def logs(self, ref: JobRef, cursor: str = "") -> LogBatch:
        place = LogCursor.parse(cursor)
        with self._translated(ref.run_id):
            # Asked before reading: lines written in between belong to the next batch.
            ended = self._has_ended(ref)
            if place.offset is None:
                for pod in pods_to_read(self._pods(ref.native_id, ref.scope), place):
                    lines, place, more = self._read_log(pod, ref.scope, place)
                    if lines or more:
                        return LogBatch(lines=lines, cursor=str(place), ended=False)
                    if is_alive(pod) and not ended:
                        return LogBatch(lines=(), cursor=str(place), ended=False)
            if not ended:
                return LogBatch(lines=(), cursor=str(place), ended=False)
            return self._read_object_log(ref, place)

    def cancel(self, ref: JobRef) -> None:
        """Suspends the Job: its pods get TERM, and save. Repeated when its receipt or outcome is written, it deletes the Job.

        One that ended by itself stays for its time to live: its pods are what tells how.
        """
        with self._translated(ref.run_id):
            job = self._get_job(ref.native_id, ref.scope)
            if job is None:
                with suppress(JobNotFound):  # then there is nothing to stop
                    self._vanished(ref, self.objects(ref.output_uri))
            if job is None or job["metadata"].get("deletionTimestamp"):
                return
            objects = self.objects(ref.output_uri)
            if CANCELLED_AT in child(job, "metadata", "annotations") or is_over(job):
                recorded = any(objects.get(name) is not None for name in (AttemptLayout.RECEIPT, AttemptLayout.OUTCOME))
                if may_be_removed(job, read_exit(objects), recorded=recorded) and not self._pods_alive(job, ref):
                    self._delete(ref)
                return
            objects.create(AttemptLayout.STOP, utc_now().isoformat().encode())
            noted = {CANCELLED_AT: utc_now().isoformat(timespec="seconds")}
            if began := find_start(self._look(job, objects)).since:
                noted[STARTED_AT] = began.isoformat()
            body = {"metadata": {"annotations": noted}, "spec": {"suspend": True}}
            self._tolerate_missing("PATCH", self._job_path(ref.native_id, ref.scope), body=body, content_type=MERGE_PATCH)

    def _validate(self, spec: JobSpec) -> tuple[Problem, ...]:
        problems: list[Problem] = []
        if spec.resources.region:
            hint = "leave region empty; an instance class chooses nodes"
            problems.append(Problem(field="resources.region", message="a cluster has no regions to choose", hint=hint))
        try:
            build_request(spec, self.settings)
        except ConfigError as exc:
            problems.append(Problem(field="resources", message=exc.message, hint=exc.hint))
        for name, reference in spec.secrets.items():
            if not reference.partition("/")[0]:
                problems.append(Problem(field=f"secrets.{name}", message="names no Secret", hint="write secret/key"))
        return tuple(problems)

    def _warnings(self, spec: JobSpec) -> tuple[str, ...]:
        warnings: list[str] = []
        if exposure := find_exposure(self.settings):
            warnings.append(exposure)
        if self.settings.credentials.startswith("kubernetes-cluster-config/"):
            warnings.append(
                "a KubernetesClusterConfig block keeps its tokens in a plain field; the profile's own kubeconfig field does not"
            )
        return tuple(warnings)

    def _build(self, spec: JobSpec) -> tuple[dict[str, JsonValue], str, str]:
        request, instance_class = build_request(spec, self.settings)
        return request, instance_class, self.settings.namespace

    def _price(self, spec: JobSpec, instance_type: str, region: str) -> Price | None:
        kind = self.settings.instance_classes.get(instance_type)
        return None if kind is None else find_price(instance_type, kind, spot=spec.resources.spot)

    def _attempt_seconds(self, spec: JobSpec) -> int:
        """To the Job's deadline, as if none of it were waits, and then the time to save."""
        return deadline_seconds(spec, self.settings) + math.ceil(self.settings.grace_seconds)

    def _identity(self, request: dict[str, JsonValue]) -> dict[str, JsonValue]:
        return without_volatile(request)

    def _find(self, plan: Plan) -> JobRef | None:
        spec = plan.spec
        # The plan's, which its Job names: the profile's may be another one by now.
        name, namespace = job_name(spec.run_id, spec.attempt), plan.region
        job = self._get_job(name, namespace)
        if job is None:
            objects = self.objects(spec.attempt_uri)
            note = read_submission(objects)
            if note is None or not self._was_removed(note, objects):
                return None
            job = self._get_job(name, namespace)  # what was seen of it may be of one that another submitter has just made
            if job is None:
                known = note.fingerprint, note.created_at
                return build_ref(spec.run_id, spec.attempt, name, namespace, spec.attempt_uri, *known, note.host or self.cluster.host)
        return parse_ref(job, self.cluster.host) or refuse_stranger(job)

    def _create(self, plan: Plan) -> JobRef:
        self._write_note(plan)
        try:
            job = self._post_job(plan)
        except ApiError as exc:
            if (exc.status == 409 and exc.reason == "AlreadyExists") or exc.status >= 500:
                raise AlreadyExists(exc.message) from exc
            raise
        except NoAnswer as exc:
            if exc.unsent:
                raise
            raise AlreadyExists(f"the API server's answer was lost ({exc})") from exc
        ref = parse_ref(job, self.cluster.host)
        if ref is None:  # what it lacks, something in the cluster took from it
            raise AlreadyExists(f"Job {job['metadata']['name']} is there, without the labels or annotations that it was sent with")
        return ref

    def _write_note(self, plan: Plan) -> None:
        """The config that the Job's container reads, and the word that a Job is about to be created."""
        spec = plan.spec
        objects = self.objects(spec.attempt_uri)
        config = TrainJob.model_validate({**cast("Object", plan.request["config"]), "fingerprint": plan.fingerprint})
        write_job(objects, config)
        note = Submission(
            name=job_name(spec.run_id, spec.attempt),
            namespace=plan.region,
            fingerprint=plan.fingerprint,
            keep_seconds=self.settings.keep_seconds,
            usd_per_hour=plan.price.usd_per_hour if plan.price is not None else None,
            created_at=utc_now(),
            host=self.cluster.host,
        )
        objects.create(SUBMISSION, note.model_dump_json(indent=1).encode())

    def _post_job(self, plan: Plan) -> Object:
        return self.cluster.call("POST", self._jobs_in(plan.region), body=with_fingerprint(plan.request, plan.fingerprint), query=STRICT)

    def _translate(self, exc: Exception) -> ProviderError | None:
        return translate(exc, self.settings)

    # --- The world ------------------------------------------------------------------------------------

    @staticmethod
    def _jobs_in(namespace: str) -> str:
        return f"/apis/batch/v1/namespaces/{namespace}/jobs"

    def _job_path(self, name: str, namespace: str) -> str:
        return f"{self._jobs_in(namespace or self.settings.namespace)}/{quote(name)}"

    def _get_job(self, name: str, namespace: str) -> Object | None:
        return self._tolerate_missing("GET", self._job_path(name, namespace))

    def _tolerate_missing(self, method: str, path: str, **options: Any) -> Any:
        try:
            return self.cluster.call(method, path, **options)
        except ApiError as exc:
            if exc.is_missing:
                return None
            raise

    def _list(self, path: str, selector: str) -> Iterator[Object]:
        going_on = ""
        while True:
            query = {"labelSelector": selector, "limit": PAGE, **({"continue": going_on} if going_on else {})}
            page = self.cluster.call("GET", path, query=query)
            yield from children(page, "items")
            going_on = word(page, "metadata", "continue")
            if not going_on:
                return

    def _pods(self, job: str, namespace: str) -> list[Object]:
        path = f"/api/v1/namespaces/{namespace or self.settings.namespace}/pods"
        return by_age(list(self._list(path, f"batch.kubernetes.io/job-name={job}")))

    def _events(self, namespace: str, names: list[str]) -> list[Object]:
        """What the cluster said of these objects, oldest first; nothing where that may not be read."""
        found: list[Object] = []
        for name in names:
            try:
                answer = self.cluster.call(
                    "GET", f"/api/v1/namespaces/{namespace}/events", query={"fieldSelector": f"involvedObject.name={name}", "limit": PAGE}
                )
            except ApiError as exc:
                if exc.status == 403:
                    return []
                raise
            found += children(answer, "items")
        return sorted(found, key=lambda event: word(event, "lastTimestamp") or word(event, "eventTime"))

    def _look(self, job: Object, objects: ObjectFolder, pods: list[Object] | None = None) -> Native:
        name, namespace = job["metadata"]["name"], job["metadata"]["namespace"]
        known = self._pods(name, namespace) if pods is None else by_age(pods)
        pending = [pod["metadata"]["name"] for pod in known if word(pod, "status", "phase") == "Pending"]
        waits = not is_over(job) and not job["spec"].get("suspend") and (not known or bool(pending))
        return Native(
            job=job,
            pods=known,
            events=self._events(namespace, pending or [name]) if waits else [],
            progress=read_progress(objects),
            ended=read_exit(objects),
            now=utc_now(),
        )

    def _vanished(self, ref: JobRef, objects: ObjectFolder) -> JobStatus:
        """What its pods and the bucket say of a Job that is not there. Where that is nothing: JobNotFound, or `made_elsewhere`."""
        if alive := [pod for pod in self._pods(ref.native_id, ref.scope) if is_alive(pod)]:
            return status_of_orphan(alive[-1], read_progress(objects))
        note, ended = read_submission(objects), read_exit(objects)
        over = (ended is not None and ended.exit_code in (0, *FATAL)) or objects.get(AttemptLayout.RECEIPT) is not None
        if not over and not ref.console_url.startswith(f"{self.cluster.host}/"):  # after any other exit, its Job makes another pod
            raise made_elsewhere(ref.native_id, ref.console_url.partition("/apis/")[0], self.cluster.host)
        status = status_of_vanished(
            ended,
            read_progress(objects),
            stopped=objects.get(AttemptLayout.STOP) is not None,
            price=note.usd_per_hour if note is not None else None,
            made_at=note.created_at if note is not None and count_containers(objects) > 1 else None,
        )
        if status is None:
            raise JobNotFound(
                f"namespace {ref.scope} has no Job {ref.native_id}, and it left no word of its end",
                hint="it was deleted, or its time to live ended; the run goes on from its last checkpoint in a new attempt",
            )
        return status

    def _was_removed(self, note: Submission, objects: ObjectFolder) -> bool:
        """Whether a Job that is not there has been: its trainer wrote, its time to live may have ended, or the cluster tells of it.

        Raises `made_elsewhere` where another address was asked to make it, and nothing tells whether it did.
        """
        written = any(objects.get(name) is not None for name in (AttemptLayout.EXIT, AttemptLayout.PROGRESS, AttemptLayout.STOP))
        if not written and note.host not in ("", self.cluster.host):
            raise made_elsewhere(note.name, note.host, self.cluster.host)
        if written or seconds_between(note.created_at, utc_now()) >= note.keep_seconds:
            return True
        # Events outlive their object, by default for an hour: those of a Job that a hand deleted before its trainer said a word.
        return bool(self._events(note.namespace, [note.name]))

    def _has_ended(self, ref: JobRef) -> bool:
        job = self._get_job(ref.native_id, ref.scope)
        if job is None:
            try:  # it may run on, in another cluster, or its pod may not have ended
                return self._vanished(ref, self.objects(ref.output_uri)).state.is_terminal
            except JobNotFound:
                return True
        stopped = CANCELLED_AT in child(job, "metadata", "annotations")
        return is_over(job) or (stopped and not self._pods_alive(job, ref))

    def _pods_alive(self, job: Object, ref: JobRef) -> bool:
        status = child(job, "status")
        if status.get("active") or status.get("terminating"):
            return True
        return any(map(is_alive, self._pods(ref.native_id, ref.scope)))

    def _delete(self, ref: JobRef) -> None:
        body = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        self._tolerate_missing("DELETE", self._job_path(ref.native_id, ref.scope), body=body)

    def _read_log(self, pod: Object, namespace: str, place: LogCursor) -> tuple[tuple[str, ...], LogCursor, bool]:
        metadata = pod["metadata"]
        path = f"/api/v1/namespaces/{namespace or self.settings.namespace}/pods/{metadata['name']}/log"

        def fetch(query: dict[str, str]) -> bytes:
            try:
                return self.cluster.read("GET", path, query=query)
            except ApiError as exc:
                # No container yet, its node does not answer, or the pod is gone: there is nothing to read.
                if exc.status in (400, 404, 500, 502, 503, 504):
                    return b""
                raise

        return read_pod(fetch, metadata["uid"], place)

    def _read_object_log(self, ref: JobRef, place: LogCursor) -> LogBatch:
        """What the pods no longer tell: the log that the trainer kept in the bucket."""
        objects = self.objects(ref.output_uri)
        offset = place_in_log(objects.get(AttemptLayout.LOG) or b"", place) if place.offset is None else place.offset
        batch = read_log(objects, str(offset), ended=True)
        return batch.model_copy(update={"cursor": str(place.model_copy(update={"offset": int(batch.cursor)}))})


MANAGED = "app.kubernetes.io/managed-by=trainyard"
STRICT = {"fieldValidation": "Strict"}
