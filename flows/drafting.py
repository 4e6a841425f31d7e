"""A plan without a run: the dataset is scanned, the request built, nothing written or sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blocks import image
from blocks.dataset_sources import choose_store, dataset_name, is_uri
from blocks.job import JobSpec, Plan, TrainRequest
from blocks.naming import display_name
from blocks.profiles import LocalProfile, image_settings, load_profile
from blocks.provider import Provider
from blocks.record import default_output_uri
from trainer.contract import DatasetRef, RunLayout
from trainer.dataset import DatasetIndex, check_dataset
from trainer.storage import to_uri

DRAFT_RUN_ID = "draft"


def draft_plan(request: TrainRequest) -> tuple[Plan, DatasetIndex | None]:
    """The plan of a first attempt and the dataset it is for, None where that lies in a bucket: nothing is sent, so nobody knows it.

    Raises what the run would raise before it submits.
    """
    profile = load_profile(request.profile)
    index = None
    if not is_uri(request.dataset):
        path = Path(request.dataset)
        index = check_dataset(path, task=request.config.task, split=request.split, max_problem_share=request.max_problem_share)
    provider = profile.provider()
    output_uri = to_uri(request.output or profile.output or default_output_uri())
    name = index.name if index else dataset_name(request.dataset)
    spec = JobSpec(
        run_id=DRAFT_RUN_ID,
        name=request.name or display_name(name, request.config.weights or request.config.model),
        config=request.config,
        dataset=DatasetRef(
            root=index.root if index else request.dataset,
            index_uri=f"{output_uri}/{DRAFT_RUN_ID}/{RunLayout.DATASET}",
            version=index.version if index else DRAFT_RUN_ID,
            name=name,
            image_count=len(index.images) if index else 0,
            store_uri=None if index and not request.stage else choose_store(request, profile.store),
        ),
        resources=request.resources,
        output_uri=output_uri,
        image=look_up_image(profile, provider),
        max_runtime_seconds=request.max_runtime_seconds,
        max_cost_usd=request.max_cost_usd,
        project=request.project or "",
        cost_centre=request.cost_centre or "",
        profile=request.profile,
    )
    return provider.plan(spec), index


def look_up_image(profile: LocalProfile, provider: Provider[Any]) -> str | None:
    """The image by digest; None where the run would build it first, or needs none. Only looks."""
    if not provider.CAPABILITIES.needs_image:
        return None
    found = image.look_up_image(image_settings(profile))
    return str(found) if found else None


def describe_draft_dataset(index: DatasetIndex | None, dataset: str) -> str:
    if index is None:
        return f"{dataset}; read, and checked, where it trains"
    return f"{index.name} ({index.format.value}), {len(index.images)} images, version {index.version[:12]}"
