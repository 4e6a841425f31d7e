"""Logins of the clouds' registries: Amazon ECR against moto's server; Azure's exchange against what it is documented to answer."""

from __future__ import annotations

import base64
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import boto3
import httpx
import pytest

from blocks.errors import AuthError, MissingExtra, ServiceUnavailable
from blocks.registry_login import (
    AZURE,
    ECR,
    GOOGLE,
    Identity,
    Login,
    create_ecr_repository,
    exchange_azure_token,
    find_login,
)
from tests.stores import running_moto

ECR_HOST = "123456789012.dkr.ecr.us-east-1.amazonaws.com"


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_moto(tmp_path_factory.mktemp("moto")) as server:
        yield server.address


@pytest.fixture
def aws(moto: str, no_cloud: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_ENDPOINT_URL": moto}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))


@pytest.mark.usefixtures("aws")
def test_ecr_gives_a_login_for_the_identity_of_the_environment() -> None:
    login = find_login(ECR_HOST, Identity())
    assert login is not None
    assert login.user == "AWS"
    assert login.password
    assert login.password not in repr(login)


@pytest.mark.usefixtures("no_cloud")
def test_ecr_gives_a_login_for_saved_credentials(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)

    class Saved:
        def get_boto3_session(self) -> boto3.Session:
            return boto3.Session(aws_access_key_id="testing", aws_secret_access_key="testing")

    login = find_login(ECR_HOST, Identity(load=Saved))
    assert login is not None
    assert login.user == "AWS"


@pytest.mark.usefixtures("aws")
def test_a_repository_is_created_once() -> None:
    assert create_ecr_repository(ECR_HOST, "team/trainer", Identity()) is True
    assert create_ecr_repository(ECR_HOST, "team/trainer", Identity()) is False


@pytest.mark.usefixtures("no_cloud")
def test_without_an_identity_the_stored_login_counts_else_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AuthError, match=r"no AWS credentials.*registry_credentials"):
        find_login(ECR_HOST, Identity())
    stored = base64.b64encode(b"AWS:from-docker-login").decode()
    (tmp_path / "config.json").write_text(f'{{"auths": {{"{ECR_HOST}": {{"auth": "{stored}"}}}}}}')
    assert find_login(ECR_HOST, Identity()) == Login("AWS", "from-docker-login")
    (tmp_path / "config.json").write_text('{"auths": {"ghcr.io": {"auth": "", "identitytoken": "renews"}}}')
    assert find_login("ghcr.io", Identity()) == Login("<token>", "renews")


@pytest.mark.skipif(
    importlib.util.find_spec("google") is not None and importlib.util.find_spec("google.auth") is not None, reason="it is here"
)
def test_what_is_missing_for_google_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with pytest.raises(MissingExtra, match=r"google-auth.*--extra gcp"):
        find_login("europe-west1-docker.pkg.dev", Identity())


def test_the_clouds_are_known_by_their_hosts() -> None:
    hosts = {ECR: [ECR_HOST], GOOGLE: ["europe-west1-docker.pkg.dev", "eu.gcr.io", "gcr.io"], AZURE: ["team.azurecr.io"]}
    for pattern, names in hosts.items():
        for name in names:
            assert [other for other in hosts if other.fullmatch(name)] == [pattern]
    assert not any(
        pattern.fullmatch(name) for pattern in hosts for name in ("ghcr.io", "azurecr.io.example.com", "x-docker.pkg.dev.example.com")
    )


def test_azure_exchanges_a_token_for_the_registrys_own() -> None:
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(200, json={"refresh_token": "of-the-registry"})

    assert exchange_azure_token("team.azurecr.io", "of-entra", httpx.MockTransport(answer)) == "of-the-registry"
    assert str(asked[0].url) == "https://team.azurecr.io/oauth2/exchange"
    form = parse_qs(asked[0].content.decode())
    assert form == {"grant_type": ["access_token"], "service": ["team.azurecr.io"], "access_token": ["of-entra"]}
    with pytest.raises(AuthError, match="AcrPush") as caught:
        exchange_azure_token("team.azurecr.io", "of-entra", httpx.MockTransport(lambda _request: httpx.Response(401)))
    assert "of-entra" not in str(caught.value)

    def is_down(_request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    with pytest.raises(ServiceUnavailable, match="does not answer"):
        exchange_azure_token("team.azurecr.io", "of-entra", httpx.MockTransport(is_down))
