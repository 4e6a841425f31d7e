"""What is put on a Prefect server, without one: names, webhooks, automations, what counts as a change."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock, MicrosoftTeamsWebhook, SlackWebhook

from blocks.errors import ConfigError
from flows import installing

SLACK = "https://hooks.slack.com/services/T1AAAAAAA/B1AAAAAAA/AAAAAAAAAAAAAAAAAAAAAAAA"
TEAMS = (
    "https://prod-1.westeurope.logic.azure.com:443/workflows/0123456789abcdef0123456789abcdef/triggers/manual/paths/invoke"
    "?api-version=2016-06-01&sp=%2Ftriggers%2Fmanual%2Frun&sv=1.0&sig=" + "s" * 43
)
OTHER = "https://chat.example.com/hooks/verysecret"


def test_every_deployment_of_the_repository_is_known() -> None:
    names = installing.deployment_names(installing.REPOSITORY / "prefect.yaml")
    assert {"train/local", installing.RECONCILE} <= set(names)


def test_deployments_are_named_after_their_flows() -> None:
    import yaml
    from prefect.utilities.importtools import import_object

    path = installing.REPOSITORY / "prefect.yaml"
    entries: list[dict[str, Any]] = yaml.safe_load(path.read_text())["deployments"]
    flows: list[Any] = [import_object(entry["entrypoint"]) for entry in entries]
    assert [f"{flow.name}/{entry['name']}" for flow, entry in zip(flows, entries, strict=True)] == installing.deployment_names(path)


@pytest.mark.parametrize(("url", "kind"), [(SLACK, SlackWebhook), (TEAMS, MicrosoftTeamsWebhook), (OTHER, CustomWebhookNotificationBlock)])
def test_webhook_is_a_secret_of_its_block(url: str, kind: type[Any]) -> None:
    block = installing.build_webhook(url)
    assert isinstance(block, kind)
    assert url not in repr(block)
    assert url.rpartition("/")[2] not in str(block.model_dump(mode="json"))


def test_custom_webhook_sends_subject_and_text() -> None:
    block = installing.build_webhook(OTHER)
    assert isinstance(block, CustomWebhookNotificationBlock)
    request = block._build_request_args("the text {{subject}}", "the subject")  # pyright: ignore[reportPrivateUsage]
    assert request["url"] == OTHER
    assert request["json"]["subject"] == "the subject"
    assert request["json"]["text"].startswith("the text")


@pytest.mark.parametrize("url", ["", "secret", "ftp://secret/x", "https://", "https://prod.logic.azure.com/secret"])
def test_bad_webhook_is_refused_without_being_shown(url: str) -> None:
    with pytest.raises(ConfigError, match="--notify") as caught:
        installing.build_webhook(url)
    assert "secret" not in f"{caught.value.message} {caught.value.hint}"


def test_one_automation_per_event_that_sends_the_event_s_own_words() -> None:
    block_id = uuid4()
    made = [installing.build_automation(event, block_id) for event in installing.EVENTS]
    assert len({automation.name for automation in made}) == len(installing.EVENTS)
    dumped = made[0].model_dump(mode="json")
    assert dumped["trigger"]["expect"] == [next(iter(installing.EVENTS))]
    assert dumped["trigger"]["match"] == {"prefect.resource.id": "trainyard.run.*"}
    assert dumped["actions"][0]["block_document_id"] == str(block_id)
    assert dumped["actions"][0]["body"] == "{{ event.payload.message }}"


def test_events_are_those_that_runs_send() -> None:
    from pathlib import Path

    from blocks import news

    text = Path(news.__file__).read_text()
    assert all(f'"{event}"' in text for event in installing.EVENTS)


def test_what_changes_by_itself_is_no_change() -> None:
    before = {"name": "a", "updated": "1", "schedules": [{"id": "1", "active": True}]}
    after = {"name": "a", "updated": "2", "schedules": [{"id": "2", "active": True}]}
    assert installing.without_fleeting(before) == installing.without_fleeting(after)
    assert installing.describe_change(None, {}) == "made"
    assert installing.describe_change({"a": 1}, {"a": 1}) == "unchanged"
    assert installing.describe_change({"a": 1}, {"a": 2}) == "updated"


def test_worker_without_trainyard_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util
    import timeit

    import yaml

    steps: list[dict[str, Any]] = yaml.safe_load((installing.REPOSITORY / "prefect.yaml").read_text())["pull"]
    step: dict[str, Any] = steps[0]["timeit.timeit"]
    timeit.timeit(**step)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(RuntimeError, match="Trainyard is not installed where this worker runs"):
        timeit.timeit(**step)
