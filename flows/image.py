"""The image step of a run as a Prefect task. What it does is in `blocks.image`."""

from __future__ import annotations

from typing import Any

from prefect import get_run_logger, task

from blocks.image import ImageSettings, Told, choose_image
from blocks.image_build import BuildStep
from blocks.profiles import Profile, image_settings
from blocks.provider import Provider
from blocks.record import RunRecord
from flows.image_text import describe_step, every_few_seconds
from flows.job_tasks import RETRIES
from flows.staging_text import format_bytes

TELL_SECONDS = 10.0


def image_of_run(profile: Profile, provider: Provider[Any], record: RunRecord) -> str | None:
    """The image by digest, one for all attempts of a run; None where no container runs. An earlier attempt's is taken as it is."""
    if not provider.CAPABILITIES.needs_image:
        return None
    earlier = (plan.spec.image for number in record.attempts() if (plan := record.plan(number)) is not None)
    return next((image for image in earlier if image is not None), None) or ensure_image(image_settings(profile))


@task(name="image", **RETRIES)
def ensure_image(settings: ImageSettings) -> str:
    """The explicit image's digest, or that of ours, built and pushed where it is new. Raises AuthError, ConfigError, QuotaError."""
    logger = get_run_logger()
    due = every_few_seconds(TELL_SECONDS)

    def on_step(step: BuildStep, seconds: float) -> None:
        logger.info(describe_step(step, seconds))

    def on_sent(done: int, total: int) -> None:
        if due():
            logger.info("image: %s of %s sent", format_bytes(done), format_bytes(total))

    image = str(choose_image(settings, Told(say=logger.info, step=on_step, sent=on_sent)))
    logger.info("image %s", image)
    return image
