"""The values that pass between the verbs. Frozen, JSON in and out, no Prefect and no SDK.

TrainRequest -> JobSpec -> Plan -> JobRef -> JobStatus... -> Result
"""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import AwareDatetime, BaseModel, Field, JsonValue, model_validator

from trainer.contract import (
    DatasetRef,
    ExitCode,
    FailureReason,
    ManifestFile,
    Progress,
    SplitConfig,
    StoredRecord,
    TrainConfig,
    TrainerError,
    UserInput,
    utc_now,
)
from trainer.locations import refuse_secrets


class JobState(StrEnum):
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"

    @property
    def is_terminal(self) -> bool:
        """UNKNOWN and STOPPING are not: such a job may still run, and cost."""
        return self in (JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED)


class Waiting(StrEnum):
    """What a job waits for that has not started."""

    MACHINE = "machine"
    MENDING = "mending"  # of what its message tells, by a person: waiting alone does not help


class Resources(UserInput):
    """What a job needs of a machine. Empty fields are chosen by the provider."""

    accelerator: str | None = Field(
        default=None, title="GPU model", description="Such as T4, L4, A100-80GB. Empty: what the profile offers."
    )
    accelerator_count: int = Field(default=0, ge=0, le=16, title="GPUs", description="GPUs per machine. 0: no GPU is asked for.")
    cpus: float | None = Field(default=None, gt=0, title="CPU cores", description="CPU cores per machine. Empty: the profile's.")
    memory_gib: float | None = Field(
        default=None, gt=0, title="Memory (GiB)", description="Memory per machine in GiB. Empty: the profile's."
    )
    disk_gib: float | None = Field(default=None, gt=0, title="Disk (GiB)", description="Disk per machine in GiB. Empty: the profile's.")
    nodes: int = Field(default=1, ge=1, le=64, title="Machines", description="Machines that train together.")
    spot: bool = Field(default=False, title="Spot machines", description="Use cheaper machines that may be taken away.")
    region: str | None = Field(default=None, title="Region", description="The provider's region. Empty: the profile's.")
    instance_type: str | None = Field(
        default=None, title="Machine type", description="The provider's own machine name; overrides the fields above."
    )


def form_field(title: str, description: str, **constraints: Any) -> Any:
    """A parameter of the flow `train`. Prefect drops title and description of an annotation, except in the extra."""
    shown: dict[str, JsonValue] = {"title": title, "description": description}
    return Field(title=title, description=description, json_schema_extra=shown, **constraints)


class TrainRequest(UserInput):
    """What a person asks for: one training. The parameters of the flow `train`, in one value."""

    dataset: str = form_field(
        "Dataset",
        "Folder (absolute path) of images with labels: Ultralytics YOLO, COCO JSON or Pascal VOC. "
        "Or a bucket URI (s3://bucket/images), or a staged dataset (s3://bucket/store#name).",
        min_length=1,
    )
    profile: str = form_field("Profile", "Where to train: a saved profile. local: the worker's machine.", default="local", min_length=1)
    config: TrainConfig = form_field("Training", "Model, length and settings of the training.", default=TrainConfig())
    split: SplitConfig = form_field("Split", "How to make the splits that the dataset lacks.", default=SplitConfig())
    resources: Resources = form_field("Machine", "What the job needs of a machine; the profile decides the rest.", default=Resources())
    max_problem_share: float = form_field(
        "Broken images, at most", "Share, 0 to 1: a dataset with more unreadable images or labels is refused.", default=0.05, ge=0, le=1
    )
    max_runtime_seconds: int = form_field(
        "Run time, at most (seconds)", "The job is stopped after this many seconds; 86400 is a day.", default=86_400, ge=60, le=28 * 86_400
    )
    max_cost_usd: float | None = form_field(
        "Cost, at most (US$)",
        "Refused before it starts: what could cost more in all its attempts, or has no known price. Empty: no limit.",
        default=None,
        gt=0,
    )
    max_attempts: int = form_field("Attempts, at most", "Attempts in all when machines are taken away or break.", default=3, ge=1, le=10)
    stage: bool = form_field("Stage", "Bring a folder to the store first, as for a cloud. Off: it is read in place.", default=False)
    store: str | None = form_field(
        "Store", "Bucket URI or folder that datasets are staged to. Empty: the profile's, $TRAINYARD_STORE, or a folder.", default=None
    )
    labels: str | None = form_field(
        "Labels", "For images in a bucket: folder or COCO file with their labels. Empty: the labels lie in the bucket.", default=None
    )
    name: str | None = form_field("Name", "What people call the run. Empty: from dataset and model.", default=None, max_length=63)
    output: str | None = form_field("Output", "Folder or bucket URI that keeps the runs. Empty: the profile's.", default=None)
    project: str | None = form_field("Project", "Label in reports and on the provider's bill.", default=None, max_length=63)
    cost_centre: str | None = form_field("Cost centre", "Label in reports and on the provider's bill.", default=None, max_length=63)

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        """Before it is recorded, sent to Prefect or shown. An error of the whole value shows nothing of it."""
        for name in ("dataset", "store", "output"):
            value = getattr(self, name) or ""
            try:
                refuse_secrets(value)
            except TrainerError as exc:
                raise ValueError(f"{name}: {exc}") from None
            if "://" in value and urlsplit(value).query:
                raise ValueError(f"{name}: what follows the ? of a URI is not used, and not shown: it may be a signature")
        return self

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.labels is not None and ("://" not in self.dataset or "#" in self.dataset):
            raise ValueError("labels are for images in a bucket: the dataset is then a URI such as s3://bucket/images")
        if "://" in self.dataset and self.dataset.endswith("#"):
            raise ValueError("the name of the staged dataset is missing behind the #")
        return self


class JobSpec(UserInput):
    """One attempt of a run, complete: a provider needs nothing else to write its request."""

    run_id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")
    attempt: int = Field(default=1, ge=1)
    name: str
    config: TrainConfig
    dataset: DatasetRef
    resources: Resources = Field(default_factory=Resources)
    output_uri: str
    output_endpoint: str | None = Field(default=None, description="Address of the output's store, where that is not its cloud's own.")
    image: str | None = Field(default=None, description="Container image by digest; None for a draft, or where no container runs.")
    secrets: dict[str, str] = Field(default_factory=dict, description="Name to reference in the provider's secret store; never a value.")
    max_runtime_seconds: int
    max_attempts: int = Field(default=1, ge=1, description="That the run may use in all; they change its cost at worst, and no job.")
    max_cost_usd: float | None = None
    spent_usd: float = Field(default=0.0, description="What the run's earlier attempts have cost at most.")
    owner: str = ""
    project: str = ""
    cost_centre: str = ""
    flow_run_id: str = ""
    profile: str = ""

    @property
    def attempt_uri(self) -> str:
        return f"{self.output_uri}/{self.run_id}/attempts/{self.attempt}"


class Problem(StoredRecord):
    field: str
    message: str
    hint: str = ""


class WatchPolicy(StoredRecord):
    """When a job counts as stalled, and what follows. Of the profile; kept in the run's record, so that any watcher has it.

    What is waited for decides which limit counts (`blocks.stalling`): a training step, a sign of life between steps or
    outside training, or the start of the job.
    """

    stall_factor: float = Field(default=30.0, description="No step for so many times the median step's time is a stall.")
    stall_min_seconds: float = Field(default=300.0, description="However short the steps are, a shorter silence is no stall.")
    stall_phase_seconds: float = Field(
        default=3600.0, description="Silence that is a stall while data is prepared, an evaluation runs, or nothing is known of its pace."
    )
    queue_limit_seconds: float | None = Field(default=None, description="Longest wait for the trainer's first word. None: any.")
    on_stall: Literal["warn", "stop", "restart"] = "warn"


class Price(StoredRecord):
    usd_per_hour: float
    as_of: str
    source: str


class Plan(StoredRecord):
    """A spec as one provider will run it. `request` is the exact native body; the fingerprint identifies it."""

    provider: str
    spec: JobSpec
    instance_type: str
    region: str
    request: dict[str, JsonValue]
    price: Price | None = None
    worst_case_usd: float | None = Field(default=None, description="What was spent, and price x nodes x attempt_seconds x attempts left.")
    attempt_seconds: int | None = Field(default=None, description="For how long an attempt may hold its machine.")
    fingerprint: str
    warnings: tuple[str, ...] = ()


class JobRef(StoredRecord):
    """Where a job is. Any process that holds one can go on from here."""

    provider: str
    native_id: str
    run_id: str
    attempt: int
    scope: str = Field(default="", description="Region, project or namespace; the host for local jobs.")
    output_uri: str = Field(description="The attempt's folder.")
    fingerprint: str
    submitted_at: AwareDatetime = Field(default_factory=utc_now)
    console_url: str = ""


class JobStatus(StoredRecord):
    """One observation of a job."""

    state: JobState
    native_state: str = ""
    reason: FailureReason | None = None
    message: str = ""
    hint: str = ""
    waiting: Waiting | None = Field(default=None, description="None: it has started, or waits in a queue.")
    exit_code: int | None = None
    restarts: int = 0
    progress: Progress | None = None
    instance_type: str = ""
    cost_usd: float | None = None
    started_at: AwareDatetime | None = None
    ended_at: AwareDatetime | None = None
    observed_at: AwareDatetime = Field(default_factory=utc_now)


class LogBatch(StoredRecord):
    lines: tuple[str, ...]
    cursor: str = Field(description="Pass it back to go on behind these lines.")
    ended: bool = Field(description="The job is over and nothing follows.")


class Result(StoredRecord):
    """What a run gave: a verified model and its figures."""

    outcome: Literal["complete", "partial"]
    model_uri: str
    manifest_uri: str
    metrics: dict[str, float]
    metrics_split: str
    files: dict[str, ManifestFile]
    best_epoch: int
    epochs: int
    duration_seconds: float
    billable_seconds: float = 0.0
    cost_usd: float | None = None


class CheckLine(StoredRecord):
    name: str
    ok: bool
    message: str
    fix: str = Field(default="", description="The command or step that mends it.")
    exit_code: int = Field(default=int(ExitCode.CONFIG), description="The command's, where this line is not ok.")


class CheckReport(StoredRecord):
    provider: str
    lines: tuple[CheckLine, ...]

    @property
    def ok(self) -> bool:
        return all(line.ok for line in self.lines)

    @property
    def exit_code(self) -> int:
        """Of the first problem, which the others often follow from."""
        return next((line.exit_code for line in self.lines if not line.ok), int(ExitCode.OK))

    def answer(self) -> dict[str, Any]:
        """As programs read it: `valid`, `message` with every problem and what mends it, `details` by line."""
        problems = "; ".join(f"{line.message}: {line.fix}" for line in self.lines if not line.ok)
        return {"valid": self.ok, "message": problems or "ready", "details": {line.name: line.message for line in self.lines}}


class Capabilities(BaseModel):
    """What a provider can do; `Provider.validate` compares a spec with it."""

    spot: bool
    nodes: int = Field(description="Most machines of one job.")
    needs_image: bool
    local_files: bool = Field(default=False, description="A job sees the folders of the machine where the flow runs.")
    max_runtime_seconds: int
    poll_seconds: tuple[float, float] = Field(description="Shortest and longest wait between two observations.")


def canonical_json(value: Any) -> str:
    """One text for equal values: sorted keys, no spaces. Raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def fingerprint(value: Any) -> str:
    """sha256 of the canonical JSON, as hex."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def seconds_between(start: datetime, end: datetime) -> float:
    return max(0.0, (end - start).total_seconds())
