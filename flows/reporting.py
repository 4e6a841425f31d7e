"""What a run shows in Prefect: progress, figures per epoch, the report, where the model lies. No torch."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from uuid import UUID

from prefect.artifacts import (
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from blocks.job import JobState, JobStatus, Result
from blocks.record import RunFile, RunRecord
from flows.reporting_text import build_report, describe_status, epoch_row, read_epochs
from trainer.contract import AttemptLayout, RunLayout
from trainer.files import read_json
from trainer.storage import to_path

# Stable keys: Prefect keeps a history per key, so that runs can be compared on the Artifacts page.
PROGRESS_KEY = "training-progress"
METRICS_KEY = "training-metrics"
REPORT_KEY = "training-report"
MODEL_KEY = "trained-model"


@contextmanager
def best_effort(logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> Generator[None]:
    """What Prefect shows must never end a training, or withhold a result that is paid for."""
    try:
        yield
    except Exception as exc:
        logger.warning("Prefect did not take an artifact: %s: %s", type(exc).__name__, exc)


class ProgressReporter:
    """Tells Prefect once per epoch and on every change of state: artifacts cost about 10 ms each."""

    def __init__(self, run_id: str, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
        self.run_id = run_id
        self.logger = logger
        self.seen: tuple[JobState, str, int] | None = None
        self.artifact_id: UUID | None = None

    def report(self, status: JobStatus) -> None:
        epoch = status.progress.epoch if status.progress else 0
        now = (status.state, status.native_state, epoch)
        if now == self.seen:
            return
        self.seen = now
        self.logger.info(describe_status(status))
        with best_effort(self.logger):
            self._publish(status)

    def _publish(self, status: JobStatus) -> None:
        percent = 100.0 if status.state is JobState.SUCCEEDED else 100.0 * status.progress.fraction if status.progress else 0.0
        if self.artifact_id is None:
            made = create_progress_artifact(percent, key=PROGRESS_KEY, description=f"run {self.run_id}")
            self.artifact_id = made if isinstance(made, UUID) else None
        else:
            update_progress_artifact(self.artifact_id, percent, description=f"run {self.run_id}: {describe_status(status)}")


def publish_report(record: RunRecord, run: RunFile, result: Result, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> None:
    """`report.md` in the run's folder; the figures per epoch, the report and the model's place in Prefect."""
    evaluation = read_json(to_path(result.manifest_uri).parent / AttemptLayout.EVALUATION) or {}
    report = build_report(run, result, record.dataset(), evaluation)
    record.folder.put(RunLayout.REPORT, report.encode())
    title = f"{run.name} ({run.run_id})"
    with best_effort(logger):
        create_table_artifact([epoch_row(progress) for progress in read_epochs(record)], key=METRICS_KEY, description=f"{title} per epoch")
        create_markdown_artifact(report, key=REPORT_KEY, description=title)
        create_link_artifact(result.model_uri, link_text="model.pt", key=MODEL_KEY, description=title)
