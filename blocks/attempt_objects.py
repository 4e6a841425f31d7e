"""What a launcher writes to an attempt's folder and reads of what the trainer leaves there, on every store.

For the authors of providers: `Provider.objects` opens the folder, and each call here is one small request of it.
"""

from __future__ import annotations

import json
from typing import Any

from blocks.job import JobSpec, JobState, JobStatus, LogBatch
from trainer.contract import AttemptLayout, ExitRecord, Phase, Progress, TrainJob
from trainer.storage import ObjectFolder

LOG_BATCH_BYTES = 64 * 1024

PHASE_STATES = {
    Phase.QUEUED: JobState.QUEUED,
    Phase.PREPARING: JobState.STARTING,
    Phase.TRAINING: JobState.RUNNING,
    Phase.EVALUATING: JobState.RUNNING,
    Phase.FINISHING: JobState.RUNNING,
}


# --- Pure ----------------------------------------------------------------------------------------------


def build_container_job(spec: JobSpec, fingerprint: str = "", **machine: Any) -> TrainJob:
    """``config.json`` for a trainer in a container, which keeps the run's record where the launcher reads it.

    `machine` are fields that only this provider knows: the folder of a cache, say.
    """
    return TrainJob(
        run_id=spec.run_id,
        attempt=spec.attempt,
        name=spec.name,
        config=spec.config,
        dataset=spec.dataset,
        output_uri=f"{spec.output_uri}/{spec.run_id}",
        fingerprint=fingerprint,
        **machine,
    )


def parse_exit(record: ExitRecord, progress: Progress | None, cost_usd: float | None = None) -> JobStatus:
    """How a job ended, as its supervisor wrote it down."""
    state = JobState.SUCCEEDED if record.exit_code == 0 else JobState.CANCELLED if record.cancelled else JobState.FAILED
    return JobStatus(
        state=state,
        native_state=f"exit {record.exit_code}",
        reason=record.reason,
        message=record.message,
        hint=record.hint,
        exit_code=record.exit_code,
        progress=progress,
        started_at=record.started_at,
        ended_at=record.ended_at,
        cost_usd=cost_usd,
    )


# --- The attempt's objects -------------------------------------------------------------------------------


def write_job(objects: ObjectFolder, job: TrainJob) -> None:
    """To be written before the job is created that reads it. Again is fine: of one plan, the text is the same."""
    objects.put(AttemptLayout.CONFIG, job.model_dump_json(indent=1).encode())


def read_progress(objects: ObjectFolder) -> Progress | None:
    data = objects.get(AttemptLayout.PROGRESS)
    return Progress.model_validate_json(data) if data else None


def read_exit(objects: ObjectFolder) -> ExitRecord | None:
    data = objects.get(AttemptLayout.EXIT)
    return ExitRecord.model_validate_json(data) if data else None


def count_containers(objects: ObjectFolder) -> int:
    """How many containers have had the attempt, one after another; 0 where none has said so."""
    data = objects.get(AttemptLayout.OWNER)
    return int(json.loads(data).get("generation") or 0) if data else 0


def read_log(objects: ObjectFolder, cursor: str, *, ended: bool) -> LogBatch:
    """Whole lines behind `cursor`, the offset in bytes of the first unread one.

    `ended`: the job was over before this was called, so that nothing is written behind what is read now.
    """
    offset = int(cursor or 0)
    data = objects.get_from(AttemptLayout.LOG, offset, LOG_BATCH_BYTES)
    whole = data if ended and len(data) < LOG_BATCH_BYTES else data[: data.rfind(b"\n") + 1]
    if not whole and len(data) == LOG_BATCH_BYTES:
        whole = data  # one line longer than a batch
    lines = tuple(whole.decode(errors="replace").splitlines())
    return LogBatch(lines=lines, cursor=str(offset + len(whole)), ended=ended and len(data) < LOG_BATCH_BYTES)
