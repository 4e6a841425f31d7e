"""A plan without a run: the dataset is scanned, the request built, nothing written or sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from blocks import image
from blocks.dataset_sources import dataset_name, is_uri, look_at_files, split_staged
from blocks.errors import TrainyardError
from blocks.job import CheckLine, CheckReport, JobSpec, Plan, TrainRequest
from blocks.naming import display_name
from blocks.profiles import Profile, image_settings, load_profile
from blocks.provider import Provider
from blocks.refs import find_version
from trainer.contract import DatasetRef, RunLayout
from trainer.dataset import DatasetIndex, check_dataset
from trainer.store_access import access_to

DRAFT_RUN_ID = "draft"


class Draft(NamedTuple):
    """The plan of a first attempt, and its dataset: None where that lies in a store or a bucket, and is checked where it trains."""

    plan: Plan
    dataset: DatasetIndex | None
    provider: Provider[Any]


def draft_plan(request: TrainRequest) -> Draft:
    """Raises what the run would raise before it submits."""
    profile = load_profile(request.profile)
    index = None
    version, images = DRAFT_RUN_ID, 0  # of a bucket that is not registered yet
    if staged := split_staged(request.dataset):
        with access_to(profile.store_access(profile.choose_store(request))):
            version = find_version(*staged)
            images = look_at_files(staged[0], version)[0]
    elif not is_uri(request.dataset):
        path = Path(request.dataset)
        index = check_dataset(path, task=request.config.task, split=request.split, max_problem_share=request.max_problem_share)
        version, images = index.version, len(index.images)
    provider = profile.provider()
    spec = draft_spec(request, profile, provider, index, version=version, images=images)
    plan = provider.plan(spec.model_copy(update={"image": look_up_image(profile, provider)}))
    return Draft(plan, index, provider)


class ServerAnswer(NamedTuple):
    """What the provider's server says of a plan that it was shown."""

    message: str
    refusal: TrainyardError | None = None

    def report(self, provider: str) -> CheckReport:
        fix = self.refusal.hint if self.refusal is not None else ""
        line = CheckLine(name="server", ok=self.refusal is None, message=self.message, fix=fix)
        return CheckReport(provider=provider, lines=(line,))


def ask_server(draft: Draft) -> ServerAnswer:
    """Shows the plan to the provider's server, which creates nothing."""
    try:
        draft.provider.check_plan(draft.plan)
    except TrainyardError as exc:
        return ServerAnswer(exc.message, exc)
    stand_in = draft.provider.CAPABILITIES.needs_image and draft.plan.spec.image is None
    beside = "; the image is not built yet, so that another name stood for it" if stand_in else ""
    return ServerAnswer(f"takes it (dry run: nothing was created){beside}")


def draft_spec(
    request: TrainRequest,
    profile: Profile,
    provider: Provider[Any],
    index: DatasetIndex | None,
    *,
    version: str = DRAFT_RUN_ID,
    images: int = 0,
) -> JobSpec:
    """What the first attempt will ask for, as far as it is known before anything is written. Raises ConfigError."""
    output_uri = profile.choose_output(request.output)
    access = profile.access.resolve(output_uri)
    in_place = index is not None and not request.stage and provider.CAPABILITIES.local_files
    name = index.name if index else dataset_name(request.dataset)
    return JobSpec(
        run_id=DRAFT_RUN_ID,
        name=request.name or display_name(name, request.config.weights or request.config.model),
        config=request.config,
        dataset=DatasetRef(
            root=index.root if index else request.dataset,
            index_uri=f"{output_uri}/{DRAFT_RUN_ID}/{RunLayout.DATASET}",
            version=version,
            name=name,
            image_count=images,
            store_uri=None if in_place else profile.choose_store(request),
        ),
        resources=request.resources,
        output_uri=output_uri,
        output_endpoint=access.endpoint if access else None,
        max_runtime_seconds=request.max_runtime_seconds,
        max_attempts=request.max_attempts,
        max_cost_usd=request.max_cost_usd,
        project=request.project or "",
        cost_centre=request.cost_centre or "",
        profile=request.profile,
    )


def look_up_image(profile: Profile, provider: Provider[Any]) -> str | None:
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
