"""What a run shows in Prefect: tags beside its name, progress, figures per epoch, the report, where the model lies. No torch."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.flows import Flow
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import flow_run as current_flow_run

from blocks.counting import Counts
from blocks.errors import RunNotFound
from blocks.job import JobState, JobStatus, Result
from blocks.record import RunFile, RunRecord
from blocks.spending import run_cost
from flows.identity import record_of_flow_run
from flows.reporting_text import (
    best_of,
    build_ending,
    build_report,
    build_running_report,
    describe_result,
    describe_status,
    ending_of,
    epoch_table,
    place,
    read_epochs,
    replace_tags,
    running_tags,
)
from flows.staging_text import describe_counts
from trainer.contract import AttemptLayout, RunLayout

Logger = logging.Logger | logging.LoggerAdapter[logging.Logger]

# Stable keys: Prefect keeps a history per key, so that runs can be compared on the Artifacts page.
PROGRESS_KEY = "training-progress"
METRICS_KEY = "training-metrics"
REPORT_KEY = "training-report"
MODEL_KEY = "trained-model"
STAGING_KEY = "dataset-staging"

# Epochs of a tenth of a second are not told one by one.
TELL_SECONDS = 2.0
# What telling costs the machine, which may be the one that trains, stays below this share of the time.
TELL_SHARE = 0.03
MOST_TELL_SECONDS = 30.0
STAGING_TELL_SECONDS = 0.5
STAGING_LOG_SECONDS = 5.0


@contextmanager
def best_effort(logger: Logger) -> Generator[None]:
    """What Prefect shows must never end a training, or withhold a result that is paid for."""
    try:
        yield
    except Exception as exc:
        logger.warning("Prefect did not take an artifact: %s: %s", type(exc).__name__, exc)


class RunPage:
    """What one flow run shows: an artifact per key, found again by a flow that was restarted, and its tags."""

    def __init__(self, client: SyncPrefectClient, flow_run_id: UUID) -> None:
        self.client = client
        self.flow_run_id = flow_run_id
        of_this_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        self.ids = {made.key: made.id for made in client.read_artifacts(artifact_filter=of_this_run)}

    def put(self, key: str, kind: str, data: Any, description: str) -> None:
        known = self.ids.get(key)
        if known is None:
            made = ArtifactCreate(key=key, type=kind, data=data, description=description, flow_run_id=self.flow_run_id)
            self.ids[key] = self.client.create_artifact(made).id
        else:
            # The client's own update also emits an event that holds all the data: per epoch, the whole table.
            change = {"data": data, "description": description}
            self.client.request("PATCH", "/artifacts/{id}", path_params={"id": known}, json=change)

    def tag(self, tags: list[str]) -> None:
        present = self.client.read_flow_run(self.flow_run_id).tags
        self.client.request("PATCH", "/flow_runs/{id}", path_params={"id": self.flow_run_id}, json={"tags": replace_tags(present, tags)})


@contextmanager
def run_page(flow_run_id: UUID | str) -> Generator[RunPage]:
    with get_client(sync_client=True) as client:
        yield RunPage(client, UUID(str(flow_run_id)))


class ProgressReporter:
    """Tells Prefect on every change of state and of the epoch, at most every few seconds, and less often where Prefect is slow."""

    def __init__(self, record: RunRecord, logger: Logger) -> None:
        self.record = record
        self.logger = logger
        self.logged: tuple[JobState, str, int] | None = None
        self.told: tuple[JobState, str, int] | None = None
        self.told_at = 0.0
        self.pause = TELL_SECONDS

    def report(self, status: JobStatus) -> None:
        epoch = status.progress.epoch if status.progress else 0
        now = (status.state, status.native_state, epoch)
        if now != self.logged:
            self.logged = now
            self.logger.info(describe_status(status))
        same_state = self.told is not None and self.told[:2] == now[:2]
        if now == self.told or (same_state and time.monotonic() - self.told_at < self.pause):
            return
        self.told, self.told_at = now, time.monotonic()
        with best_effort(self.logger):
            self._publish(status)
        self.pause = min(MOST_TELL_SECONDS, max(TELL_SECONDS, (time.monotonic() - self.told_at) / TELL_SHARE))

    def _publish(self, status: JobStatus) -> None:
        run, epochs = self.record.run(), read_epochs(self.record)
        percent = 100.0 if status.state is JobState.SUCCEEDED else 100.0 * status.progress.fraction if status.progress else 0.0
        line = f"{describe_status(status)} ({run.name})"
        with run_page(current_flow_run.id) as page:
            page.put(PROGRESS_KEY, "progress", percent, line)
            page.put(METRICS_KEY, "table", json.dumps(epoch_table(epochs)), f"{best_of(epochs)} ({run.name})")
            page.put(REPORT_KEY, "markdown", build_running_report(run, status, epochs, run_cost(self.record, seen=status)), line)
            page.tag(running_tags(status))


class StagingReporter:
    """Tells the log, and whoever listens, how far a staging is: at most every few seconds."""

    def __init__(self, record: RunRecord, logger: Logger, listener: Callable[[RunRecord, JobStatus], None], *, total: int) -> None:
        self.record = record
        self.logger = logger
        self.listener = listener
        self.total = total
        self.started = self.told_at = self.logged_at = time.monotonic()

    def end(self, line: str) -> None:
        self.logger.info(line)
        self.listener(self.record, JobStatus(state=JobState.STARTING, native_state="staged", message=line))

    def on_silence(self, line: str) -> None:
        self.logger.warning(line)
        self.listener(self.record, JobStatus(state=JobState.STARTING, native_state="staging", message=line))

    def on_counts(self, counts: Counts) -> None:
        now = time.monotonic()
        if now - self.told_at < STAGING_TELL_SECONDS:
            return
        self.told_at = now
        line = f"staging: {describe_counts(counts, now - self.started, self.total)}"
        self.listener(self.record, JobStatus(state=JobState.STARTING, native_state="staging", message=line))
        if now - self.logged_at >= STAGING_LOG_SECONDS:
            self.logged_at = now
            self.logger.info(line)
            with best_effort(self.logger), run_page(current_flow_run.id) as page:
                page.put(STAGING_KEY, "progress", min(100.0, 100.0 * counts.done_bytes / self.total) if self.total else 0.0, line)


def publish_report(record: RunRecord, run: RunFile, result: Result, logger: Logger) -> None:
    """`report.md` in the run's folder; the figures per epoch, the report and the model's place in Prefect."""
    attempt, _, _ = result.manifest_uri.removeprefix(f"{record.uri}/").rpartition("/")
    evaluation = json.loads(record.folder.get(f"{attempt}/{AttemptLayout.EVALUATION}") or b"{}")
    try:
        source = record.dataset_ref()
    except RunNotFound:  # a result that is paid for is told all the same
        source = None
    cost = run_cost(record)
    report = build_report(run, result, cost, record.dataset(), source, evaluation)
    record.folder.put(RunLayout.REPORT, report.encode())
    line = f"{describe_result(result, cost)} ({run.name})"
    epochs = read_epochs(record)
    with best_effort(logger), run_page(current_flow_run.id) as page:
        page.put(METRICS_KEY, "table", json.dumps(epoch_table(epochs)), f"{best_of(epochs)} ({run.name})")
        page.put(REPORT_KEY, "markdown", report, line)
        page.put(MODEL_KEY, "markdown", f"[model.pt]({result.model_uri})\n\n`{place(result.model_uri)}`", line)
        figure = result.metrics.get("map50")
        figures = [f"{result.metrics_split} mAP50 {figure:.3f}"] if figure is not None else []
        page.tag([f"epoch {result.epochs}/{result.epochs}", *figures, "next: model and report under Artifacts"])


def report_ending(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook: the run failed or was cancelled, perhaps in another process than this one, perhaps before it had a record."""
    logger = flow_run_logger(flow_run)
    with best_effort(logger):
        record = record_of_flow_run(flow_run)
        ending = ending_of(record, flow_run.name, state.message or "", cancelled=state.type in (StateType.CANCELLED, StateType.CANCELLING))
        with run_page(flow_run.id) as page:
            page.put(REPORT_KEY, "markdown", build_ending(ending), ending.line)
            page.tag(ending.tags)
            if epochs := read_epochs(record) if record.exists() else []:
                page.put(METRICS_KEY, "table", json.dumps(epoch_table(epochs)), f"{best_of(epochs)} ({flow_run.name})")
                page.put(PROGRESS_KEY, "progress", 100.0 * epochs[-1].fraction, ending.line)
