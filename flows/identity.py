"""Which run a flow run is about."""

from __future__ import annotations

from prefect.client.schemas.objects import FlowRun

from blocks.naming import run_id_of_flow_run, run_id_of_key
from blocks.profiles import load_profile
from blocks.record import RunRecord, check_run_id


def choose_run_id(run_id: str | None, run_key: str | None, flow_run_id: str) -> str:
    """Pure. A retry of a flow run keeps its id; a copy or a schedule gets a new one; a run key always the same."""
    if run_id:
        return check_run_id(run_id)
    return run_id_of_key(run_key) if run_key else run_id_of_flow_run(flow_run_id)


def record_of_flow_run(flow_run: FlowRun) -> RunRecord:
    """From its parameters alone, in any process: the run may have a record or not."""
    parameters = flow_run.parameters
    run_id = choose_run_id(parameters.get("run_id"), parameters.get("run_key"), str(flow_run.id))
    profile = load_profile(parameters.get("profile", "local"))
    return RunRecord(profile.choose_output(parameters.get("output")), run_id, profile.access)
