"""The image step of a run: for whom there is one, and that one digest serves all attempts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.logging import disable_run_logger
from pydantic import SecretStr, ValidationError

from blocks.errors import ConfigError
from blocks.image import ImageSettings
from blocks.image_ref import ImageRef
from blocks.job import JobSpec, Plan
from blocks.profiles import ImageFields, LocalProfile, image_settings
from blocks.providers.local_process import LocalProvider
from flows import drafting, image
from flows.cli_image import read_argument, read_targets
from trainer.contract import DatasetRef, TrainConfig

PINNED = f"ghcr.io/team/trainer@sha256:{'a' * 64}"


class ContainerProvider(LocalProvider):
    """As one that runs a container."""

    CAPABILITIES = LocalProvider.CAPABILITIES.model_copy(update={"needs_image": True})


class ContainerProfile(ImageFields, LocalProfile):
    _block_type_slug = "trainyard-container-test"


class Attempts:
    """Of a record, what the image step reads."""

    def __init__(self, *plans: Plan) -> None:
        self.plans = dict(enumerate(plans, 1))

    def attempts(self) -> list[int]:
        return list(self.plans)

    def plan(self, number: int) -> Plan | None:
        return self.plans.get(number)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ImageSettings]:
    """The settings that images were asked for with."""
    settings: list[ImageSettings] = []

    def choose(wanted: ImageSettings, _told: object) -> ImageRef:
        settings.append(wanted)
        return ImageRef.parse(PINNED)

    monkeypatch.setattr(image, "choose_image", choose)
    task: Callable[[ImageSettings], str] = image.ensure_image.fn

    def run_task(wanted: ImageSettings) -> str:
        with disable_run_logger():
            return task(wanted)

    monkeypatch.setattr(image, "ensure_image", run_task)
    return settings


def make_plan(image_name: str | None) -> Plan:
    dataset = DatasetRef(root="/data", index_uri="file:///data/index.json", version="1", name="shapes", image_count=1)
    spec = JobSpec(
        run_id="r1", name="r", config=TrainConfig(), dataset=dataset, output_uri="file:///runs", max_runtime_seconds=60, image=image_name
    )
    return Plan(provider="x", spec=spec, instance_type="", region="", request={}, fingerprint="f")


def test_where_no_container_runs_nothing_is_asked(asked: list[ImageSettings]) -> None:
    record: Any = Attempts()
    assert image.image_of_run(LocalProfile(slots=1), LocalProvider.from_settings({}), record) is None
    assert asked == []


def test_the_first_attempt_asks_and_the_next_takes_the_same(asked: list[ImageSettings]) -> None:
    profile = ContainerProfile(slots=1, registry="ghcr.io/team", registry_user="me", registry_password=SecretStr("hunter2"))
    provider = ContainerProvider.from_settings({})
    first: Any = Attempts()
    assert image.image_of_run(profile, provider, first) == PINNED
    assert [str(settings.place()) for settings in asked] == ["ghcr.io/team/trainyard-trainer"]
    assert (asked[0].identity.user, asked[0].identity.password) == ("me", "hunter2")
    assert "hunter2" not in repr(asked[0]) + repr(profile)
    other = PINNED.replace("a" * 64, "b" * 64)
    second: Any = Attempts(make_plan(other))
    assert image.image_of_run(profile, provider, second) == other
    assert len(asked) == 1


def test_a_profile_that_says_nothing_of_images_is_explained() -> None:
    record: Any = Attempts()
    with disable_run_logger(), pytest.raises(ConfigError, match="neither which image trains"):
        image.ensure_image.fn(image_settings(LocalProfile(slots=1)))
    with pytest.raises(ConfigError, match="give it a registry"):
        drafting.look_up_image(ContainerProfile(slots=1), ContainerProvider.from_settings({}))
    assert drafting.look_up_image(LocalProfile(slots=1), LocalProvider.from_settings({})) is None
    assert record.attempts() == []


def test_a_plan_holds_a_digest_only() -> None:
    provider = ContainerProvider.from_settings({})
    problems = provider.validate(make_plan("ghcr.io/team/trainer:latest").spec)
    assert [problem.field for problem in problems] == ["image"]
    assert provider.validate(make_plan(PINNED).spec) == ()
    with pytest.raises(ConfigError, match="draft"):
        provider.submit(make_plan(None))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image": "https://ghcr.io/x"}, "not the name of an image"),
        ({"registry": "ghcr.io/UPPER"}, "not the name of an image"),
        ({"image_base": "a b"}, "not the name of an image"),
        ({"registry_user": "me"}, "go together"),
        ({"image_platform": "windows/amd64"}, "linux/amd64"),
    ],
)
def test_what_is_wrong_in_a_profile_is_told_when_it_is_made(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ContainerProfile(slots=1, **fields)  # type: ignore[arg-type]


def test_a_task_that_fails_shows_no_password(asked: list[ImageSettings]) -> None:
    settings = image_settings(
        ContainerProfile(slots=1, registry="ghcr.io/team", registry_user="me", registry_password=SecretStr("hunter2"))
    )
    assert "hunter2" not in f"{settings!r} {settings}"
    assert asked == []


def test_options_of_the_command_become_one_target_for_each_registry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options: dict[str, Any] = {"registries": ("ghcr.io/team", "127.0.0.1:5000"), "repository": "trainer", "profile": None}
    options |= {"user": "me", "base": "python:3.11", "platform": "linux/arm64"}
    monkeypatch.setenv("TRAINYARD_REGISTRY_PASSWORD", "hunter2")
    targets = read_targets(options)
    assert [str(target.place()) for target in targets] == ["ghcr.io/team/trainer", "127.0.0.1:5000/trainer"]
    assert {(target.base, target.platform, target.identity.password) for target in targets} == {("python:3.11", "linux/arm64", "hunter2")}
    monkeypatch.delenv("TRAINYARD_REGISTRY_PASSWORD")
    with pytest.raises(Exception, match="TRAINYARD_REGISTRY_PASSWORD"):
        read_targets(options)
    assert read_argument("VARIANT=cpu=1") == ("VARIANT", "cpu=1")
    with pytest.raises(Exception, match="NAME=VALUE"):
        read_argument("VARIANT")
    with pytest.raises(Exception, match="TORCH_INDEX holds a user or password") as refused:
        read_argument("TORCH_INDEX=https://me:hunter2@packages.example.com/simple")
    assert "hunter2" not in str(refused.value)
