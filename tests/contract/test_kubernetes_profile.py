"""The Kubernetes profile as a saved block: what reaches the provider, and that its secrets reach nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.settings import PREFECT_HOME, temporary_settings
from prefect.testing.utilities import prefect_test_harness
from pydantic import ValidationError

from blocks.errors import ConfigError
from blocks.profiles import KubernetesProfile, load_cluster_credentials, load_profile
from blocks.providers.kubernetes_client import find_kubeconfig
from blocks.providers.kubernetes_job import KubernetesProvider
from blocks.providers.kubernetes_settings import KubernetesSettings
from flows.cli import app
from tests.unit.test_blocks_kubernetes_request import make_spec

SECRET = "hunter2-very-secret"
KUBECONFIG = {
    "clusters": [{"name": "c", "cluster": {"server": "https://cluster"}}],
    "users": [{"name": "u", "user": {"token": SECRET}}],
    "contexts": [{"name": "prod", "context": {"cluster": "c", "user": "u"}}],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with temporary_settings({PREFECT_HOME: tmp_path_factory.mktemp("prefect")}), prefect_test_harness(server_startup_timeout=180):
        yield


def settings_of(profile: KubernetesProfile) -> KubernetesSettings:
    provider = profile.provider()
    assert isinstance(provider, KubernetesProvider)
    return provider.settings


def test_fields_of_the_profile_are_the_settings_of_its_provider() -> None:
    profile = KubernetesProfile(namespace="vision", instance_classes={"t4": {"gpus": 1}}, pod_patch={"runtimeClassName": "nvidia"})  # type: ignore[arg-type]
    settings = settings_of(profile)
    assert settings.namespace == "vision"
    assert settings.instance_classes["t4"].gpus == 1
    assert settings.pod_patch == {"runtimeClassName": "nvidia"}
    with pytest.raises(ValidationError, match="cache_pvc"):
        KubernetesProfile(namespace="vision", enable_shared_cache=True)
    with pytest.raises(ValidationError, match="keep_seconds"):
        KubernetesProfile(namespace="vision", keep_seconds=0)
    with pytest.raises(ValidationError, match="namespace"):
        KubernetesProfile(namespace="Vision Team")


def test_files_of_a_profile_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert KubernetesProfile(namespace="vision", kubeconfig_path="config").kubeconfig_path == str(tmp_path / "config")
    assert KubernetesProfile(namespace="vision", kubeconfig_path="~/config").kubeconfig_path == str(tmp_path / "home/config")
    pem = "-----BEGIN CERTIFICATE-----\nx"
    for given, kept in (("ca.pem", str(tmp_path / "ca.pem")), ("/etc/ca.pem", "/etc/ca.pem"), (pem, pem), ("", "")):
        assert KubernetesProfile(namespace="vision", ca_certificate=given).ca_certificate == kept


@pytest.mark.usefixtures("server")
def test_secrets_of_a_saved_profile_are_found_again_by_reference() -> None:
    KubernetesProfile(namespace="vision", api_server="https://cluster", token=SECRET).save("prod")  # type: ignore[arg-type, unused-coroutine]
    profile = load_profile("prod")
    assert isinstance(profile, KubernetesProfile)
    recorded = settings_of(profile).model_dump(mode="json")
    assert SECRET not in json.dumps(recorded) + repr(profile)
    assert recorded["credentials"] == "trainyard-kubernetes/prod"
    document, _ = find_kubeconfig(KubernetesSettings.model_validate(recorded))
    assert document is not None
    assert document["users"][0]["user"] == {"token": SECRET}


@pytest.mark.usefixtures("server")
def test_a_cluster_config_of_prefect_kubernetes_is_read_without_its_package(tmp_path: Path) -> None:
    from prefect_kubernetes.credentials import KubernetesClusterConfig

    saved: Any = KubernetesClusterConfig(config=KUBECONFIG, context_name="prod")
    assert isinstance(saved, Block)
    saved.save("shared")
    assert load_cluster_credentials("kubernetes-cluster-config/shared") == {"kubeconfig": KUBECONFIG, "context": "prod"}
    document, context = find_kubeconfig(KubernetesSettings(credentials="kubernetes-cluster-config/shared"))
    assert (document, context) == (KUBECONFIG, "prod")
    provider = KubernetesProvider(KubernetesSettings(credentials="kubernetes-cluster-config/shared"))
    assert ["plain field" in warning for warning in provider.plan(make_spec()).warnings] == [True]


@pytest.mark.usefixtures("server")
def test_a_profile_is_saved_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "profile.yaml"
    file.write_text("provider: kubernetes\nnamespace: vision\nstore: s3://bucket/x\n")
    done = CliRunner().invoke(app, ["profile", "save", "from-file", "--file", str(file)], catch_exceptions=False)
    assert "saved trainyard-kubernetes/from-file" in done.stdout
    file.write_text(file.read_text().replace("vision", "other"))
    CliRunner().invoke(app, ["profile", "save", "from-file", "--file", str(file)], catch_exceptions=False)
    profile = load_profile("from-file")
    assert isinstance(profile, KubernetesProfile)
    assert (profile.namespace, profile.store) == ("other", "s3://bucket/x")
    for text, name, told in (
        ("provider: kubernetes\nnamespace: Vision", "bad", "namespace"),
        ("provider: kubernetes\nnamespace: vision\nqueue: x", "bad", "queue_name"),
        ("provider: kubernetes\nnamespace: vision\nkeep_seconds: 0", "bad", "keep_seconds: .*how it ended"),
        ("provider: kubernets", "bad", "kubernetes"),
        ("provider: local\nslots: 1", "from-file", "has the name"),
        ("provider: local\nslots: 1", "local", "no name for a profile"),
        ("- a list", "bad", "holds no fields"),
    ):
        file.write_text(text)
        refused = CliRunner().invoke(app, ["profile", "save", name, "--file", str(file)])
        assert isinstance(refused.exception, ConfigError)
        assert re.search(told, refused.exception.message), refused.exception
        assert refused.exception.hint


@pytest.mark.usefixtures("server")
def test_a_saved_profile_that_does_not_fit_any_more_is_told_by_field() -> None:
    KubernetesProfile(namespace="vision").save("older")  # type: ignore[unused-coroutine]
    with get_client(sync_client=True) as client:
        document = client.read_block_document_by_name("older", "trainyard-kubernetes")
        client.update_block_document(document.id, BlockDocumentUpdate(data={"namespace": "vision", "keep_seconds": 0}))
    with pytest.raises(ConfigError, match="'older' does not fit this version: keep_seconds: at least 600") as told:
        load_profile("older")
    assert "profile save" in told.value.hint


@pytest.mark.usefixtures("server")
def test_credentials_that_are_not_there_are_told() -> None:
    with pytest.raises(ConfigError, match="no credentials are saved"):
        load_cluster_credentials("kubernetes-cluster-config/nobody")
    with pytest.raises(ConfigError, match="no kind of credentials"):
        load_cluster_credentials("aws-credentials/prod")
