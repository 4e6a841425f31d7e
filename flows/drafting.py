"""A plan without a run: the dataset is scanned, the request built, nothing written or sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blocks import image
from blocks.dataset_sources import choose_store, dataset_name, is_uri, look_at_files, split_staged
from blocks.job import JobSpec, Plan, TrainRequest
from blocks.naming import display_name
from blocks.profiles import LocalProfile, image_settings, load_profile
from blocks.provider import Provider
from blocks.record import default_output_uri
from blocks.refs import find_version
from trainer.contract import DatasetRef, RunLayout
from trainer.dataset import DatasetIndex, check_dataset
from trainer.storage import to_uri
from trainer.store_access import access_to

DRAFT_RUN_ID = "draft"


def draft_plan(request: TrainRequest) -> tuple[Plan, DatasetIndex | None]:
    """The plan of a first attempt and the dataset it is for, None where that lies in a store or a bucket, and is checked where it trains.

    Raises what the run would raise before it submits.
    """
    profile = load_profile(request.profile)
    index = None
    version, images = DRAFT_RUN_ID, 0  # of a bucket that is not registered yet
    if staged := split_staged(request.dataset):
        with access_to(profile.store_access(staged[0])):
            version = find_version(*staged)
            images = look_at_files(staged[0], version)[0]
    elif not is_uri(request.dataset):
        path = Path(request.dataset)
        index = check_dataset(path, task=request.config.task, split=request.split, max_problem_share=request.max_problem_share)
        version, images = index.version, len(index.images)
    provider = profile.provider()
    output_uri = to_uri(request.output or profile.output or default_output_uri())
    store_uri = staged[0] if staged else None if index and not request.stage else choose_store(request, profile.store)
    name = index.name if index else dataset_name(request.dataset)
    spec = JobSpec(
        run_id=DRAFT_RUN_ID,
        name=request.name or display_name(name, request.config.weights or request.config.model),
        config=request.config,
        dataset=DatasetRef(
            root=index.root if index else request.dataset,
            index_uri=f"{output_uri}/{DRAFT_RUN_ID}/{RunLayout.DATASET}",
            version=version,
            name=name,
            image_count=images,
            store_uri=store_uri,
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


def describe_draft_dataset(index: DatasetIndex | None, ref: DatasetRef) -> str:
    if index is None and ref.image_count:
        return f"{ref.root}, {ref.image_count} images, version {ref.version[:12]}; checked where it trains"
    if index is None:
        return f"{ref.root}; read, and checked, where it trains"
    return f"{index.name} ({index.format.value}), {len(index.images)} images, version {index.version[:12]}"
