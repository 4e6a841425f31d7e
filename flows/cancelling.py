"""A person cancels in Prefect: the flow, which is told to end, stops its job first; the hook does it where the flow is gone."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import PrefectException
from prefect.flows import Flow

from blocks.attempts import cancel_run
from blocks.driving import forget
from blocks.record import RunRecord
from flows.identity import record_of_flow_run

# Prefect kills a flow 30 s after it told it to end.
FLOW_WAIT_SECONDS = 12.0


def cancel_job(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Hook, in another process than the flow, which may have been killed: all comes from the record. Repeats what the flow did."""
    record = record_of_flow_run(flow_run)
    if record.exists():
        outcome = cancel_run(record, asked_by=f"Prefect flow run {flow_run.name}", why="cancelled in Prefect")
        if outcome is not None:
            forget(record, str(flow_run.id))


def stop_if_cancelled(record: RunRecord, flow_run_id: str) -> None:
    """The flow was told to end: by a person who cancels it, or by a worker that goes down, which stops no training.

    The hook would stop the job too, but comes some 20 s later.
    """
    try:
        with get_client(sync_client=True) as client:
            flow_run = client.read_flow_run(UUID(flow_run_id))
    except (httpx.HTTPError, PrefectException) as exc:
        get_run_logger().warning("told to end, and Prefect does not say why (%s): the training goes on", exc)
        return
    if flow_run.state is not None and flow_run.state.is_cancelling() and record.exists():
        cancel_run(record, asked_by=f"Prefect flow run {flow_run.name}", why="cancelled in Prefect", wait_seconds=FLOW_WAIT_SECONDS)
