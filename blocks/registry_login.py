"""Who a registry is told we are: a given user, the cloud's own identity, or what `docker login` stored. Secrets stay in memory.

Amazon ECR, Google Artifact Registry and Azure ACR give a short-lived password for the identity of the profile's
credentials or of this machine; every other registry knows a user and a password.
"""

from __future__ import annotations

import base64
import importlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from blocks.errors import AuthError, ConfigError, MissingExtra, ServiceUnavailable
from blocks.image_ref import DOCKER_HUB

ECR = re.compile(r"(?P<account>\d{12})\.dkr[.-]ecr(?:-fips)?\.(?P<region>[a-z0-9-]+)\.(?:amazonaws\.com(?:\.cn)?|on\.aws)")
GOOGLE = re.compile(r"(?:[a-z0-9-]+-docker\.pkg\.dev|(?:[a-z]+\.)?gcr\.io)")
AZURE = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*\.azurecr\.(?:io|cn|us)")
AZURE_USER = "00000000-0000-0000-0000-000000000000"
IDENTITY_TOKEN = "<token>"  # noqa: S105 - docker's own word, in a user's place, for a token that gives others
CLOUD_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


@dataclass(frozen=True)
class Login:
    user: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Identity:
    """What a profile or the command line says of how to log in. `load` brings a saved block of credentials, when it is needed."""

    user: str = ""
    password: str = field(default="", repr=False)
    load: Callable[[], Any] | None = None


def find_login(registry: str, identity: Identity) -> Login | None:
    """None: nothing is known, so anonymous. Raises AuthError where a cloud's identity is wanted and there is none."""
    if identity.user or identity.password:
        if not (identity.user and identity.password):
            raise ConfigError("a registry's user and password go together", hint="give both, or neither")
        return Login(identity.user, identity.password)
    cloud = next((login for pattern, login in CLOUD_LOGINS.items() if pattern.fullmatch(registry)), None)
    if cloud is None:
        return stored_login(registry)
    try:
        return cloud(registry, identity)
    except (AuthError, MissingExtra):
        if identity.load is None and (stored := stored_login(registry)):
            return stored
        raise


def stored_login(registry: str) -> Login | None:
    """What `docker login` stored, by itself or through a credential helper."""
    if not any(path.exists() for path in docker_config_files()):
        return None  # without the import of docker's SDK, a third of a second
    auth, errors = (cast("Any", importlib.import_module(f"docker.{name}")) for name in ("auth", "errors"))
    try:
        config = auth.load_config()
        found = cast("dict[str, str] | None", auth.resolve_authconfig(config, None if registry == DOCKER_HUB else registry))
    except errors.DockerException as exc:
        raise ConfigError(
            f"docker's stored login for {registry} cannot be read: {exc}", hint="mend ~/.docker/config.json, or `docker login` again"
        ) from exc
    if not found:
        return None
    token = found.get("IdentityToken") or found.get("identitytoken")
    if token:
        return Login(IDENTITY_TOKEN, token)
    user, password = found.get("username") or found.get("Username"), found.get("password") or found.get("Password")
    if user == IDENTITY_TOKEN and password:
        return Login(IDENTITY_TOKEN, password)
    return Login(user, password) if user and password else None


def docker_config_files() -> list[Path]:
    """Where docker's SDK looks for what is stored."""
    named = os.environ.get("DOCKER_CONFIG")
    return [*([Path(named) / "config.json"] if named else []), Path.home() / ".docker/config.json", Path.home() / ".dockercfg"]


# --- Amazon ECR ----------------------------------------------------------------------------------


def ecr_client(registry: str, identity: Identity) -> Any:
    found = ECR.fullmatch(registry)
    if found is None:
        raise ConfigError(f"{registry} is no registry of Amazon ECR", hint="<account>.dkr.ecr.<region>.amazonaws.com")
    try:
        boto3: Any = importlib.import_module("boto3")
    except ModuleNotFoundError as exc:
        raise MissingExtra("boto3", "aws") from exc
    session = identity.load().get_boto3_session() if identity.load else boto3.Session()
    return session.client("ecr", region_name=found["region"])


def _login_ecr(registry: str, identity: Identity) -> Login:
    client = ecr_client(registry, identity)  # first: its extra may be missing
    aws: Any = importlib.import_module("botocore.exceptions")
    try:
        answer = client.get_authorization_token()
    except aws.NoCredentialsError as exc:
        raise AuthError(
            f"no AWS credentials to log in to {registry} with", hint="name some as registry_credentials in the profile, or `aws configure`"
        ) from exc
    except aws.ClientError as exc:
        code = exc.response.get("Error", {}).get("Code", "")
        raise AuthError(
            f"AWS gives no login for {registry}: {code}", hint="its credentials need ecr:GetAuthorizationToken (and must not be expired)"
        ) from exc
    except aws.BotoCoreError as exc:
        raise ServiceUnavailable(f"AWS does not answer for {registry}: {exc}", hint="check the network") from exc
    user, _, password = base64.b64decode(answer["authorizationData"][0]["authorizationToken"]).decode().partition(":")
    return Login(user, password)


def create_ecr_repository(registry: str, repository: str, identity: Identity) -> bool:
    """Makes it where it is missing; False: it is there. Raises AuthError where that is not allowed."""
    client = ecr_client(registry, identity)
    aws: Any = importlib.import_module("botocore.exceptions")
    account = registry.partition(".")[0]
    try:
        client.describe_repositories(registryId=account, repositoryNames=[repository])
        return False
    except client.exceptions.RepositoryNotFoundException:
        pass  # so it is made
    except (aws.ClientError, aws.BotoCoreError):
        return False  # it may not be looked at; a push will tell
    try:
        client.create_repository(registryId=account, repositoryName=repository)
    except client.exceptions.RepositoryAlreadyExistsException:
        return False
    except aws.ClientError as exc:
        code = exc.response.get("Error", {}).get("Code", "")
        raise AuthError(
            f"{registry} has no repository {repository}, and it cannot be created: {code}",
            hint=f"allow ecr:CreateRepository, or: aws ecr create-repository --repository-name {repository}",
        ) from exc
    return True


# --- Google Artifact Registry --------------------------------------------------------------------


def _login_google(registry: str, identity: Identity) -> Login:
    try:
        auth, requests = (importlib.import_module(f"google.auth{name}") for name in ("", ".transport.requests"))
    except ModuleNotFoundError as exc:
        raise MissingExtra("google-auth", "gcp") from exc
    try:
        if identity.load:
            credentials = identity.load().get_credentials_from_service_account()
        else:
            credentials, _ = auth.default(scopes=[CLOUD_SCOPE])
        credentials.refresh(requests.Request())
    except auth.exceptions.GoogleAuthError as exc:
        raise AuthError(f"Google gives no login for {registry}: {exc}", hint="gcloud auth application-default login") from exc
    return Login("oauth2accesstoken", str(credentials.token))


# --- Azure Container Registry --------------------------------------------------------------------


def _login_azure(registry: str, _identity: Identity) -> Login:
    try:
        azure, errors = (cast("Any", importlib.import_module(f"azure.{name}")) for name in ("identity", "core.exceptions"))
    except ModuleNotFoundError as exc:
        raise MissingExtra("azure-identity", "azure") from exc
    try:
        with azure.DefaultAzureCredential() as credential:
            token = credential.get_token("https://management.azure.com/.default").token
    except errors.ClientAuthenticationError as exc:
        raise AuthError(f"Azure gives no login for {registry}", hint="az login, or give the registry's user and password") from exc
    return Login(AZURE_USER, exchange_azure_token(registry, token))


def exchange_azure_token(registry: str, token: str, transport: Any = None) -> str:
    """The registry's own refresh token for one of Microsoft Entra; it serves as a password."""
    import httpx

    try:
        with httpx.Client(transport=transport, timeout=30) as client:
            fields = {"grant_type": "access_token", "service": registry, "access_token": token}
            answer = client.post(f"https://{registry}/oauth2/exchange", data=fields)
    except httpx.TransportError as exc:
        raise ServiceUnavailable(f"the registry {registry} does not answer: {exc}", hint="check its name and the network") from exc
    if answer.status_code != 200:
        raise AuthError(
            f"the registry {registry} refuses this Azure identity ({answer.status_code})", hint="give it the role AcrPush on the registry"
        )
    return str(answer.json()["refresh_token"])


CLOUD_LOGINS: dict[re.Pattern[str], Callable[[str, Identity], Login]] = {ECR: _login_ecr, GOOGLE: _login_google, AZURE: _login_azure}
