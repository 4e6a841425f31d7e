"""What is said of images. Pure but for a clock, and imports nothing heavy."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from flows.staging_text import format_bytes

if TYPE_CHECKING:
    from blocks.image import EnsuredImage
    from blocks.image_build import BuildStep

WIDTH = 72


def describe_step(step: BuildStep, seconds: float) -> str:
    what = step.what if len(step.what) <= WIDTH else f"{step.what[: WIDTH - 3]}..."
    stage = f"{step.stage} " if step.stage else ""
    return f"build {stage}{step.number}/{step.count}, {seconds:.0f} s: {what}"


def describe_sent(done: int, total: int, seconds: float) -> str:
    return f"push: {format_bytes(done)} of {format_bytes(total)}, {seconds:.0f} s"


def describe_ensured(ensured: EnsuredImage) -> list[str]:
    lines = [f"{ensured.tag}: {ensured.why}"]
    lines += [f"{ref}" for ref in ensured.refs]
    return lines if ensured.refs else [*lines, f"{ensured.image_id} (here only; --registry pushes it)"]


def every_few_seconds(seconds: float) -> Callable[[], bool]:
    """Whether it is time again."""
    last = time.monotonic()

    def due() -> bool:
        nonlocal last
        now = time.monotonic()
        if now - last < seconds:
            return False
        last = now
        return True

    return due
