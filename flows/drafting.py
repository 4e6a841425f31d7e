"""A plan without a run: the dataset is scanned, the request built, nothing written or sent."""

from __future__ import annotations

from pathlib import Path

from blocks.job import JobSpec, Plan, TrainRequest
from blocks.naming import display_name
from blocks.profiles import load_profile
from blocks.record import default_output_uri
from trainer.contract import DatasetRef, RunLayout
from trainer.dataset import DatasetIndex, check_dataset
from trainer.storage import to_uri

DRAFT_RUN_ID = "draft"


def draft_plan(request: TrainRequest) -> tuple[Plan, DatasetIndex]:
    """The plan of a first attempt and the dataset it is for. Raises what the run would raise before it submits."""
    profile = load_profile(request.profile)
    index = check_dataset(Path(request.dataset), task=request.config.task, split=request.split, max_problem_share=request.max_problem_share)
    output_uri = to_uri(request.output or profile.output or default_output_uri())
    spec = JobSpec(
        run_id=DRAFT_RUN_ID,
        name=request.name or display_name(index.name, request.config.weights or request.config.model),
        config=request.config,
        dataset=DatasetRef(
            root=index.root,
            index_uri=f"{output_uri}/{DRAFT_RUN_ID}/{RunLayout.DATASET}",
            version=index.version,
            name=index.name,
            image_count=len(index.images),
        ),
        resources=request.resources,
        output_uri=output_uri,
        max_runtime_seconds=request.max_runtime_seconds,
        max_cost_usd=request.max_cost_usd,
        project=request.project or "",
        cost_centre=request.cost_centre or "",
        profile=request.profile,
    )
    return profile.provider().plan(spec), index
