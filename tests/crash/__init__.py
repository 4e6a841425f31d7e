"""Processes that die, or are held, at an exact moment: see `sitecustomize` beside this."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CrashPlan:
    """For all processes that have `environment`."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(Path(__file__).parent), "TRAINYARD_CRASH_PLAN": str(self.path)}

    def write(self, moment: str, victims: tuple[str, ...]) -> None:
        for suffix in (".fired", ".go"):
            self.path.with_suffix(suffix).unlink(missing_ok=True)
        self.path.write_text(json.dumps({"moment": moment, "victims": victims}))

    def fired(self) -> bool:
        return self.path.with_suffix(".fired").exists()

    def go_on(self) -> None:
        """What was held at the moment."""
        self.path.with_suffix(".go").touch()
