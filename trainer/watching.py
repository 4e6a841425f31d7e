"""What others say, in a run's record, of an attempt that trains: that it is to stop, or that it does not count any more."""

from __future__ import annotations

import json
import logging
from typing import Any

from trainer.contract import AttemptLayout, RunLayout, TrainerError, utc_now
from trainer.fencing import Claim, Fenced, refuse_attempt
from trainer.files import write_json
from trainer.storage import ObjectFolder, folders_told_plainly
from trainer.supervisor import StopNote

log = logging.getLogger("trainer")


class RecordWatch:
    """Passes on to the supervisor what the record says. A look costs four or five small requests."""

    def __init__(self, record: str, layout: AttemptLayout, claim: Claim, stop: StopNote) -> None:
        self._run = ObjectFolder(record)
        self._attempts = self._run.child(RunLayout.ATTEMPTS)
        self._layout, self._claim, self.stop = layout, claim, stop
        self._told = ""

    def look(self) -> None:
        """A store that does not answer says nothing, and is asked again."""
        number = self._layout.number
        try:
            with folders_told_plainly():
                self._claim.check()
                refuse_attempt(self._attempts, number, number + 1)
                if not (self._layout / AttemptLayout.STOP).exists() and (wanted := self._read_stop(number)):
                    log.info("the run's record asks this attempt to stop")
                    write_json(self._layout / AttemptLayout.STOP, wanted)
            self._told = ""
        except Fenced as exc:
            if self.stop.fenced is None:
                log.warning("stopping the training: %s", exc)
            self.stop.fenced = exc
        except TrainerError as exc:
            if exc.message != self._told:
                log.warning("the run's record does not say whether to stop: %s", exc)
            self._told = exc.message

    def _read_stop(self, number: int) -> dict[str, Any] | None:
        """Who wants this attempt stopped: an object of its own, or the one of the run where that names it."""
        own = self._attempts.get(f"{number}/{AttemptLayout.STOP}")
        if own is not None:
            return _parse(own) or {"asked_at": utc_now().isoformat()}
        asked = _parse(self._run.get(RunLayout.CANCEL) or b"")
        return asked if asked and asked.get("attempt") == number else None


def _parse(text: bytes) -> dict[str, Any] | None:
    """None for what is no JSON object: it names no attempt."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
