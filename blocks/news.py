"""What people want to be told of a run, and what of it they were told already. Pure but for the record it reads and marks.

A piece of news has a key that is the same for whoever finds it: the flow, its retry, or `flows.reconcile`.
Telling is claimed create-only under ``told/`` before it is sent, so that it is sent once however many look.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import NAMESPACE_URL, UUID, uuid5

from pydantic import AwareDatetime, Field

from blocks.attempts import Action, next_step_of
from blocks.job import JobState
from blocks.record import Outcome, RunFile, RunRecord
from blocks.spending import UNKNOWN, Cost, run_cost
from trainer.contract import StoredRecord, utc_now

TOLD = "told"
STOP_PATIENCE = timedelta(seconds=60)
# A claim whose owner died before it sent: somebody else sends it, under the same event id.
CLAIM_PATIENCE = timedelta(seconds=60)


class Telling(StoredRecord):
    """``told/<key>.json``."""

    sent: bool = False
    at: AwareDatetime = Field(default_factory=utc_now)


@dataclass(frozen=True, kw_only=True)
class News:
    key: str
    event: str
    subject: str
    cause: str
    next: str
    cost: Cost = UNKNOWN  # of the run so far

    def event_id(self, run_id: str) -> UUID:
        """The same for every teller, so that a server that sees it twice knows it."""
        return uuid5(NAMESPACE_URL, f"trainyard:{run_id}:{self.key}")


def news_of(record: RunRecord, run: RunFile, now: datetime) -> list[News]:
    """All news that the record holds, told or not."""
    request = run.asked()
    attempts = record.attempts()
    found = [
        News(
            key=f"stalled-{event.data.get('attempt', '')}-{event.data.get('cause', '')}",
            event="trainyard.run.stalled",
            subject=f"{run.name} stalled",
            cause=event.message,
            next=f"trainyard status {run.run_id}; trainyard logs {run.run_id}; or stop it: trainyard cancel {run.run_id}",
        )
        for event in record.events()
        if event.kind == "stalled"
    ]
    if not attempts:
        return found
    outcome = record.outcome(attempts[-1])
    asked = record.cancel_request(attempts[-1])
    if outcome is None and asked is not None and now - asked.asked_at > STOP_PATIENCE:
        found.append(
            News(
                key=f"stop-unconfirmed-{attempts[-1]}",
                event="trainyard.run.stop-unconfirmed",
                subject=f"{run.name}: its stop is not confirmed",
                cause=f"{asked.asked_by} asked at {asked.asked_at:%H:%M} UTC, and the job is not over: it may still cost money",
                next=f"trainyard cancel {run.run_id}; see the job itself: {_console(record, attempts[-1])}",
            )
        )
    if outcome is not None and next_step_of(record, max_attempts=request.max_attempts).action is Action.DONE:
        found += _ending(run, outcome, attempts[-1], run_cost(record, attempts[-1]))
    return found


def _ending(run: RunFile, outcome: Outcome, attempt: int, cost: Cost) -> list[News]:
    if outcome.state is JobState.SUCCEEDED:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in (outcome.result.metrics if outcome.result else {}).items())
        model = outcome.result.model_uri if outcome.result else ""
        cause = f"{outcome.epoch} epochs; {figures}"
        subject, next_step = f"{run.name} finished", f"the model: {model}"
        return [News(key="finished", event="trainyard.run.finished", subject=subject, cause=cause, next=next_step, cost=cost)]
    if outcome.state is JobState.FAILED:
        reason = outcome.reason.value if outcome.reason else "unknown"
        return [
            News(
                key=f"failed-{attempt}",
                event="trainyard.run.failed",
                subject=f"{run.name} failed: {reason}",
                cause=outcome.message or "no reason given",
                next=outcome.hint or f"trainyard logs {run.run_id}; trainyard resume {run.run_id} goes on from the last checkpoint",
                cost=cost,
            )
        ]
    return []


def _console(record: RunRecord, attempt: int) -> str:
    ref = record.ref(attempt)
    return ref.console_url if ref else "it was never submitted"


def claim(record: RunRecord, news: News, now: datetime) -> bool:
    """Whether the caller is the one to send this piece of news now."""
    name = f"{TOLD}/{news.key}.json"
    if record.folder.create(name, Telling(at=now).model_dump_json().encode()):
        return True
    telling = _telling(record, news)
    return telling is not None and not telling.sent and now - telling.at > CLAIM_PATIENCE


def is_sent(record: RunRecord, news: News) -> bool:
    telling = _telling(record, news)
    return telling is not None and telling.sent


def _telling(record: RunRecord, news: News) -> Telling | None:
    data = record.folder.get(f"{TOLD}/{news.key}.json")
    return Telling.model_validate_json(data) if data else None


def mark_sent(record: RunRecord, news: News) -> None:
    record.folder.put(f"{TOLD}/{news.key}.json", Telling(sent=True).model_dump_json().encode())
