"""The record of a run: the objects under ``<output_uri>/<run_id>/``. It *is* the truth about a run.

Any process on any machine that reads it can go on; Prefect's database may be wiped at any time. What
two writers could both write (the request, an attempt's plan, its outcome) is created only once, and
the loser reads the winner's.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from pydantic import AwareDatetime, Field, JsonValue

from blocks.credentials import AccessRef
from blocks.errors import ConfigError, PlanChanged, RunNotFound
from blocks.job import FailureReason, JobRef, JobState, JobStatus, Plan, Result, TrainRequest, WatchPolicy, fingerprint
from trainer.contract import STORED, AttemptLayout, DatasetRef, RunLayout, StoredRecord, TrainyardError, utc_now
from trainer.dataset import DatasetIndex, added_files, changed_files
from trainer.storage import ObjectFolder, to_uri

Record = TypeVar("Record", bound=StoredRecord)


class RunFile(StoredRecord):
    """``run.json``: what was asked, by whom, and how to reach the provider without Prefect."""

    run_id: str
    name: str
    request: dict[str, JsonValue]
    request_hash: str
    provider: str
    settings: dict[str, JsonValue] = Field(description="The provider's settings; credentials only by reference.")
    owner: str
    flow_run_id: str = ""
    created_at: AwareDatetime = Field(default_factory=utc_now)
    versions: dict[str, str] = Field(default_factory=dict)
    watch: WatchPolicy = WatchPolicy()

    def asked(self) -> TrainRequest:
        """The request, whichever version wrote it: what this one does not know is kept."""
        return TrainRequest.model_validate(self.request, context=STORED)

    def current_hash(self) -> str:
        """The request's hash as this version makes it: a field that is new, with its default, changes nothing."""
        return request_hash(self.asked())


class Outcome(StoredRecord):
    """``outcome.json``: how an attempt ended. Its existence closes the attempt."""

    state: JobState
    reason: FailureReason | None = None
    message: str = ""
    hint: str = ""
    exit_code: int | None = None
    epoch: int = 0
    result: Result | None = None
    status: JobStatus | None = None
    closed_at: AwareDatetime = Field(default_factory=utc_now)

    @classmethod
    def of(cls, status: JobStatus, result: Result | None) -> Self:
        return cls(
            state=status.state,
            reason=status.reason,
            message=status.message,
            hint=status.hint,
            exit_code=status.exit_code,
            epoch=status.progress.epoch if status.progress else 0,
            result=result,
            status=status,
        )


class CancelRequest(StoredRecord):
    """``cancel.json``: who wants which attempt stopped. A later attempt, started by `resume`, is not meant."""

    attempt: int
    asked_by: str
    why: str = ""
    reason: FailureReason | None = Field(default=None, description="Where a limit asked: what the attempt failed of. None: a wish.")
    hint: str = ""
    asked_at: AwareDatetime = Field(default_factory=utc_now)


class Receipt(StoredRecord):
    """Proof of a stop: who asked, when, and what was over when."""

    asked_by: str
    asked_at: AwareDatetime
    why: str = ""
    state: JobState
    native_id: str
    ended_at: AwareDatetime
    cost_usd: float | None = None


class Event(StoredRecord):
    kind: str
    message: str
    data: dict[str, JsonValue] = Field(default_factory=dict)
    at: AwareDatetime = Field(default_factory=utc_now)


class RunRecord:
    """Reads and writes one run's record."""

    def __init__(self, output_uri: str, run_id: str, access: AccessRef = AccessRef()) -> None:  # noqa: B008 - frozen
        self.output_uri = to_uri(output_uri)
        self.run_id = run_id
        self.access = access

    @property
    def uri(self) -> str:
        return f"{self.output_uri}/{self.run_id}"

    @property
    def folder(self) -> ObjectFolder:
        return ObjectFolder(self.uri, self.access.resolve(self.uri))

    def _read(self, name: str, kind: type[Record]) -> Record | None:
        data = self.folder.get(name)
        return None if data is None else kind.model_validate_json(data)

    def _create(self, name: str, value: StoredRecord) -> bool:
        return self.folder.create(name, value.model_dump_json(indent=1).encode())

    def open(self, run: RunFile) -> RunFile:
        """Writes `run.json` or returns the one that is there. Raises PlanChanged where that one asks for something else."""
        if self._create(RunLayout.RUN, run):
            return run
        stored = self.run()
        if stored.current_hash() != run.request_hash:
            raise PlanChanged(
                f"run {self.run_id} exists and asks for something else: {describe_difference(stored.request, run.request)}",
                run_id=self.run_id,
                hint="use another run key, or the same request",
            )
        return stored

    def exists(self) -> bool:
        return self.folder.get(RunLayout.RUN) is not None

    def run(self) -> RunFile:
        run = self._read(RunLayout.RUN, RunFile)
        if run is None:
            raise RunNotFound(f"there is no run {self.run_id!r} in {self.output_uri}")
        return run

    def dataset(self) -> DatasetIndex | None:
        return self._read(RunLayout.DATASET, DatasetIndex)

    def dataset_ref(self) -> DatasetRef:
        """Raises RunNotFound where the run has no dataset, which is written before `run.json`."""
        source = self._read(RunLayout.SOURCE, DatasetRef)
        if source is not None:
            return source
        index = self.dataset()
        if index is None:
            raise RunNotFound(f"the record of run {self.run_id} lacks its dataset index", hint="start a new run")
        return DatasetRef(
            root=index.root,
            index_uri=f"{self.uri}/{RunLayout.DATASET}",
            version=index.version,
            name=index.name,
            image_count=len(index.images),
        )

    def write_dataset(self, index: DatasetIndex) -> str:
        """Stores the checked index unless one is there; returns its URI."""
        self.folder.create(RunLayout.DATASET, index.model_dump_json().encode())
        return f"{self.uri}/{RunLayout.DATASET}"

    def write_source(self, source: DatasetRef) -> None:
        """Stores which version of which store the run trains on, unless that is written."""
        self._create(RunLayout.SOURCE, source)

    def attempts(self) -> list[int]:
        return sorted(int(name) for name in self.folder.names(RunLayout.ATTEMPTS) if name.isdigit() and self.plan(int(name)))

    def attempt_uri(self, attempt: int) -> str:
        return f"{self.uri}/{RunLayout.ATTEMPTS}/{attempt}"

    def _name(self, attempt: int, name: str) -> str:
        return f"{RunLayout.ATTEMPTS}/{attempt}/{name}"

    def plan(self, attempt: int) -> Plan | None:
        return self._read(self._name(attempt, AttemptLayout.PLAN), Plan)

    def write_plan(self, plan: Plan) -> Plan:
        """The intent and the lock: the first of several writers wins, and all go on with that plan."""
        if self._create(self._name(plan.spec.attempt, AttemptLayout.PLAN), plan):
            return plan
        stored = self.plan(plan.spec.attempt)
        assert stored is not None, "a plan is never removed"
        return stored

    def ref(self, attempt: int) -> JobRef | None:
        return self._read(self._name(attempt, AttemptLayout.REF), JobRef)

    def write_ref(self, ref: JobRef) -> None:
        self._create(self._name(ref.attempt, AttemptLayout.REF), ref)

    def outcome(self, attempt: int) -> Outcome | None:
        return self._read(self._name(attempt, AttemptLayout.OUTCOME), Outcome)

    def write_outcome(self, attempt: int, outcome: Outcome) -> Outcome:
        """Closes the attempt; returns the outcome that stands, which another process may have written first."""
        if self._create(self._name(attempt, AttemptLayout.OUTCOME), outcome):
            return outcome
        stored = self.outcome(attempt)
        assert stored is not None, "an outcome is never removed"
        return stored

    def receipt(self, attempt: int) -> Receipt | None:
        return self._read(self._name(attempt, AttemptLayout.RECEIPT), Receipt)

    def write_receipt(self, attempt: int, receipt: Receipt) -> None:
        self._create(self._name(attempt, AttemptLayout.RECEIPT), receipt)

    def cancel_request(self, attempt: int) -> CancelRequest | None:
        request = self._read(RunLayout.CANCEL, CancelRequest)
        return request if request is not None and request.attempt == attempt else None

    def request_cancel(self, request: CancelRequest) -> None:
        """The first to ask for this attempt stands."""
        if self.cancel_request(request.attempt) is None:
            self.folder.put(RunLayout.CANCEL, request.model_dump_json(indent=1).encode())

    def add_event(self, kind: str, message: str, **data: JsonValue) -> None:
        event = Event(kind=kind, message=message, data=data)
        stamp = event.at.strftime("%Y%m%dT%H%M%S.%fZ")
        self._create(f"{RunLayout.EVENTS}/{stamp}-{secrets.token_hex(3)}.json", event)

    def events(self) -> list[Event]:
        found = (self._read(f"{RunLayout.EVENTS}/{name}", Event) for name in self.folder.names(RunLayout.EVENTS))
        return [event for event in found if event is not None]


def request_hash(request: TrainRequest) -> str:
    """Equal for requests that train the same thing in the same place."""
    return fingerprint(request.model_dump(mode="json", exclude={"name"}))


def describe_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """The fields in which two requests differ, as `field: old -> new`."""
    parts: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            parts += (
                [describe_difference(cast("Mapping[str, Any]", before), cast("Mapping[str, Any]", after), f"{prefix}{key}.")]
                if before != after
                else []
            )
        elif before != after:
            parts.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return "; ".join(parts)


def describe_dataset_change(record: RunRecord, source: Path) -> str:
    """What changed in the dataset at `source` since the run read it; empty where nothing did, or where it is not on this machine."""
    index = record.dataset()
    if index is None or not source.exists():
        return ""
    if changed := changed_files(index, Path(index.root)):
        return f"{_name_some(changed)} changed"
    try:
        added = added_files(index, source)
    except TrainyardError as exc:
        return f"the dataset changed ({exc.message})"
    return f"{_name_some(added)} came to the dataset" if added else ""


def _name_some(paths: list[str]) -> str:
    return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]


def check_run_id(run_id: str) -> str:
    """`run_id` if it can name a folder and a job on every platform. Raises ConfigError otherwise."""
    import re

    if not re.fullmatch(r"[a-z0-9]{4,40}", run_id):
        raise ConfigError(f"{run_id!r} is no run id", hint="4 to 40 lower-case letters and digits; or leave it out to get one")
    return run_id
