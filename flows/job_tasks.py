"""The steps of a run as Prefect tasks, one per verb. Retry policy lives here and only here.

No task persists or caches a result: each finds what is there or creates it, so repeating a run costs a few
look-ups and never replays a stale answer.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import exponential_backoff

from blocks.attempts import cancel_unsubmitted, close, close_unsubmitted, find_wish
from blocks.credentials import public_endpoint
from blocks.dataset_sources import (
    EndpointOf,
    StoreChoice,
    dataset_name,
    find_endpoints,
    find_staged,
    is_uri,
    pin,
    register,
    split_staged,
    stage_index,
    unpin,
)
from blocks.errors import ConfigError, PlanChanged, RunCancelled, TerminalError, is_transient
from blocks.job import JobRef, JobSpec, JobState, JobStatus, Plan, TrainRequest
from blocks.naming import display_name
from blocks.outputs import note_seen, remember_output
from blocks.places import user_name
from blocks.profiles import Profile, load_profile
from blocks.provider import Provider
from blocks.record import Outcome, RunFile, RunRecord, describe_dataset_change, request_hash
from flows.reporting import ProgressReporter, StagingReporter
from flows.reporting_text import problem_line
from flows.staging_text import describe_missing_labels, describe_staged
from flows.watching import Listener, StallGuard, watch
from trainer.contract import DatasetCheck, DatasetRef, ExitCode, RunLayout, TrainerError, TrainyardError
from trainer.dataset import DatasetIndex, check_dataset
from trainer.store_access import access_to


def _ignore(_line: str) -> None:
    """Nobody listens: the flow runs on a worker, and Prefect's log has it."""


# The command line says what the flow that it started itself waits for: several minutes, where each request waits for its answer.
ON_RETRY: ContextVar[Callable[[str], None]] = ContextVar("ON_RETRY", default=_ignore)
MOST_RETRIES = 5


async def _is_transient(_task: object, run: TaskRun, state: State[Any]) -> bool:
    """Asked by Prefect before each retry, and only then."""
    exc = await state.aresult(raise_on_failure=False)
    if not (isinstance(exc, TrainyardError) and is_transient(exc)):
        return False
    hint = f" ({exc.hint})" if exc.hint else ""
    ON_RETRY.get()(f"{run.name}: {exc.message}; it is tried again, {run.run_count} of {MOST_RETRIES} times{hint}")
    return True


RETRIES: dict[str, Any] = {
    "retries": MOST_RETRIES,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _is_transient,
    "persist_result": False,
}


@task(name="check", task_run_name="check {provider.NAME}", **RETRIES)
def check_provider(provider: Provider[Any], output_uri: str) -> None:
    """Refuses before anything is staged where the provider cannot train.

    Raises ConfigError with every line that is not ok, and with the exit code of the first; never what is tried again, since somebody waits.
    """
    report = provider.check(output_uri)
    for line in report.lines:
        get_run_logger().info("%s: %s%s", line.name, line.message, "" if line.ok else "  <- problem")
    bad = [line for line in report.lines if not line.ok]
    if bad:
        message, hint = ("; ".join(texts) for texts in ([line.message for line in bad], [line.fix for line in bad]))
        raise ConfigError(message, provider=provider.NAME, hint=hint, code=ExitCode(report.exit_code))


@task(name="dataset", task_run_name="dataset {request.dataset}", **RETRIES)
def read_dataset(request: TrainRequest) -> DatasetIndex | None:
    """The checked dataset; None for one that lies in a store or bucket. Raises TrainerError where the set is refused."""
    if is_uri(request.dataset):
        return None  # the trainer checks it, which reads the images anyway
    path = Path(request.dataset)
    if not path.is_absolute():
        raise TrainerError(
            f"the dataset {request.dataset!r} is a relative path, and the folder it is relative to is not known here",
            hint="give the absolute path as the machine of the worker sees it",
            code=ExitCode.CONFIG,
        )
    index = check_dataset(path, task=request.config.task, split=request.split, max_problem_share=request.max_problem_share)
    log_dataset(index)
    return index


def require_same_dataset(record: RunRecord, request: TrainRequest) -> None:
    """Refuses a run key that is used again for other images. Raises PlanChanged naming what differs.

    Where the dataset is not on this machine there is nothing to compare, and the run's own version stands.
    """
    if change := describe_dataset_change(record, Path(request.dataset)):
        raise PlanChanged(
            f"the run key is that of run {record.run_id}, which trained something else: {change}",
            run_id=record.run_id,
            hint="use another run key for another version of the dataset",
        )


def log_dataset(index: DatasetIndex) -> None:
    logger = get_run_logger()
    counts = ", ".join(f"{index.count(name)} {name}" for name in ("train", "val", "test"))
    logger.info("%s (%s): %s images, %d classes, version %s", index.name, index.format, counts, len(index.classes), index.version[:12])
    for problem in index.problems:
        logger.warning(problem_line(problem))
    for note in index.notes:
        logger.info("note: %s", note)


@task(name="stage", task_run_name="stage {request.dataset}", **RETRIES)
def stage_dataset(
    profile: Profile,
    request: TrainRequest,
    record: RunRecord,
    index: DatasetIndex | None,
    listener: Callable[[RunRecord, JobStatus], None],
) -> DatasetRef:
    """The version in a store that the run trains on: found there, or brought there. Nothing that the store has travels again."""
    uri = profile.choose_store(request)
    access = profile.store_access(uri)
    # Images may lie in a bucket, and what is registered of them in a folder.
    source = profile.store_access(request.dataset) if is_uri(request.dataset) and not split_staged(request.dataset) else None

    def endpoint_of(place: str) -> str | None:
        try:
            return public_endpoint(profile.store_access(place))
        except ConfigError:  # credentials of one cloud, and objects in place of another's
            return None

    with access_to(source), access_to(access):
        return _stage(uri, endpoint_of, request, record, index, listener)


def _stage(
    uri: str,
    endpoint_of: EndpointOf,
    request: TrainRequest,
    record: RunRecord,
    index: DatasetIndex | None,
    listener: Callable[[RunRecord, JobStatus], None],
) -> DatasetRef:
    logger = get_run_logger()
    store = StoreChoice(uri, endpoint_of(uri), find_endpoints([request.dataset] if index is None else [], endpoint_of))
    index_uri = f"{record.uri}/{RunLayout.DATASET}"
    check = DatasetCheck(split=request.split, max_problem_share=request.max_problem_share)
    if index is not None:
        teller = StagingReporter(record, logger, listener, total=sum(file.bytes for file in (*index.images, *index.label_files)))
        ref, staged = stage_index(index, store, index_uri, teller.on_counts, teller.on_silence)
        teller.end(f"staged to {store.uri}: {describe_staged(staged)}")
    elif split_staged(request.dataset):
        ref = find_staged(request.dataset, endpoint_of, index_uri, check)
        logger.info("trains on version %s of %s, %d images", ref.version[:12], request.dataset, ref.image_count)
    else:
        ref, staged = register(request, store, index_uri, check, logger.info)
        logger.info("registered in %s, no image moved: %s", store.uri, describe_staged(staged))
        if warning := describe_missing_labels(staged):
            logger.warning(warning)
    # Before the run is written down, which may be long after.
    pin(ref, request, record.run_id, logger.info)
    return ref


def release_dataset(profile: Profile, record: RunRecord) -> None:
    """The run is over, and does not need its version any more. Where the store does not answer, the pin ends by itself."""
    try:
        ref = record.dataset_ref()
        if ref.store_uri is None:
            return
        with access_to(profile.store_access(ref.store_uri)):
            unpin(ref, record.run_id)
    except TrainyardError as exc:
        get_run_logger().warning("the pin of the run's dataset version stays until it expires: %s", exc)


@task(name="open run", task_run_name="open run {record.run_id}", **RETRIES)
def open_run(
    record: RunRecord,
    request: TrainRequest,
    provider: Provider[Any],
    flow_run_id: str,
    index: DatasetIndex | None = None,
    source: DatasetRef | None = None,
) -> RunFile:
    """The run's record: made with its dataset, or found (neither index nor source: it is there) and held against this request."""
    # The dataset first: a run that exists has one.
    if index is not None:
        record.write_dataset(index)
    if source is not None:
        record.write_source(source)
    remember_output(record.output_uri, record.access)
    run = record.open(
        RunFile(
            run_id=record.run_id,
            name=request.name or display_name(dataset_name(request.dataset), request.config.weights or request.config.model),
            request=request.model_dump(mode="json"),
            request_hash=request_hash(request),
            provider=provider.NAME,
            settings=provider.settings.model_dump(mode="json"),
            owner=user_name(),
            flow_run_id=flow_run_id,
            watch=load_profile(request.profile).watch,
            versions={name: importlib.metadata.version(name) for name in ("trainyard", "prefect")},
        )
    )
    note_seen(record.output_uri, {run.run_id: run.name})
    return run


@task(name="plan", task_run_name="plan attempt {spec.attempt}", **RETRIES)
def make_plan(provider: Provider[Any], record: RunRecord, spec: JobSpec) -> Plan:
    """The attempt's plan, written before anything is submitted; another submitter's if that one was first."""
    plan = provider.plan(spec)
    for warning in plan.warnings:
        get_run_logger().warning(warning)
    return record.write_plan(plan)


@task(name="submit", task_run_name="submit attempt {plan.spec.attempt}", **RETRIES)
def submit_job(provider: Provider[Any], record: RunRecord, plan: Plan) -> JobRef:
    """The attempt's job: the recorded one, or found or created from the stored plan."""
    ref = record.ref(plan.spec.attempt)
    asked = find_wish(record, plan.spec.attempt)
    if ref is None and asked is not None:
        cancel_unsubmitted(provider, record, plan.spec.attempt)
        ref = record.ref(plan.spec.attempt)  # of a job that an earlier submitter made, and that is now to be seen through
        if ref is None:
            raise RunCancelled(f"run {record.run_id} was cancelled by {asked.asked_by} before it was submitted")
    if ref is None:
        try:
            ref = provider.submit(plan)
        except TerminalError as exc:
            if exc.refused:  # for good, and nothing was created: the attempt is over, not open for ever
                close_unsubmitted(record, plan.spec.attempt, state=JobState.FAILED, error=exc)
            raise
        record.write_ref(ref)
        record.add_event("submitted", f"attempt {ref.attempt} is job {ref.native_id}", native_id=ref.native_id)
    get_run_logger().info("job %s (attempt %d), log: %s", ref.native_id, ref.attempt, ref.console_url)
    return ref


@task(name="watch", task_run_name="train {plan.spec.config.model}, {plan.spec.config.epochs} epochs", **RETRIES)
def watch_job(provider: Provider[Any], record: RunRecord, plan: Plan, ref: JobRef, listener: Listener) -> JobStatus | None:
    """The job's last status; None where another process has closed the attempt."""
    logger = get_run_logger()
    reporter = ProgressReporter(record, logger)
    guard = StallGuard(record, ref, record.run().watch, provider.CAPABILITIES.poll_seconds[1], logger)

    def tell(status: JobStatus) -> None:
        reporter.report(status)
        listener(status)

    return watch(provider, ref, record, plan.spec.max_runtime_seconds, tell, guard)


@task(name="collect", task_run_name="collect: {status.state.value}", **RETRIES)
def close_attempt(provider: Provider[Any], record: RunRecord, ref: JobRef, status: JobStatus) -> Outcome:
    """Collects the result of a job that is over and writes down how the attempt ended."""
    return close(provider, record, ref, status)
