"""Open runs without a live flow run are taken up again: by their own flow run, by a new one, or closed at once.

Whoever drives a run says so in its record (`blocks.driving`) and takes that back at its end; what a killed
flow, worker or server leaves behind is found here. `trainyard up` looks every ten seconds; on a team's server
the deployment `reconcile/local` does, every minute. Repeating a look is harmless, as all steps of a run are.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any
from uuid import UUID

import httpx
from prefect import flow, get_run_logger
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound, PrefectException
from prefect.states import Cancelled, Crashed, Scheduled
from pydantic import ValidationError

from blocks.attempts import Action, Step, cancel_run, close, find_job, next_step_of, provider_of
from blocks.driving import Driver, announce, driven_runs, drivers, forget, is_alive
from blocks.job import JobState
from blocks.record import RunFile, RunRecord
from flows.finding import learn_outputs
from flows.identity import record_of_flow_run
from flows.telling import tell_news
from trainer.contract import AttemptLayout, TrainyardError, utc_now

log = logging.getLogger("trainyard.reconcile")

# Runner and worker report one crash twice, up to about five seconds apart; what is scheduled in between is undone.
SETTLE = timedelta(seconds=10)
# A flow that Prefect itself cancels gets this long, hook included, before somebody else does it.
CANCEL_PATIENCE = timedelta(seconds=40)
# From a worker's claim to the first line of the flow.
START_PATIENCE = timedelta(seconds=60)
# What is older does not start to spend money by itself: no first attempt, and none after one that is found to have ended.
FRESH = timedelta(hours=1)
MOST_RESTARTS = 3
RESTARTED = "restarted"

# What one run's look may run into; ValidationError for a record or a parameter that nobody can read.
TROUBLE = (TrainyardError, ValidationError, httpx.HTTPError, PrefectException)
CANCELLING = (StateType.CANCELLING, StateType.CANCELLED)
STARTING = (StateType.PENDING, StateType.RUNNING)
WAITING = (StateType.SCHEDULED, StateType.PAUSED)


class Decision(StrEnum):
    LEAVE = "leave"
    CANCEL = "cancel"
    RESTART = "restart"  # a flow run goes on with it
    TEND = "tend"  # look at the job from here, and close the run when it is over
    CATCH_UP = "catch-up"  # as TEND; a flow run goes on with it only while its job lives
    FORGET = "forget"  # nothing is left to do


@dataclass(frozen=True, kw_only=True)
class Sight:
    """What one look at a driven run saw."""

    step: Step
    has_record: bool
    driver_alive: bool
    driver_silent: timedelta
    flow_state: StateType | None  # None: Prefect does not know the flow run
    flow_state_age: timedelta
    submitted: bool
    cancel_asked: bool
    restarts: int
    in_vain: bool  # over without success: a flow run that is made in place of the command line's has nothing to do


def decide(sight: Sight) -> Decision:
    """Pure. What is to be done about a run that has a driver's object in its record."""
    if sight.driver_alive:
        stuck = sight.flow_state in CANCELLING and sight.flow_state_age > CANCEL_PATIENCE and sight.step.action is not Action.DONE
        return Decision.CANCEL if stuck else Decision.LEAVE
    over = sight.has_record and sight.step.action is Action.DONE
    orderly = sight.flow_state in (StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED)
    if over and (orderly or sight.flow_state is None):
        return Decision.FORGET
    if sight.flow_state in CANCELLING or sight.cancel_asked:
        return Decision.CANCEL
    # Scheduled again since the driver was last heard of: its new process may be on its way.
    starts = sight.flow_state in STARTING and sight.driver_silent > sight.flow_state_age
    patience = START_PATIENCE if starts else SETTLE
    if sight.flow_state in WAITING or sight.flow_state_age < patience:
        return Decision.LEAVE
    if sight.in_vain:
        return Decision.FORGET
    if sight.restarts < MOST_RESTARTS:
        if over or sight.driver_silent <= FRESH:
            return Decision.RESTART
        if sight.submitted:
            return Decision.CATCH_UP
    return Decision.TEND if sight.has_record and not over else Decision.FORGET


def reconcile_pass() -> list[str]:
    """One look at all runs. Returns a line per thing done; what could not be done is a line too, and tried again at the next look."""
    done: list[str] = []
    with get_client(sync_client=True) as client:
        done += learn_outputs(client)
        silent: list[str] = []
        for record in driven_runs(lambda output, exc: silent.append(f"not looked at: {output.uri}: {exc}")):
            try:
                done += reconcile_run(client, record)
            except TROUBLE as exc:  # one damaged record must not keep the others waiting
                done.append(f"run {record.run_id}: {type(exc).__name__}: {exc}")
        done += silent
        done += restart_unstarted(client)
    return done


def reconcile_run(client: SyncPrefectClient, record: RunRecord) -> list[str]:
    now = utc_now()
    known = drivers(record)
    if not known:
        return []
    latest = max(known, key=lambda driver: driver.seen_at)
    alive = [driver for driver in known if is_alive(driver, now)]
    flow_run = find_flow_run(client, (alive or [latest])[0].flow_run_id)
    run = record.run() if record.exists() else None
    sight = look(record, run, latest, flow_run, alive=bool(alive), now=now)
    decision = decide(sight)
    done: list[str] = []
    successor = ""
    if decision is Decision.CATCH_UP:
        done = catch_up(record, run)
        decision = Decision.LEAVE if done else Decision.RESTART
    match decision:
        case Decision.CANCEL:
            done = cancel(client, record, flow_run)
        case Decision.RESTART:
            done, successor = restart(client, record, run, latest, flow_run, sight)
        case Decision.TEND:
            done = tend(record, run)
        case Decision.FORGET:
            done = []
        case Decision.LEAVE:
            pass
    told = run is None or tell_news(record, run, log)
    if decision in (Decision.FORGET, Decision.CANCEL, Decision.RESTART):
        for driver in known:
            # One that goes on writes its own again. The successor's object stays: its start may come to nothing.
            if driver not in alive and driver.flow_run_id != successor and (decision is not Decision.CANCEL or is_closed(record)):
                settle(client, driver, decision)
                if told or successor:  # else this run is to be looked at again
                    forget(record, driver.flow_run_id)
    return done


def look(record: RunRecord, run: RunFile | None, driver: Driver, flow_run: FlowRun | None, *, alive: bool, now: datetime) -> Sight:
    most = run.asked().max_attempts if run else 1
    step = next_step_of(record, max_attempts=most)
    state = flow_run.state if flow_run else None
    over = step.action is Action.DONE
    outcome = record.outcome(step.attempt) if over and step.attempt else None
    succeeded = outcome is not None and outcome.state is JobState.SUCCEEDED
    deployed = flow_run is not None and flow_run.deployment_id is not None
    return Sight(
        step=step,
        has_record=run is not None,
        driver_alive=alive,
        driver_silent=now - driver.seen_at,
        flow_state=state.type if state else None,
        flow_state_age=now - state.timestamp if state else timedelta.max,
        submitted=step.action is Action.ADOPT and record.ref(step.attempt) is not None,
        cancel_asked=step.action is Action.ADOPT and record.cancel_request(step.attempt) is not None,
        restarts=count_restarts(record),
        in_vain=over and not succeeded and not deployed,
    )


def epoch_of(record: RunRecord) -> str:
    """Where the run stands: restarts count anew when it came further."""
    attempts = record.attempts()
    if not attempts:
        return "0"
    lines = record.folder.get(f"attempts/{attempts[-1]}/{AttemptLayout.PROGRESS_LINES}") or b""
    epochs = len(lines.splitlines())
    return f"{attempts[-1]}:{epochs}"


def count_restarts(record: RunRecord) -> int:
    here = epoch_of(record)
    return sum(event.kind == RESTARTED and event.data.get("at") == here for event in record.events())


def is_closed(record: RunRecord) -> bool:
    return not record.exists() or next_step_of(record, max_attempts=1).action is Action.DONE


def find_flow_run(client: SyncPrefectClient, flow_run_id: str) -> FlowRun | None:
    try:
        return client.read_flow_run(UUID(flow_run_id))
    except ObjectNotFound:
        return None


def cancel(client: SyncPrefectClient, record: RunRecord, flow_run: FlowRun | None) -> list[str]:
    who = f"Prefect flow run {flow_run.name}" if flow_run else "Prefect"
    outcome = cancel_run(record, asked_by=who, why="cancelled in Prefect") if record.exists() else None
    if not is_closed(record):
        return [f"run {record.run_id}: asked to stop, not over yet"]
    if flow_run and flow_run.state and flow_run.state.type is not StateType.CANCELLED:
        client.set_flow_run_state(flow_run.id, Cancelled(message=f"run {record.run_id} was stopped"), force=True)
    return [f"run {record.run_id}: {outcome.state.value if outcome else 'cancelled'}, its flow was gone"]


def restart(
    client: SyncPrefectClient, record: RunRecord, run: RunFile | None, driver: Driver, flow_run: FlowRun | None, sight: Sight
) -> tuple[list[str], str]:
    """The worker runs the same flow run again; a flow run that no worker started gets one of the deployment in its place.

    Returns what was done and the id of the flow run that goes on, empty for none.
    """
    if flow_run is not None and flow_run.deployment_id is not None:
        reschedule(client, flow_run)
        successor = flow_run
    elif run is not None:
        deployment = client.read_deployment_by_name(f"train/{run.provider}")
        parameters: dict[str, Any] = {**run.request, "run_id": record.run_id}
        key = f"{driver.flow_run_id}-{sight.restarts}"
        successor = client.create_flow_run_from_deployment(deployment.id, parameters=parameters, idempotency_key=key)
        announce(record, str(successor.id))
    else:
        return [f"run {record.run_id}: its command ended before it began"], ""
    does = "tells how it ended" if sight.has_record and sight.step.action is Action.DONE else "goes on"
    why = f"the process that watched it is gone; flow run {successor.name} {does}"
    record.add_event(RESTARTED, why, at=epoch_of(record))
    return [f"run {record.run_id}: {why}"], str(successor.id)


def reschedule(client: SyncPrefectClient, flow_run: FlowRun) -> None:
    client.set_flow_run_state(flow_run.id, Scheduled(name="AwaitingRetry", message="its process is gone; it goes on"), force=True)


def settle(client: SyncPrefectClient, driver: Driver, decision: Decision) -> None:
    """A flow run whose process is gone and that nobody runs again must not be shown as running for ever."""
    flow_run = find_flow_run(client, driver.flow_run_id)
    if flow_run is None or flow_run.state is None or flow_run.state.is_final() or flow_run.state.type in WAITING:
        return
    word = "another flow run goes on with the run" if decision is Decision.RESTART else "the run is over"
    client.set_flow_run_state(flow_run.id, Crashed(message=f"its process is gone; {word}"), force=True)


def tend(record: RunRecord, run: RunFile | None) -> list[str]:
    """Restarted often enough: the job is looked at from here, and what it gave is collected when it is over."""
    step = next_step_of(record, max_attempts=1)
    if run is None or step.action is not Action.ADOPT:
        return []
    provider = provider_of(record)
    ref = find_job(provider, record, step.attempt)
    if ref is None:
        return []
    status = provider.observe(ref)
    if not status.state.is_terminal:
        return []
    outcome = close(provider, record, ref, status)
    return [f"run {record.run_id}: closed, {outcome.state.value}"]


def catch_up(record: RunRecord, run: RunFile | None) -> list[str]:
    """As `tend`; empty, too, where its job cannot be asked from here, as its own worker's machine may."""
    try:
        return tend(record, run)
    except TrainyardError as exc:
        log.warning("run %s: its job cannot be looked at from here, and is left to its flow: %s", record.run_id, exc)
        return []


def restart_unstarted(client: SyncPrefectClient) -> list[str]:
    """Flow runs whose process died before its first line: nothing is recorded of them but by Prefect."""
    now = utc_now()
    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING, StateType.CRASHED]))
    found = client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=["train"])),
        flow_run_filter=FlowRunFilter(state=states),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=100,
    )
    done: list[str] = []
    for flow_run in found:
        state = flow_run.state
        if state is None or flow_run.deployment_id is None:
            continue
        age = now - state.timestamp
        if not (START_PATIENCE if state.type is StateType.PENDING else SETTLE) < age < FRESH:
            continue
        try:
            record = record_of_flow_run(flow_run)
        except TROUBLE as exc:
            done.append(f"flow run {flow_run.name}: {type(exc).__name__}: {exc}")
            continue
        if record.exists() or drivers(record) or count_restarts(record) >= MOST_RESTARTS:
            continue
        reschedule(client, flow_run)
        record.add_event(RESTARTED, "its process ended before it began; tried again", at=epoch_of(record))
        done.append(f"flow run {flow_run.name}: its process ended before it began; tried again")
    return done


@flow(name="reconcile", persist_result=False)
def reconcile() -> list[str]:
    """Take up open runs whose flow is gone. Safe to repeat."""
    done = reconcile_pass()
    for line in done:
        get_run_logger().info(line)
    return done
