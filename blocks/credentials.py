"""From a saved credential block to how a store is opened. Knows the blocks by their fields; no Prefect, no SDK until one is used."""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from blocks.errors import ConfigError
from trainer.store_access import StoreAccess

REFRESH_SECONDS = 15 * 60.0  # a saved block may be given a new key while `trainyard up` lives


@dataclass(frozen=True)
class AccessRef:
    """How to reach a store, by reference: its address, and the name of saved credentials. Holds no secret, so it may be stored."""

    endpoint: str | None = None
    credentials: str | None = None

    def resolve(self, uri: str) -> StoreAccess | None:
        """None where the environment says it. Loads the credentials when they are first needed. Raises ConfigError, ServiceUnavailable."""
        scheme = urlsplit(uri).scheme
        if scheme in ("", "file") or not (self.endpoint or self.credentials):
            return None
        made_at, access = _resolved.get((self, scheme), (0.0, None))
        if access is None or time.monotonic() - made_at > REFRESH_SECONDS:
            access = StoreAccess(scheme=scheme, endpoint=self.endpoint)
            if self.credentials:
                # By name: of all blocks, only that module may load Prefect.
                loaded = importlib.import_module("blocks.profiles").load_credentials(self.credentials)
                access = build_access(loaded, scheme, self.endpoint)
            _resolved[self, scheme] = (time.monotonic(), access)
        return access


# The same value for the same store: those that are open are kept by it.
_resolved: dict[tuple[AccessRef, str], tuple[float, StoreAccess]] = {}


def build_access(credentials: Any, scheme: str, endpoint: str | None) -> StoreAccess:
    """The access that a block of prefect-aws or prefect-azure gives to stores of a scheme. Raises ConfigError where it does not fit."""
    kind = type(credentials).__name__
    if kind in ("AwsCredentials", "MinIOCredentials") and scheme == "s3":
        return _access_s3(credentials, endpoint)
    if kind == "AzureBlobStorageCredentials" and scheme == "az":
        return _access_azure(credentials, endpoint)
    raise ConfigError(f"credentials of the type {kind} do not open a store of {scheme}://", hint="choose others in the profile")


def _access_s3(credentials: Any, endpoint: str | None) -> StoreAccess:
    from obstore.auth.boto3 import Boto3CredentialProvider

    # boto3 renews what expires, and knows profiles, roles and tokens.
    session = credentials.get_boto3_session()
    if session.get_credentials() is None:
        raise ConfigError("the AWS credentials hold no key, and this machine has none", hint="fill in the block, or log in")
    config = {"region": session.region_name or "us-east-1"}
    return StoreAccess(
        scheme="s3",
        endpoint=endpoint or credentials.aws_client_parameters.endpoint_url,
        config=config,
        credential_provider=Boto3CredentialProvider(session),
    )


def _access_azure(credentials: Any, endpoint: str | None) -> StoreAccess:
    if credentials.connection_string is not None:
        parts = parse_connection_string(credentials.connection_string.get_secret_value())
        config = {"account_name": parts.get("AccountName", "")}
        if "AccountKey" in parts:
            config["account_key"] = parts["AccountKey"]
        if "SharedAccessSignature" in parts:
            config["sas_key"] = parts["SharedAccessSignature"]
        return StoreAccess(scheme="az", endpoint=endpoint or parts.get("BlobEndpoint"), config=config)
    if not credentials.account_url:
        raise ConfigError("the Azure credentials hold neither a connection string nor an account URL", hint="fill in the block")
    account = credentials.account_url.split("://")[-1].partition(".")[0]
    if credentials.client_id:
        secret = credentials.client_secret.get_secret_value()
        config = {
            "account_name": account,
            "client_id": credentials.client_id,
            "tenant_id": credentials.tenant_id,
            "client_secret": secret,
        }
        return StoreAccess(scheme="az", endpoint=endpoint, config=config)
    return StoreAccess(scheme="az", endpoint=endpoint, config={"account_name": account})


def public_endpoint(access: StoreAccess | None) -> str | None:
    """The address as a run's record may have it: without a user, a password or a signature. None for the cloud's own."""
    if access is None or not access.endpoint:
        return None
    parts = urlsplit(access.endpoint)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def parse_connection_string(text: str) -> dict[str, str]:
    """``AccountName=...;AccountKey=...`` as a dict. Values may hold equal signs, keys never do."""
    pairs = (part.partition("=") for part in text.split(";") if part.strip())
    return {key.strip(): value.strip() for key, _, value in pairs}
