"""The one interface between a run and the place where its job runs. Start with ``providers/local_process.py``.

No verb sleeps, loops over time, or retries: the flow does. Every verb may be repeated. An author of a
provider writes `settings`, `CAPABILITIES`, a pure `build_request` and `parse_status`, and thin I/O
(`_find`, `_create`, `poll`, `list_jobs`, `logs`, `cancel`); the rest is written once, here and, of what
the trainer leaves in the run's record, in `blocks/attempt_objects.py`.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, Self, TypeVar

from pydantic import JsonValue, ValidationError

from blocks.attempt_objects import parse_exit, read_exit, read_progress
from blocks.credentials import AccessRef
from blocks.errors import (
    AuthError,
    ConfigError,
    JobNotFound,
    PlanChanged as PlanChangedError,
    ProviderError,
    QuotaError,
    ResultMissing,
    ServiceUnavailable,
)
from blocks.job import (
    Capabilities,
    CheckReport,
    FailureReason,
    JobRef,
    JobSpec,
    JobState,
    JobStatus,
    LogBatch,
    Plan,
    Price,
    Problem,
    Result,
    Waiting,
    canonical_json,
    fingerprint,
    seconds_between,
)
from blocks.pricing import find_budget_problems, lookup_price, worst_case_usd
from trainer.contract import AttemptLayout, ManifestFile, ResultManifest, UserInput
from trainer.storage import ObjectFolder, is_bucket

Settings = TypeVar("Settings", bound=UserInput)


class AlreadyExists(Exception):
    """Raised by `_create` where the key is taken, or where the answer leaves open whether it created."""


class Provider(ABC, Generic[Settings]):
    NAME: ClassVar[str]
    CAPABILITIES: ClassVar[Capabilities]
    SETTINGS: ClassVar[type[UserInput]]
    PRICE_HINT: ClassVar[str] = "choose a machine that prices.json knows"  # where a limit needs a price that is not known

    def __init__(self, settings: Settings, access: AccessRef | None = None) -> None:
        self.settings = settings
        self.access = access or AccessRef()

    @classmethod
    def from_settings(cls, values: dict[str, Any], access: AccessRef | None = None) -> Self:
        """Raises ConfigError naming every field that does not fit."""
        try:
            return cls(cls.SETTINGS.model_validate(values), access)  # type: ignore[arg-type]
        except ValidationError as exc:
            # Not chained: pydantic's own text shows what was given.
            raise ConfigError(describe_validation(exc), provider=cls.NAME, hint="mend the profile") from None

    def objects(self, uri: str) -> ObjectFolder:
        """The objects below a URI of the run's record, reached as the profile says."""
        return ObjectFolder(uri, self.access.resolve(uri))

    # --- What callers use ----------------------------------------------------------------------

    def validate(self, spec: JobSpec) -> tuple[Problem, ...]:
        """Pure. All problems, not the first; empty means that `plan` and `submit` may go on."""
        capabilities = self.CAPABILITIES
        problems: list[Problem] = []
        if spec.resources.spot and not capabilities.spot:
            problems.append(Problem(field="resources.spot", message=f"{self.NAME} has no spot machines", hint="leave spot off"))
        if spec.resources.nodes > capabilities.nodes:
            problems.append(
                Problem(field="resources.nodes", message=f"{self.NAME} trains on at most {capabilities.nodes} machine(s)", hint="nodes: 1")
            )
        if spec.max_runtime_seconds > capabilities.max_runtime_seconds:
            problems.append(
                Problem(
                    field="max_runtime_seconds",
                    message=f"{spec.max_runtime_seconds} s is over the limit of {self.NAME}: {capabilities.max_runtime_seconds} s",
                )
            )
        if spec.image is not None and "@sha256:" not in spec.image:
            problems.append(Problem(field="image", message=f"{spec.image!r} is not a digest", hint="name@sha256:..."))
        if not capabilities.local_files:
            problems += problems_of_places(spec, self.NAME)
        problems += self._validate(spec)
        if spec.max_cost_usd is None or problems:  # what does not fit has no machine, and so no price
            return tuple(problems)
        _, instance_type, region = self._build(spec)
        return find_budget_problems(spec, self._price(spec, instance_type, region), self._attempt_seconds(spec), self.PRICE_HINT)

    def require_valid(self, spec: JobSpec) -> None:
        """Raises ConfigError with all problems of `validate`."""
        problems = self.validate(spec)
        if problems:
            raise ConfigError(
                "; ".join(f"{problem.field}: {problem.message}" for problem in problems),
                provider=self.NAME,
                run_id=spec.run_id,
                hint="; ".join(problem.hint for problem in problems if problem.hint),
            )

    @abstractmethod
    def check(self, output_uri: str = "") -> CheckReport:
        """Live and free of charge: can this profile train here, and write there? Per line ok, or the problem and what mends it."""

    def plan(self, spec: JobSpec) -> Plan:
        """Pure given the price table. Raises ConfigError with all problems of `validate`."""
        self.require_valid(spec)
        request, instance_type, region = self._build(spec)
        price = self._price(spec, instance_type, region)
        return Plan(
            provider=self.NAME,
            spec=spec,
            instance_type=instance_type,
            region=region,
            request=request,
            price=price,
            worst_case_usd=worst_case_usd(spec, price, self._attempt_seconds(spec)),
            attempt_seconds=self._attempt_seconds(spec),
            fingerprint=fingerprint(self._identity(request)),
            warnings=self._warnings(spec),
        )

    def pending_limits(self) -> Mapping[Waiting, float]:
        """Seconds that a job may wait, by what it waits for; then the watch stops it. What is missing may be waited for any time."""
        return {}

    def check_plan(self, plan: Plan) -> None:
        """Has the provider's server look at a plan, or a draft, without creating anything. Raises as `submit` would.

        Raises ConfigError where the provider has no server that does so.
        """
        hint = f"leave --server out; `trainyard check {plan.spec.profile or self.NAME}` looks at what there is"
        raise ConfigError(f"{self.NAME} has no server that looks at a plan", provider=self.NAME, run_id=plan.spec.run_id, hint=hint)

    def submit(self, plan: Plan) -> JobRef:
        """Finds the job of this run and attempt, or creates it: at most one, however often and from wherever it is called.

        Raises PlanChanged where the job that is there was made from another request, ConfigError for a draft. Only an error that is
        `refused` says that there is no job: one of another call may hide a job that was made before.
        """
        found = self.find(plan) or self._create_or_find(plan)
        if found.fingerprint != plan.fingerprint:
            raise PlanChangedError(
                f"attempt {plan.spec.attempt} of run {plan.spec.run_id} already has a job from another request",
                provider=self.NAME,
                run_id=plan.spec.run_id,
                hint="start a new run (--new)",
            )
        return found

    def find(self, plan: Plan) -> JobRef | None:
        """The job of the plan's run and attempt, if there is one."""
        with self._translated(plan.spec.run_id):
            return self._find(plan)

    def _create_or_find(self, plan: Plan) -> JobRef:
        try:
            if self.CAPABILITIES.needs_image and plan.spec.image is None:
                raise ConfigError("this plan is a draft: it names no image", provider=self.NAME, run_id=plan.spec.run_id)
            with self._translated(plan.spec.run_id):
                return self._create(plan)
        except (AuthError, ConfigError, QuotaError) as exc:
            exc.refused = True
            raise
        except AlreadyExists as exc:
            found = self.find(plan)
            if found is None:
                raise ServiceUnavailable(f"the job was not created: {exc}", hint="the log of the attempt may tell why") from exc
            return found

    @abstractmethod
    def poll(self, ref: JobRef) -> JobStatus:
        """One observation. An unknown native word gives UNKNOWN. Raises JobNotFound where the provider knows no such job."""

    def observe(self, ref: JobRef) -> JobStatus:
        """As `poll`, but a job that the provider no longer knows is judged by the record: ended, if it said so there, else lost.

        Never is that a reason to create another job under its key.
        """
        try:
            return self.poll(ref)
        except JobNotFound as exc:
            objects = self.objects(ref.output_uri)
            ended, progress = read_exit(objects), read_progress(objects)
            if ended is not None:
                return parse_exit(ended, progress)
            reason = FailureReason.INFRASTRUCTURE
            return JobStatus(state=JobState.FAILED, native_state="lost", reason=reason, message=exc.message, progress=progress)

    @abstractmethod
    def list_jobs(self) -> Iterator[tuple[JobRef, JobStatus]]:
        """Every job of ours that this provider knows, running or not."""

    @abstractmethod
    def logs(self, ref: JobRef, cursor: str = "") -> LogBatch:
        """A bounded batch behind `cursor` (empty: from the start), without loss or repeat."""

    @abstractmethod
    def cancel(self, ref: JobRef) -> None:
        """Asks the job to stop and returns. Already ended or missing is fine.

        Asked once more when the job was stopped and its receipt or outcome is written: what is left of it may then be removed.
        """

    def collect(self, ref: JobRef, *, allow_partial: bool = False, status: JobStatus | None = None) -> Result:
        """The job's verified result. Raises ResultMissing where the manifest is absent, damaged, another attempt's, or a file differs.

        With `allow_partial`, the last checkpoint of a job that did not come to its end is a result too, if its hash is right.
        `status` tells time and cost where the job cannot be looked at; without it, it is.
        """
        folder = self.objects(ref.output_uri)
        data = folder.get(AttemptLayout.MANIFEST)
        if data is None and allow_partial:
            return self._collect_checkpoint(ref, folder, status)
        if data is None:
            raise self._missing(ref, "it wrote no manifest")
        try:
            manifest = ResultManifest.model_validate_json(data)
        except ValidationError as exc:
            raise self._missing(ref, "its manifest is damaged") from exc
        if (manifest.run_id, manifest.attempt) != (ref.run_id, ref.attempt):
            raise self._missing(ref, f"its manifest belongs to attempt {manifest.attempt} of run {manifest.run_id}")
        for name, expected in manifest.files.items():
            digest = folder.sha256(name)
            if digest != expected.sha256:
                raise self._missing(ref, f"{name} is {'missing' if digest is None else 'not what the manifest says'}")
        status = status or self.observe(ref)
        started, ended = status.started_at or ref.submitted_at, status.ended_at or manifest.created_at
        seconds = seconds_between(started, ended)
        return Result(
            outcome="complete",
            model_uri=f"{ref.output_uri}/{AttemptLayout.MODEL}",
            manifest_uri=f"{ref.output_uri}/{AttemptLayout.MANIFEST}",
            metrics=manifest.metrics,
            metrics_split=manifest.metrics_split,
            files=manifest.files,
            best_epoch=manifest.best_epoch,
            epochs=manifest.epochs,
            duration_seconds=round(seconds, 3),
            billable_seconds=round(seconds, 3),
            cost_usd=status.cost_usd,
        )

    def _collect_checkpoint(self, ref: JobRef, folder: ObjectFolder, status: JobStatus | None) -> Result:
        places = [f"{AttemptLayout.CHECKPOINTS}/{name}" for name in folder.names(AttemptLayout.CHECKPOINTS) if name.startswith("epoch-")]
        for place in sorted((place for place in places if place.endswith(".json")), reverse=True):
            described = json.loads(folder.get(place) or b"{}")
            weights = place.removesuffix(".json") + ".pt"
            if described.get("sha256") != folder.sha256(weights):
                continue
            status = status or self.observe(ref)
            progress = status.progress
            seconds = seconds_between(status.started_at or ref.submitted_at, status.ended_at or status.observed_at)
            return Result(
                outcome="partial",
                model_uri=f"{ref.output_uri}/{weights}",
                manifest_uri=f"{ref.output_uri}/{place}",
                metrics=progress.metrics if progress else {},
                metrics_split="val",
                files={weights: ManifestFile(sha256=described["sha256"], bytes=described["bytes"])},
                best_epoch=described["epoch"],
                epochs=described["epoch"],
                duration_seconds=round(seconds, 3),
                billable_seconds=round(seconds, 3),
                cost_usd=status.cost_usd,
            )
        raise self._missing(ref, "it wrote no manifest and no checkpoint")

    # --- What a provider's author writes ---------------------------------------------------------

    def _validate(self, spec: JobSpec) -> tuple[Problem, ...]:
        return ()

    def _warnings(self, spec: JobSpec) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def _build(self, spec: JobSpec) -> tuple[dict[str, JsonValue], str, str]:
        """Pure: the native request, the instance type and the region."""

    def _price(self, spec: JobSpec, instance_type: str, region: str) -> Price | None:
        """Pure: that of the table, where the settings know no other."""
        return lookup_price(self.NAME, instance_type, region)

    def _attempt_seconds(self, spec: JobSpec) -> int:
        """Pure: for how long an attempt may hold its machine, which may be more than one run time where the platform repeats it."""
        return spec.max_runtime_seconds

    def _identity(self, request: dict[str, JsonValue]) -> dict[str, JsonValue]:
        """Pure: the request without what changes from submission to submission."""
        return request

    @abstractmethod
    def _find(self, plan: Plan) -> JobRef | None:
        """The job of the plan's run and attempt, with the fingerprint it was made from."""

    @abstractmethod
    def _create(self, plan: Plan) -> JobRef:
        """Creates the job. Raises AlreadyExists where the key is taken or the answer is unclear; never retries.

        Any AuthError, ConfigError or QuotaError, also a translated one, means that nothing was created: the attempt is closed by it.
        """

    def _translate(self, exc: Exception) -> ProviderError | None:
        """The error of our tree for one of the SDK's; None for what is not an SDK's."""
        return None

    @contextmanager
    def _translated(self, run_id: str = "") -> Generator[None]:
        try:
            yield
        except (ProviderError, AlreadyExists):
            raise
        except Exception as exc:
            error = self._translate(exc)
            if error is None:
                raise
            error.provider, error.run_id = self.NAME, run_id
            raise error from exc

    def _missing(self, ref: JobRef, why: str) -> ResultMissing:
        return ResultMissing(
            f"attempt {ref.attempt} of run {ref.run_id} has no complete result: {why}",
            provider=self.NAME,
            run_id=ref.run_id,
            hint=f"`trainyard logs {ref.run_id}` shows what it did",
        )


def problems_of_places(spec: JobSpec, provider: str) -> list[Problem]:
    """What of a spec lies on this machine, where a job that runs elsewhere finds nothing."""
    problems: list[Problem] = []
    if not is_bucket(spec.output_uri):
        hint = "give the profile an output, or a store, in a bucket; or --output s3://..., az://..., gs://..."
        problems.append(Problem(field="output", message=f"{spec.output_uri} is on this machine, out of reach of {provider}", hint=hint))
    if spec.dataset.store_uri is None or not is_bucket(spec.dataset.store_uri):
        place = spec.dataset.store_uri or spec.dataset.root
        hint = "give the profile a store in a bucket, or --store s3://..., az://..., gs://..."
        problems.append(Problem(field="dataset", message=f"{place} is on this machine, out of reach of {provider}", hint=hint))
    for name in ("weights", "model"):
        value = getattr(spec.config, name)
        if value is not None and value.startswith(("/", "file://")):
            hint = "give a published name such as yolo11n.pt, or put the file into a bucket and give its URI"
            problems.append(Problem(field=name, message=f"{value} is on this machine, out of reach of {provider}", hint=hint))
    return problems


# Variables and a patch are whatever people put there.
SECRET_FIELD = re.compile(r"(?i)^(env|pod_patch)\b|secret|password|token|credential|kubeconfig|_key\b")


def describe_validation(exc: ValidationError) -> str:
    """All of a validation's problems on one line each, `field: what is wrong (got value)`.

    No value of a field that holds a secret, and none that holds others, of which one may be.
    """
    lines: list[str] = []
    for error in exc.errors():
        field = ".".join(str(part) for part in error["loc"])
        message = error["msg"].removeprefix("Value error, ")
        hidden = isinstance(error["input"], (Mapping, list, tuple)) or SECRET_FIELD.search(field)
        shown = "" if hidden else f" (got {_shorten(error['input'])})"
        lines.append(f"{field}: {message}{shown}" if field else message)
    return "\n".join(lines)


def _shorten(value: Any) -> str:
    try:
        text = value if isinstance(value, str) else canonical_json(value)
    except (TypeError, ValueError):
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."
