"""How this process reaches a store where its environment does not say so: an address, and credentials that are never shown."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from trainer.errors import ExitCode, TrainerError

AWS_FILES = {"AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials", "AWS_CONFIG_FILE": "~/.aws/config"}
AWS_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)


@dataclass(frozen=True)
class StoreAccess:
    """For the stores of one scheme (``s3 az gs``). ``config`` and ``credential_provider`` are obstore's."""

    scheme: str
    endpoint: str | None = None
    config: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    credential_provider: Any = field(default=None, repr=False)

    def __hash__(self) -> int:
        return id(self)  # stores are kept by it, and what it holds has no hash


# Of the process and not of a context: the threads that send and fetch open stores, too.
_accesses: dict[str, StoreAccess] = {}


@contextmanager
def access_to(access: StoreAccess | None) -> Iterator[None]:
    """While inside, stores of its scheme are opened with it; None changes nothing."""
    if access is None:
        yield
        return
    before = _accesses.get(access.scheme)
    _accesses[access.scheme] = access
    try:
        yield
    finally:
        if before is None:
            del _accesses[access.scheme]
        else:
            _accesses[access.scheme] = before


def current_access(uri: str) -> StoreAccess | None:
    return _accesses.get(urlsplit(uri).scheme)


def store_options(uri: str, access: StoreAccess | None = None) -> dict[str, Any]:
    """What obstore's ``from_url`` is to be told beside the URI."""
    access = access or current_access(uri)
    if access is None:
        return aws_profile_options() if urlsplit(uri).scheme == "s3" else {}
    options: dict[str, Any] = dict(access.config)
    if access.endpoint:
        options["endpoint"] = access.endpoint
    if access.credential_provider is not None:
        options["credential_provider"] = access.credential_provider
    elif access.scheme == "s3" and not access.config:
        options |= aws_profile_options()
    return options


def aws_profile_options() -> dict[str, Any]:
    """What ``aws configure`` and ``aws sso login`` keep in files, which obstore does not read: through boto3, where that is installed.

    Empty where the environment has credentials, or there are no such files. Raises TrainerError (PERMISSION) for a profile that is
    not there, or of no use.
    """
    if any(os.environ.get(name) for name in AWS_CREDENTIALS) or find_spec("boto3") is None:
        return {}
    files = (os.environ.get(name) or default for name, default in AWS_FILES.items())
    if not any(Path(file).expanduser().is_file() for file in files):
        return {}
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return {"credential_provider": Boto3CredentialProvider()}
    except Exception as exc:  # of botocore, which is no dependency
        hint = "log in (aws sso login, aws configure), or set AWS_PROFILE to a profile that has credentials"
        raise TrainerError(f"the AWS profile gives no credentials: {exc}", hint=hint, code=ExitCode.PERMISSION) from exc
