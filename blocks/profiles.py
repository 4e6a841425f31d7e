"""Profiles: saved Prefect Blocks, one class per provider, that say where and how to train. The only module of this room with Prefect.

A flow names a profile; `local` resolves in code, so that a first training needs no set-up.
"""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field

from blocks import load_provider
from blocks.errors import ConfigError
from blocks.job import WatchPolicy
from blocks.provider import Provider


class LocalProfile(Block):
    """Train on the machine where the Prefect worker runs."""

    _block_type_name = "Trainyard Local"
    _block_type_slug = "trainyard-local"
    _description = "Trains on the machine where the flow runs."
    model_config = ConfigDict(extra="forbid")

    # Prefect refuses a block whose fields all have defaults as a flow parameter; one is required.
    slots: int = Field(ge=1, le=64, description="Trainings at a time on this machine; others wait in a queue.")
    output: str | None = Field(default=None, description="Folder for runs. Empty: the runs folder in the user's home.")
    min_free_gib: float = Field(default=1.0, ge=0, description="Refuse to start with less free disk than this, in GiB.")
    stall_factor: float = Field(
        default=30.0, ge=3, le=10_000, description="A training is stalled after so many times the usual time of a step without a step."
    )
    stall_min_seconds: float = Field(
        default=300.0, ge=5, le=86_400, description="Seconds without a step that are no stall yet, however short the steps are."
    )
    stall_phase_seconds: float = Field(
        default=3600.0, ge=60, le=7 * 86_400, description="Seconds of silence that are a stall while data is prepared or a model evaluated."
    )
    queue_limit_seconds: float | None = Field(
        default=None, ge=30, le=28 * 86_400, description="A job that did not start after so many seconds is stalled. Empty: no limit."
    )
    on_stall: Literal["warn", "stop", "restart"] = Field(
        default="warn", description="warn: only tell; stop: cancel the run; restart: a new attempt goes on from the checkpoint."
    )

    @property
    def watch(self) -> WatchPolicy:
        """The fields of the same names as one value, for the run's record."""
        return WatchPolicy(**{name: value for name, value in self.model_dump().items() if name in WatchPolicy.model_fields})

    def provider(self) -> Provider[Any]:
        return load_provider("local", {"slots": self.slots, "min_free_gib": self.min_free_gib})


PROFILES: tuple[type[LocalProfile], ...] = (LocalProfile,)


def load_profile(name: str) -> LocalProfile:
    """The profile saved under `name`, of whichever provider. Raises ConfigError where there is none."""
    if name == "local":
        return LocalProfile(slots=1)
    for kind in PROFILES:
        try:
            loaded = kind.load(name)
        except ValueError:
            continue
        return asyncio.run(loaded) if asyncio.iscoroutine(loaded) else loaded  # type: ignore[arg-type]
    raise ConfigError(
        f"no profile is saved under the name {name!r}",
        hint="save one in the Prefect UI under Blocks (Trainyard ...), or use the profile `local`, which needs none",
    )
