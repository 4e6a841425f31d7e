"""Sends a run's news to Prefect as events, which the automations of `trainyard install --notify` turn into messages."""

from __future__ import annotations

import logging
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectException

from blocks.news import News, claim, is_sent, mark_sent, news_of
from blocks.record import RunFile, RunRecord
from flows.reporting_text import format_cost
from trainer.contract import utc_now


def build_event(run: RunFile, news: News) -> dict[str, Any]:
    """Pure. The body of one event as Prefect's ``POST /events`` takes it."""
    cost = format_cost(*news.cost)
    lines = (
        news.subject,
        f"run: {run.run_id} ({run.provider}), owner {run.owner}",
        f"cause: {news.cause}",
        f"cost so far: {cost}",
        f"next: {news.next}",
    )
    return {
        "id": str(news.event_id(run.run_id)),
        "event": news.event,
        "occurred": utc_now().isoformat(),
        "resource": {"prefect.resource.id": f"trainyard.run.{run.run_id}", "prefect.resource.name": run.name},
        "payload": {
            "subject": news.subject,
            "message": "\n".join(lines),
            "run_id": run.run_id,
            "name": run.name,
            "cause": news.cause,
            "cost": cost,
            "next": news.next,
        },
    }


def fetch_known(client: SyncPrefectClient, ids: list[str]) -> set[str]:
    """Which of the events the server has: a teller may have died after it sent them and before it wrote that down.

    The server itself drops an id that it saw in the last five minutes, but forgets those when it restarts.
    """
    answer = client.request("POST", "/events/filter", json={"filter": {"id": {"id": ids}}})  # type: ignore[arg-type]
    answer.raise_for_status()
    return {event["id"] for event in answer.json()["events"]}


def tell_news(record: RunRecord, run: RunFile, logger: logging.Logger | logging.LoggerAdapter[logging.Logger]) -> bool:
    """Sends what was not sent yet. False where something is still to be sent, so that somebody must look again.

    Either the server did not take it, which the log says, or another teller claimed it and may have died since.
    """
    now = utc_now()
    found = news_of(record, run, now)
    untold = [news for news in found if claim(record, news, now)]
    if not untold:
        return all(is_sent(record, news) for news in found)
    try:
        with get_client(sync_client=True) as client:
            known = fetch_known(client, [str(news.event_id(run.run_id)) for news in untold])
            if events := [event for event in (build_event(run, news) for news in untold) if event["id"] not in known]:
                client.request("POST", "/events", json=events).raise_for_status()  # type: ignore[arg-type]
    except (httpx.HTTPError, PrefectException, RuntimeError) as exc:
        logger.warning("Prefect did not take the news %s: %s: %s", ", ".join(news.key for news in untold), type(exc).__name__, exc)
        return False
    for news in untold:
        mark_sent(record, news)
    return all(is_sent(record, news) for news in found)
