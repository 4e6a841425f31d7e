"""Where a profile keeps runs and datasets, and what of a request lies where its jobs cannot reach it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prefect.blocks.core import Block
from pydantic import ValidationError

from blocks.credentials import AccessRef
from blocks.errors import ConfigError, JobNotFound
from blocks.job import FailureReason, JobRef, JobState, TrainRequest
from blocks.profiles import KubernetesProfile, LocalProfile, Profile
from blocks.provider import Provider, describe_validation
from blocks.providers.local_process import LocalProvider
from flows.drafting import draft_spec
from trainer.contract import AttemptLayout, ExitRecord, TrainConfig, utc_now


class Elsewhere(LocalProvider):
    """As one whose jobs do not see this machine's folders."""

    CAPABILITIES = LocalProvider.CAPABILITIES.model_copy(update={"local_files": False})

    def _validate(self, spec: object) -> tuple[()]:
        return ()


class ElsewhereProfile(Profile, Block):
    _block_type_slug = "trainyard-elsewhere-test"

    def provider(self) -> Provider[Any]:
        return Elsewhere.from_settings({}, self.access)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    monkeypatch.delenv("TRAINYARD_STORE", raising=False)
    return tmp_path


def ask(**fields: Any) -> TrainRequest:
    return TrainRequest.model_validate({"dataset": "/data/bccd", **fields})


def test_runs_lie_below_the_store_unless_the_profile_or_the_request_says_else(monkeypatch: pytest.MonkeyPatch) -> None:
    profile = ElsewhereProfile(store="s3://bucket/data/")
    assert profile.choose_output(None) == "s3://bucket/data/runs"
    assert profile.choose_output("az://box/runs") == "az://box/runs"
    assert profile.choose_store(ask()) == "s3://bucket/data"
    assert profile.choose_store(ask(store="s3://other/x")) == "s3://other/x"
    assert profile.choose_store(ask(dataset="gs://bucket/store#cells")) == "gs://bucket/store"
    assert ElsewhereProfile(store="s3://bucket", output="s3://runs").choose_output(None) == "s3://runs"
    monkeypatch.setenv("TRAINYARD_STORE", "s3://of-the-environment")
    assert ElsewhereProfile().choose_output(None) == "s3://of-the-environment/runs"
    assert ElsewhereProfile().choose_store(ask()) == "s3://of-the-environment"


def test_a_place_on_this_machine_is_refused_where_the_job_runs_elsewhere(home: Path) -> None:
    profile = ElsewhereProfile()
    for refused in (profile.choose_output, lambda _: profile.choose_store(ask())):
        with pytest.raises(ConfigError) as caught:
            refused(None)
        assert "s3://bucket/prefix" in caught.value.hint
    with pytest.raises(ConfigError, match="the job runs elsewhere"):
        profile.choose_output(str(home))
    with pytest.raises(ConfigError, match="the job runs elsewhere"):
        profile.choose_store(ask(dataset="file:///store#cells"))
    local = LocalProfile(slots=1)
    assert local.choose_output(None) == (home / "runs").as_uri()
    assert local.choose_store(ask(dataset="file:///store#cells")) == "file:///store"


def test_files_of_this_machine_are_refused_all_at_once() -> None:
    profile = ElsewhereProfile(store="s3://bucket", store_endpoint="http://127.0.0.1:9")
    provider = profile.provider()
    spec = draft_spec(ask(), profile, provider, None)
    assert provider.validate(spec) == ()
    assert spec.output_endpoint == "http://127.0.0.1:9"
    config = TrainConfig(weights="/data/mine.pt", model="/data/mine.yaml")
    dataset = spec.dataset.model_copy(update={"store_uri": None})
    bad = spec.model_copy(update={"config": config, "output_uri": "file:///runs", "dataset": dataset})
    assert [problem.field for problem in provider.validate(bad)] == ["output", "dataset", "weights", "model"]
    assert LocalProvider.from_settings({}).validate(bad) == ()


def test_how_a_store_is_reached_goes_to_the_provider_and_into_no_settings() -> None:
    profile = ElsewhereProfile(store="s3://bucket", store_endpoint="https://store.example", store_credentials="aws-credentials/prod")
    provider = profile.provider()
    assert provider.access == AccessRef("https://store.example", "aws-credentials/prod")
    assert "store" not in provider.settings.model_dump()


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ({"store_endpoint": "http://user:hunter2@127.0.0.1:17777"}, "store_credentials"),
        ({"store_endpoint": "user:hunter2@store"}, "store_credentials"),
        ({"api_server": "https://user:hunter2@cluster:6443"}, "token"),
        ({"env": {"DATABASE_URL": "postgres://u:hunter2@h/db"}}, "env_secret"),
        ({"env": {"PROXIES": "http://a:3128,http://u:hunter2/x@b:3128"}}, "env_secret"),
        ({"env": {"REDIS": "redis://:4711@h"}}, "env_secret"),
    ],
)
def test_a_password_in_an_address_is_refused_and_not_shown(field: dict[str, Any], hint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        KubernetesProfile.model_validate({"namespace": "vision", **field})
    told = describe_validation(caught.value)
    assert "password" in told
    assert next(iter(field)) in told
    assert hint in told
    assert not re.search("hunter2|4711", told)


def test_an_address_without_a_password_is_none() -> None:
    env = {
        "PROXY": "http://proxy:3128/",
        "AT": "http://h:8080/path@v1",
        "MAIL": '{"url": "http://h:80", "to": "x@y"}',
        "USER_URL": "ssh://git@h/x",
    }
    assert KubernetesProfile(namespace="vision", env=env, store_endpoint="http://127.0.0.1:9").env == env


def test_a_job_that_vanished_is_judged_by_its_record(home: Path) -> None:
    provider = LocalProvider.from_settings({})
    folder = (home / "runs/gone1234/attempts/1").as_uri()
    ref = JobRef(provider="local", native_id="x", run_id="gone1234", attempt=1, output_uri=folder, fingerprint="")
    with pytest.raises(JobNotFound):
        provider.poll(ref)
    lost = provider.observe(ref)
    assert (lost.state, lost.native_state, lost.reason) == (JobState.FAILED, "lost", FailureReason.INFRASTRUCTURE)
    provider.objects(folder).put(AttemptLayout.EXIT, ExitRecord(exit_code=0, started_at=utc_now()).model_dump_json().encode())
    assert provider.observe(ref).state is JobState.SUCCEEDED
