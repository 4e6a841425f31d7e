"""What Trainyard needs on a Prefect server: blocks, work pool, deployments, automations. Shared by `up` and `install`.

Everything is made or brought up to date under a stable name, so all of it may be repeated.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from uuid import UUID

import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock, MicrosoftTeamsWebhook, SlackWebhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.actions import SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.types import SecretDict
from prefect.workers.process import ProcessWorker
from pydantic import SecretStr

from blocks.errors import ConfigError, ServiceUnavailable
from blocks.profiles import PROFILES
from flows.server import NOTIFY, POOL

REPOSITORY = Path(__file__).parents[1]
DEPLOY_SECONDS = 300
RECONCILE = "reconcile/local"
NOTIFY_BLOCK = "trainyard-notify"
EVENTS = {
    "trainyard.run.finished": "a run finished",
    "trainyard.run.failed": "a run failed",
    "trainyard.run.stalled": "a run stalled",
    "trainyard.run.stop-unconfirmed": "a stop is not confirmed",
}
TAGS = ["trainyard"]
# What changes of a deployment although nobody changed it.
FLEETING = {"id", "created", "updated", "created_by", "updated_by", "last_polled", "status", "deployment_id"}

WebhookBlock = SlackWebhook | MicrosoftTeamsWebhook | CustomWebhookNotificationBlock
Say = Callable[[str], None]


def install(say: Say, *, notify: str | None = None, reconcile_by_schedule: bool) -> None:
    """Says a line per item. The server is the one of Prefect's settings."""
    webhook = build_webhook(notify) if notify else None
    with connect() as client:
        for profile in PROFILES:
            say(f"block        {profile.get_block_type_slug()}: {register_block(client, profile)}")
        say(f"work pool    {POOL}: {make_pool(client)}")
        for name, outcome in apply_deployments(client, reconcile_by_schedule=reconcile_by_schedule):
            say(f"deployment   {name}: {outcome}")
        if webhook is None:
            there = sum(bool(client.read_automations_by_name(automation_name(event))) for event in EVENTS)
            say(f"automations  {f'{there} left as they are' if there else 'none; `--notify URL` sends the news of runs to a webhook'}")
            return
        block_id, outcome = save_webhook(client, webhook)
        say(f"webhook      {type(webhook).__name__}: {outcome}")
        for event in EVENTS:
            say(f"automation   {automation_name(event)}: {apply_automation(client, build_automation(event, block_id))}")


def connect() -> AbstractContextManager[SyncPrefectClient]:
    return get_client(sync_client=True)


# --- Blocks and pool --------------------------------------------------------------------------------------------------


def register_block(client: SyncPrefectClient, profile: type[Any]) -> str:
    slug: str = profile.get_block_type_slug()
    before = _schema_checksum(client, slug)
    profile.register_type_and_schema()
    after = _schema_checksum(client, slug)
    return "registered" if before is None else "unchanged" if before == after else "updated"


def _schema_checksum(client: SyncPrefectClient, slug: str) -> str | None:
    """Of the newest schema; None where the server does not know the block."""
    try:
        kind = client.read_block_type_by_slug(slug)
    except ObjectNotFound:
        return None
    schema = client.get_most_recent_block_schema_for_block_type(kind.id)
    return schema.checksum if schema else None


def make_pool(client: SyncPrefectClient) -> str:
    """Whatever a person set on a pool that is there stays."""
    template = ProcessWorker.get_default_base_job_template()
    try:
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
    except ObjectAlreadyExists:
        return "unchanged"
    return "made"


# --- Deployments --------------------------------------------------------------------------------------------------------


def apply_deployments(client: SyncPrefectClient, *, reconcile_by_schedule: bool) -> list[tuple[str, str]]:
    """Those of the repository's prefect.yaml, by `prefect deploy`. `up` reconciles by itself, so its schedule rests there."""
    names = deployment_names(REPOSITORY / "prefect.yaml")
    before = {name: read_deployment(client, name) for name in names}
    deploy()
    if not reconcile_by_schedule:
        deployment = client.read_deployment_by_name(RECONCILE)
        for schedule in deployment.schedules:
            client.update_deployment_schedule(deployment.id, schedule.id, active=False)
    after = {name: read_deployment(client, name) for name in names}
    return [(name, describe_change(before[name], after[name])) for name in names]


def deployment_names(path: Path) -> list[str]:
    """`flow/deployment` for each deployment of a prefect.yaml. Flows are named like their functions here."""
    if not path.exists():
        raise ConfigError(f"{path} is missing", hint="Trainyard is installed without its repository: use a clone of it, with `uv sync`")
    loaded = cast("dict[str, Any]", yaml.safe_load(path.read_text()))
    return [f"{entry['entrypoint'].rpartition('.')[2]}/{entry['name']}" for entry in loaded["deployments"]]


def read_deployment(client: SyncPrefectClient, name: str) -> dict[str, Any] | None:
    """What a person or a prefect.yaml sets of a deployment; None where there is none."""
    try:
        found = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None
    return cast("dict[str, Any]", without_fleeting(found.model_dump(mode="json", warnings=False)))


def without_fleeting(value: Any) -> Any:
    """Pure. `value` without the fields that change by themselves, at any depth."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: without_fleeting(inner) for name, inner in fields.items() if name not in FLEETING}
    return [without_fleeting(inner) for inner in cast("list[Any]", value)] if isinstance(value, list) else value


def describe_change(before: Any, after: Any) -> str:
    return "made" if before is None else "unchanged" if before == after else "updated"


def deploy() -> None:
    """`prefect deploy --all`, as documented. Raises ServiceUnavailable with its last lines where it fails."""
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--all"]
    environment = {name: value for name, value in os.environ.items() if name != NOTIFY}
    try:
        done = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEPLOY_SECONDS,
            start_new_session=True,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise ServiceUnavailable(f"`prefect deploy --all` took longer than {DEPLOY_SECONDS} s", hint="look at the server's log") from exc
    if done.returncode != 0:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
        raise ServiceUnavailable(f"`prefect deploy --all` failed; its last words:\n{last}", hint="the same command again repeats it safely")


# --- Automations --------------------------------------------------------------------------------------------------------


def build_webhook(url: str) -> WebhookBlock:
    """The notification block for `url`, which only its secret fields hold. Raises ConfigError, without the URL in it."""
    host = urlsplit(url).hostname if urlsplit(url).scheme in ("http", "https") else None
    if not host:
        raise ConfigError("--notify: this is no http or https address", hint="give the URL of a Slack, Teams or other webhook")
    try:
        if host in ("hooks.slack.com", "hooks.slack-gov.com"):
            return SlackWebhook(url=SecretStr(url))
        if host.endswith((".logic.azure.com", ".api.powerplatform.com")):
            return MicrosoftTeamsWebhook(url=SecretStr(url))
    except ValueError as exc:
        raise ConfigError(f"--notify: {host} would not know this webhook", hint="copy its whole URL") from exc.__cause__
    return CustomWebhookNotificationBlock(
        name=NOTIFY_BLOCK,
        url="{{webhook}}",  # this field is plain text in Prefect; only `secrets` is hidden
        secrets=SecretDict({"webhook": url}),
        json_data={"subject": "{{subject}}", "text": "{{body}}"},
        headers=None,
        cookies=None,
    )


def save_webhook(client: SyncPrefectClient, webhook: WebhookBlock) -> tuple[UUID, str]:
    """Saves it in the place of an earlier one, of whatever kind. Returns its id and what was done."""
    before: dict[str, Any] | None = None
    for kind in (SlackWebhook, MicrosoftTeamsWebhook, CustomWebhookNotificationBlock):
        try:
            found = client.read_block_document_by_name(NOTIFY_BLOCK, kind.get_block_type_slug(), include_secrets=True)
        except ObjectNotFound:
            continue
        if kind is type(webhook):
            before = found.data
        else:
            client.delete_block_document(found.id)
            before = {}
    block_id = cast("UUID", webhook.save(NOTIFY_BLOCK, overwrite=True))
    after = client.read_block_document_by_name(NOTIFY_BLOCK, webhook.get_block_type_slug(), include_secrets=True).data
    return block_id, describe_change(before, after)


def automation_name(event: str) -> str:
    return f"trainyard: {EVENTS[event]}"


def build_automation(event: str, block_id: UUID) -> AutomationCore:
    """Pure. One message per event, by its own words."""
    trigger = EventTrigger(
        expect={event},
        match=ResourceSpecification.model_validate({"prefect.resource.id": "trainyard.run.*"}),
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
    )
    action = SendNotification(block_document_id=block_id, subject="{{ event.payload.subject }}", body="{{ event.payload.message }}")
    return AutomationCore(
        name=automation_name(event),
        description=f"Sends {event} to the block {NOTIFY_BLOCK}. Made by `trainyard install --notify`.",
        tags=TAGS,
        trigger=trigger,
        actions=[action],
    )


def apply_automation(client: SyncPrefectClient, wanted: AutomationCore) -> str:
    """One per name, however often this runs. One that a person switched off stays off."""
    found = client.read_automations_by_name(wanted.name)
    for double in found[1:]:
        client.delete_automation(double.id)
    if not found:
        client.create_automation(wanted)
        return "made"
    wanted.enabled = found[0].enabled
    before = AutomationCore.model_validate(found[0].model_dump())
    if _fields(before) == _fields(wanted):
        return "unchanged"
    client.update_automation(found[0].id, wanted)
    return "updated"


def _fields(automation: AutomationCore) -> dict[str, Any]:
    dumped = automation.model_dump(mode="json", exclude={"owner_resource"})
    return cast("dict[str, Any]", without_fleeting({**dumped, "trigger": sort_lists(dumped["trigger"])}))


def sort_lists(value: Any) -> Any:
    """Pure. Sets become lists in whatever order."""
    if isinstance(value, dict):
        return {name: sort_lists(inner) for name, inner in cast("dict[str, Any]", value).items()}
    return sorted(cast("list[Any]", value), key=str) if isinstance(value, list) else value
