"""What the launcher and the trainer agree on: the config, the layout of a run, progress, the result manifest, names, exit codes.

Both sides import this module and nothing else of each other. It needs pydantic and the standard
library only, so that reading a record costs a tenth of a second. A change that an older trainer image
could misread raises ``CONTRACT_VERSION``; the launcher compares it with the image's at plan time.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from trainer.contract_version import CONTRACT_VERSION as CONTRACT_VERSION
from trainer.errors import (
    EXIT_REASONS as EXIT_REASONS,
    FATAL_EXITS as FATAL_EXITS,
    ExitCode as ExitCode,
    FailureReason as FailureReason,
    TrainerError as TrainerError,
    TrainyardError as TrainyardError,
    unknown_name_message as unknown_name_message,
)
from trainer.files import ENV_HOME as ENV_HOME, utc_now as utc_now
from trainer.records import STORED as STORED, StoredRecord as StoredRecord, UserInput as UserInput

# --- What to train -----------------------------------------------------------------------------


class Framework(StrEnum):
    YOLO = "yolo"


class Task(StrEnum):
    OBJECT_DETECTION = "object-detection"
    INSTANCE_SEGMENTATION = "instance-segmentation"
    IMAGE_CLASSIFICATION = "image-classification"
    POSE_ESTIMATION = "pose-estimation"
    ORIENTED_DETECTION = "oriented-detection"


class TrainConfig(UserInput):
    """How to train. The same value gives the same training on every provider.

    ``model`` is an architecture (``yolo11n``, ``yolo26s``, ``yolo11-pico``) or a YAML file of one;
    ``weights`` is where the parameters start: a published name (``yolo11n.pt``, downloaded by the
    trainer), a local file, a bucket URI, or none for random initial values.
    """

    model: str = Field(default="yolo11n", min_length=1, description="Architecture: yolo11n, yolo26s, yolo11-pico, or a YAML file.")
    epochs: int = Field(default=100, ge=1, le=10_000, description="Passes over the training split.")
    image_size: int = Field(
        default=640, ge=32, le=4096, multiple_of=32, description="Side of the square input in pixels, a multiple of 32."
    )
    batch_size: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        default=16, description="Images per step, or auto (fills the GPU)."
    )
    weights: str | None = Field(
        default=None, min_length=1, description="Start from these weights: a published name, a file, or a bucket URI. Empty: from scratch."
    )
    trust_weights: bool = Field(
        default=False,
        title="Trust weights",
        description="Load the weights file even if it can run code. Only for a file whose origin you know.",
    )
    task: Task = Field(default=Task.OBJECT_DETECTION, title="Task", description="What the model predicts.")
    patience: int | None = Field(default=None, ge=1, le=10_000, description="Stop after so many epochs without improvement. Empty: never.")
    learning_rate: float | None = Field(default=None, gt=0, le=1, description="Initial learning rate. Empty: chosen by the framework.")
    optimizer: Literal["SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSProp", "MuSGD"] | None = Field(
        default=None, description="Empty: AdamW where a learning rate is given, else chosen by the framework."
    )
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="Seed of initial values, shuffling and augmentation.")
    device: str = Field(
        default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+(,\d+)*)?)$", description="auto, cpu, mps, cuda, cuda:0 or cuda:0,1."
    )
    workers: int | None = Field(default=None, ge=0, le=128, description="Data-loading processes. Empty: by the machine's cores.")
    augmentations: list[dict[str, JsonValue]] | None = Field(
        default=None, description='Albumentations pipeline: [{"transform": "HorizontalFlip", "p": 0.5}, ...]. Empty: the framework\'s own.'
    )
    model_params: dict[str, JsonValue] = Field(
        default_factory=dict, title="Further settings", description="Passed to the framework, by its own names: mosaic, lrf, ..."
    )
    framework: Framework = Field(default=Framework.YOLO, title="Framework", description="Training framework.")


class SplitConfig(UserInput):
    """How to make the splits a dataset lacks: deterministic, by image or by group.

    ``by`` is a regular expression over the file name; images whose first group (or whole match)
    is equal stay in one split, because burst photographs leak through a random one.
    """

    by: str | None = Field(
        default=None, title="Keep together", description=r"Pattern in the file name that groups images, e.g. '^(cam\d+_\d+)'."
    )
    val: float = Field(default=0.1, ge=0, lt=1, title="Validation", description="Share of images for validation where the set has none.")
    test: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        title="Test",
        description="Share of images for the test where the set has none. 0: report the validation figure.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the split.")

    @field_validator("by")
    @classmethod
    def _by_compiles(cls, value: str | None) -> str | None:
        import re

        if value is not None:
            try:
                re.compile(value)
            except re.error as exc:
                raise ValueError(f"not a regular expression: {exc}") from exc
        return value


class DatasetCheck(StoredRecord):
    """How the trainer checks a dataset that nobody could read before it."""

    split: SplitConfig = SplitConfig()
    max_problem_share: float = 0.05


class DatasetRef(StoredRecord):
    """A dataset: where its files lie and which version of them. The index names every image and box."""

    root: str = Field(description="Folder that the index's paths are relative to.")
    index_uri: str = Field(description="The DatasetIndex as JSON.")
    version: str = Field(description="sha256 over the paths and contents of all files used.")
    name: str
    image_count: int
    store_uri: str | None = Field(
        default=None, description="Store that holds the staged version. None: the files at root are read in place."
    )
    store_endpoint: str | None = Field(default=None, description="Address of a store that is not its cloud's own.")
    source_endpoints: dict[str, str] | None = Field(
        default=None, description="By scheme (s3), the address of buckets with objects that are used in place, where not the cloud's own."
    )
    check: DatasetCheck | None = Field(default=None, description="The trainer makes the index, once it has the files.")


class TrainJob(StoredRecord):
    """``config.json`` of an attempt: everything the trainer needs to know."""

    contract_version: int = CONTRACT_VERSION
    run_id: str
    attempt: int
    name: str
    config: TrainConfig
    dataset: DatasetRef
    cache_dir: str | None = Field(default=None, description="Where this machine keeps fetched datasets. None: for this job alone.")
    cache_limit_gib: float | None = Field(default=None, description="Least recently used versions leave the cache above this.")
    output_uri: str | None = Field(
        default=None, description="The run's record, <output>/<run_id>, where a container keeps it. None: the attempt's folder is in it."
    )
    fingerprint: str = ""


def parse_job(text: bytes, place: str) -> TrainJob:
    """The job that `place` holds. Raises TrainerError (CONFIG) where it is none, or of a newer launcher."""
    try:
        job = TrainJob.model_validate_json(text)
    except ValidationError as exc:
        first = exc.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise TrainerError(f"{place} is not a job: {field + ': ' if field else ''}{first['msg']}", code=ExitCode.CONFIG) from exc
    if job.contract_version > CONTRACT_VERSION:
        raise TrainerError(
            f"the job speaks contract version {job.contract_version}, this trainer knows {CONTRACT_VERSION}",
            hint="use a trainer, or an image, of the launcher's version",
            code=ExitCode.CONFIG,
        )
    return job


# --- How far it is ---------------------------------------------------------------------------------


class Phase(StrEnum):
    """What the trainer is doing. ``queued`` waits for the machine; the others follow in this order."""

    QUEUED = "queued"
    PREPARING = "preparing"
    TRAINING = "training"
    EVALUATING = "evaluating"
    FINISHING = "finishing"


STEPPING = "stepping"  # the activity in which the next sign of life is a training step


class Progress(StoredRecord):
    """``progress.json`` (latest) and one line of ``progress.jsonl`` per finished epoch."""

    attempt: int
    phase: Phase
    epoch: int = Field(default=0, description="Finished epochs.")
    epochs: int
    step: int = Field(default=0, description="Steps done in the epoch that runs.")
    steps: int = Field(default=0, description="Steps of an epoch; 0 while unknown.")
    activity: str = Field(default="", description="While training: stepping, validating, saving; empty: something else.")
    step_seconds: float | None = Field(default=None, description="Median time of the last steps, waiting for data included.")
    last_step_at: AwareDatetime | None = Field(default=None, description="When the latest step was done, by the trainer's clock.")
    pause_seconds: float | None = Field(default=None, description="Longest of the last times from an epoch's last step to the next one.")
    nonfinite_losses: int = Field(default=0, description="Steps in a row, up to the latest, whose loss was NaN or infinite.")
    metrics: dict[str, float] = Field(default_factory=dict, description="map50 map50_95 precision recall, on the validation split.")
    losses: dict[str, float] = Field(default_factory=dict)
    learning_rate: float | None = None
    images_per_second: float | None = None
    data_wait_share: float | None = Field(default=None, description="Share of the training time spent waiting for data, 0 to 1.")
    memory_gib: float | None = Field(default=None, description="Resident memory of the fit.")
    gpu_memory_gib: float | None = None
    eta_seconds: float | None = None
    host: str = ""
    message: str = ""
    updated_at: AwareDatetime = Field(default_factory=utc_now)

    @property
    def fraction(self) -> float:
        """Share of the training done, 0 to 1."""
        within = self.step / self.steps if self.steps else 0.0
        return min(1.0, (self.epoch + within) / self.epochs) if self.epochs else 0.0


class JobFile(StoredRecord):
    """``job.json``: written by the supervisor once it owns the attempt; its existence says that the job was created."""

    run_id: str
    attempt: int
    fingerprint: str
    host: str
    pid: int
    pid_created_at: float = Field(description="Start time of the process in seconds since the epoch, against reused pids.")
    created_at: AwareDatetime = Field(default_factory=utc_now)


class ExitRecord(StoredRecord):
    """``exit.json``: how the attempt ended, written once by the supervisor."""

    exit_code: int
    reason: FailureReason | None = None
    message: str = ""
    hint: str = ""
    signal: int | None = None
    cancelled: bool = False
    started_at: AwareDatetime
    ended_at: AwareDatetime = Field(default_factory=utc_now)
    phase_seconds: dict[str, float] = Field(default_factory=dict, description="Where the time went: importing, preparing, training, ...")


class ManifestFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")
    sha256: str
    bytes: int


class ResultManifest(StoredRecord):
    """``manifest.json``, written last: the result is complete and these are its files."""

    contract_version: int = CONTRACT_VERSION
    run_id: str
    attempt: int
    framework: Framework
    task: Task
    model: str
    dataset_version: str
    fingerprint: str = ""
    best_epoch: int = Field(description="1-based epoch whose weights were kept, chosen on validation.")
    epochs: int = Field(description="Epochs trained.")
    metrics: dict[str, float] = Field(description="The headline figures.")
    metrics_split: Literal["test", "val"]
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, ManifestFile]
    created_at: AwareDatetime = Field(default_factory=utc_now)


# --- Where things lie ----------------------------------------------------------------------------


class RunLayout:
    """Names inside ``<output_uri>/<run_id>/``, the same on every store."""

    RUN = "run.json"
    DATASET = "dataset.json"
    SOURCE = "source.json"
    CANCEL = "cancel.json"
    REPORT = "report.md"
    ATTEMPTS = "attempts"
    EVENTS = "events"


class AttemptLayout:
    """Names inside ``attempts/<n>/``. The class holds names; an instance joins them to a local folder."""

    PLAN = "plan.json"
    REF = "ref.json"
    OUTCOME = "outcome.json"
    RECEIPT = "receipt.json"
    CONFIG = "config.json"
    LOCK = "lock"
    STOP = "stop.json"
    OWNER = "owner.json"
    JOB = "job.json"
    PROGRESS = "progress.json"
    PROGRESS_LINES = "progress.jsonl"
    EXIT = "exit.json"
    FAILURE = "failure.json"
    METRICS = "metrics.json"
    EVALUATION = "evaluation.json"
    MANIFEST = "manifest.json"
    MODEL = "model/model.pt"
    CHECKPOINTS = "checkpoints"
    SAMPLES = "samples"
    LOGS = "logs"
    LOG = "logs/trainer.log"
    WORK = "work"

    # What the manifest covers; everything else is process state.
    RESULT_FILES: ClassVar[tuple[str, ...]] = (MODEL, METRICS, EVALUATION)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def number(self) -> int:
        return int(self.folder.name)

    def earlier(self) -> list[AttemptLayout]:
        """Earlier attempts of the same run, newest first."""
        numbers = (int(p.name) for p in self.folder.parent.iterdir() if p.name.isdigit())
        return [AttemptLayout(self.folder.parent / str(n)) for n in sorted(numbers, reverse=True) if n < self.number]


ENV_LOCK_FD = "TRAINYARD_LOCK_FD"  # open descriptor of the attempt's lock, inherited by the fit
ENV_SUPERVISOR_PID = "TRAINYARD_SUPERVISOR_PID"

# Headline metrics, framework-neutral.
METRIC_NAMES = ("map50", "map50_95", "precision", "recall")
