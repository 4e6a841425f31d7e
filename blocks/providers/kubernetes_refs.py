"""Where a Job of ours is, and the note in the attempt's folder that says that it is about to be there."""

from __future__ import annotations

from datetime import datetime

from pydantic import AwareDatetime, Field

from blocks.errors import ConfigError
from blocks.job import JobRef
from blocks.providers.kubernetes_objects import Object, child, time_at, word
from blocks.providers.kubernetes_request import FINGERPRINT, OUTPUT
from blocks.providers.kubernetes_settings import NAME, OWN_PREFIX
from trainer.contract import StoredRecord, utc_now
from trainer.storage import ObjectFolder

SUBMISSION = "submission.json"


class Submission(StoredRecord):
    """``submission.json`` of an attempt: a Job of this name is about to be created, once."""

    name: str
    namespace: str
    fingerprint: str
    keep_seconds: int
    usd_per_hour: float | None = None
    created_at: AwareDatetime
    host: str = Field(default="", description="Address of the API server that is asked to create it.")


def parse_ref(job: Object, host: str) -> JobRef | None:
    """Where a Job of ours is; None for another's."""
    metadata = job["metadata"]
    annotations = child(metadata, "annotations")
    run_id, attempt = (word(metadata, "labels", f"{OWN_PREFIX}{name}") for name in ("run-id", "attempt"))
    if not (run_id and attempt and OUTPUT in annotations and FINGERPRINT in annotations):
        return None
    created = time_at(metadata, "creationTimestamp") or utc_now()
    return build_ref(
        run_id, int(attempt), metadata["name"], metadata["namespace"], annotations[OUTPUT], annotations[FINGERPRINT], created, host
    )


def build_ref(
    run_id: str, attempt: int, name: str, namespace: str, output_uri: str, fingerprint: str, created: datetime, host: str
) -> JobRef:
    return JobRef(
        provider=NAME,
        native_id=name,
        run_id=run_id,
        attempt=attempt,
        scope=namespace,
        output_uri=output_uri,
        fingerprint=fingerprint,
        submitted_at=created,
        console_url=f"{host}/apis/batch/v1/namespaces/{namespace}/jobs/{name}",
    )


def refuse_stranger(job: Object) -> JobRef:
    name = job["metadata"]["name"]
    raise ConfigError(f"a Job {name} is there that Trainyard has not made", hint=f"kubectl delete job {name}, if nobody needs it")


def read_submission(objects: ObjectFolder) -> Submission | None:
    data = objects.get(SUBMISSION)
    return Submission.model_validate_json(data) if data else None
