"""The flow `train`, readable as the story of a run: open, check, dataset, plan, submit, watch, collect, report.

Every step finds what is there or creates it, so the flow may be killed and repeated at any point, on any
machine that sees the run's folder. What stops a job is a person or a limit of its time, never a dead flow.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.runtime import deployment, flow_run as current_flow_run
from prefect.states import Cancelled, Completed

from blocks.attempts import Action, Step, may_resume, next_step_of, result_of
from blocks.dataset_sources import dataset_name
from blocks.driving import Heartbeat, driving
from blocks.errors import RunCancelled
from blocks.job import JobSpec, JobStatus, Resources, Result, TrainRequest, form_field
from blocks.naming import display_name
from blocks.profiles import Profile, load_profile
from blocks.provider import Provider
from blocks.record import RunFile, RunRecord
from blocks.spending import Cost, most_spent, run_cost
from flows import image as image_tasks, job_tasks, reporting
from flows.cancelling import cancel_job, stop_if_cancelled
from flows.drafting import draft_spec
from flows.identity import choose_run_id
from flows.reporting_text import describe_result
from flows.telling import tell_news
from flows.watching import Listener
from trainer.contract import SplitConfig, TrainConfig


def _ignore(_record: RunRecord, _status: JobStatus) -> None:
    """Nobody listens: the flow runs on a worker."""


# The command line listens to the run that it started itself, in the same process.
LISTENER: ContextVar[Any] = ContextVar("LISTENER", default=_ignore)
# What it wrote down when it was asked to resume; a flow run of its own goes by its id.
RESUME_WISH: ContextVar[str] = ContextVar("RESUME_WISH", default="")


def name_flow_run() -> str:
    """Never raises: what is wrong with a parameter is told by the flow, whose state then carries it."""
    try:
        return build_flow_run_name()
    except Exception:
        return f"train-{current_flow_run.id}"


def build_flow_run_name() -> str:
    parameters = current_flow_run.parameters
    config = TrainConfig.model_validate(parameters.get("config") or {})
    name = parameters.get("name") or display_name(dataset_name(str(parameters["dataset"])), config.weights or config.model)
    run_id = choose_run_id(parameters.get("run_id"), parameters.get("run_key"), str(current_flow_run.id))
    return f"{name}-{run_id[:6]}"


ASKED = TrainRequest.model_fields  # constraints and descriptions of the run form in the Prefect UI


@flow(
    name="train",
    flow_run_name=name_flow_run,
    on_cancellation=[cancel_job, reporting.report_ending],
    on_failure=[reporting.report_ending],
    persist_result=False,
)
def train(  # noqa: PLR0913, PLR0917 - the parameters are the run form in the Prefect UI
    dataset: Annotated[str, ASKED["dataset"]],
    profile: Annotated[str, ASKED["profile"]] = "local",
    config: Annotated[TrainConfig, ASKED["config"]] = TrainConfig(),  # noqa: B008 - frozen
    split: Annotated[SplitConfig, ASKED["split"]] = SplitConfig(),  # noqa: B008
    resources: Annotated[Resources, ASKED["resources"]] = Resources(),  # noqa: B008
    max_problem_share: Annotated[float, ASKED["max_problem_share"]] = 0.05,
    max_runtime_seconds: Annotated[int, ASKED["max_runtime_seconds"]] = 86_400,
    max_cost_usd: Annotated[float | None, ASKED["max_cost_usd"]] = None,
    max_attempts: Annotated[int, ASKED["max_attempts"]] = 3,
    stage: Annotated[bool, ASKED["stage"]] = False,
    store: Annotated[str | None, ASKED["store"]] = None,
    labels: Annotated[str | None, ASKED["labels"]] = None,
    name: Annotated[str | None, ASKED["name"]] = None,
    output: Annotated[str | None, ASKED["output"]] = None,
    project: Annotated[str | None, ASKED["project"]] = None,
    cost_centre: Annotated[str | None, ASKED["cost_centre"]] = None,
    run_key: Annotated[str | None, form_field("Run key", "For CI: the same key, a commit and a dataset version, is the same run.")] = None,
    run_id: Annotated[str | None, form_field("Run to go on with", "The id of an earlier run. Empty: a new run.")] = None,
    resume: Annotated[bool, form_field("Resume", "Go on from the checkpoint of that run, which failed or was stopped.")] = False,
) -> dict[str, Any] | State[Any]:
    """Train a vision model on a dataset and return its verified model and figures.

    What is asked for is a TrainRequest, whose fields are described there. With `run_key` or `run_id` the flow finds
    an earlier run; `resume` goes on from its checkpoint where it failed or was stopped.
    """
    request = TrainRequest(
        dataset=dataset,
        profile=profile,
        config=config,
        split=split,
        resources=resources,
        max_problem_share=max_problem_share,
        max_runtime_seconds=max_runtime_seconds,
        max_cost_usd=max_cost_usd,
        max_attempts=max_attempts,
        stage=stage,
        store=store,
        labels=labels,
        output=output,
        name=name,
        project=project,
        cost_centre=cost_centre,
    )
    flow_run_id = str(current_flow_run.id)
    saved = load_profile(profile)
    record = RunRecord(saved.choose_output(output), choose_run_id(run_id, run_key, flow_run_id), saved.access)
    if run_key and record.exists() and record.run().flow_run_id != flow_run_id:
        job_tasks.require_same_dataset(record, request)
    deployed = deployment.id is not None
    with driving(record, flow_run_id, deployed=deployed, max_attempts=max_attempts) as heart:
        try:
            run, result = go_through(saved, record, request, flow_run_id, heart, resume=resume)
        except TerminationSignal:
            stop_if_cancelled(record, flow_run_id)
            raise
        except RunCancelled as exc:
            if LISTENER.get() is not _ignore:
                raise
            # Stopped from the command line, say: Prefect shows it as what it is, not as a failure.
            return end_as_cancelled(str(exc))
    cost = run_cost(record)
    return Completed(data=summarize(run, result, cost), message=describe_result(result, cost))


def end_as_cancelled(message: str) -> State[Any]:
    """The state of a run that was stopped from outside Prefect, after its report: no hook runs for a returned state."""
    state = Cancelled(message=message)
    context = FlowRunContext.get()
    if context is not None and context.flow_run is not None:
        reporting.report_ending(train, context.flow_run, state)
    return state


def go_through(
    profile: Profile, record: RunRecord, request: TrainRequest, flow_run_id: str, heart: Heartbeat, *, resume: bool
) -> tuple[RunFile, Result]:
    """From whatever the record holds to the result."""
    provider = profile.provider()
    listener = LISTENER.get()
    index = source = image = None
    if not record.exists():
        # What is refused is refused before anything is written.
        job_tasks.check_provider(provider, record.output_uri)
        index = job_tasks.read_dataset(request)
        provider.require_valid(draft_spec(request, profile, provider, index))
        image = image_tasks.image_of_run(profile, provider, record)
        if request.stage or index is None or not provider.CAPABILITIES.local_files:
            source = job_tasks.stage_dataset(profile, request, record, index, listener)
    run = job_tasks.open_run(record, request, provider, flow_run_id, index, source)

    def find_image() -> str | None:
        return image or image_tasks.image_of_run(profile, provider, record)

    def on_status(status: JobStatus) -> None:
        if heart.is_due():
            tell_news(record, run, get_run_logger())  # that it stalled, say
        listener(record, status)

    resume = resume and may_resume(record, RESUME_WISH.get() or flow_run_id)
    step = next_step_of(record, max_attempts=request.max_attempts, resume=resume)
    try:
        while step.action is not Action.DONE:
            run_attempt(provider, record, run, request, step, on_status, find_image)
            step = next_step_of(record, max_attempts=request.max_attempts)
        job_tasks.release_dataset(profile, record)
        result = result_of(record, step)
        reporting.publish_report(record, run, result, get_run_logger())
    except Exception:
        heart.keep = not tell_news(record, run, get_run_logger())
        raise
    heart.keep = not tell_news(record, run, get_run_logger())
    return run, result


def run_attempt(
    provider: Provider[Any],
    record: RunRecord,
    run: RunFile,
    request: TrainRequest,
    step: Step,
    listener: Listener,
    image: Callable[[], str | None],
) -> None:
    """One attempt from its plan to its outcome. An open attempt is adopted: its dataset may not be on this machine."""
    plan = record.plan(step.attempt)
    if plan is None:
        spec = JobSpec(
            run_id=run.run_id,
            attempt=step.attempt,
            name=run.name,
            config=request.config,
            dataset=record.dataset_ref(),
            resources=request.resources,
            output_uri=record.output_uri,
            output_endpoint=endpoint_of(record),
            image=image(),
            max_runtime_seconds=request.max_runtime_seconds,
            max_attempts=request.max_attempts,
            max_cost_usd=request.max_cost_usd,
            spent_usd=most_spent(record, step.attempt),
            owner=run.owner,
            project=request.project or "",
            cost_centre=request.cost_centre or "",
            flow_run_id=run.flow_run_id,
            profile=request.profile,
        )
        plan = job_tasks.make_plan(provider, record, spec)
    ref = job_tasks.submit_job(provider, record, plan)
    status = job_tasks.watch_job(provider, record, plan, ref, listener)
    if status is not None:
        job_tasks.close_attempt(provider, record, ref, status)


def endpoint_of(record: RunRecord) -> str | None:
    """Where the job finds the record's store, if that is not at its cloud's own address."""
    access = record.access.resolve(record.uri)
    return access.endpoint if access else None


def summarize(run: RunFile, result: Result, cost: Cost) -> dict[str, Any]:
    """The one object that `--json` prints and the flow returns."""
    return {
        "run_id": run.run_id,
        "name": run.name,
        "state": "succeeded",
        "model_uri": result.model_uri,
        "manifest_uri": result.manifest_uri,
        "metrics": result.metrics,
        "metrics_split": result.metrics_split,
        "cost_usd": cost.usd,
        "cost_at_least": cost.at_least,
        "duration_seconds": result.duration_seconds,
    }
