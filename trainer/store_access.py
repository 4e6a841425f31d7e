"""How this process reaches a store where its environment does not say so: an address, and credentials that are never shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class StoreAccess:
    """For the stores of one scheme (``s3 az gs``). ``config`` and ``credential_provider`` are obstore's."""

    scheme: str
    endpoint: str | None = None
    config: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    credential_provider: Any = field(default=None, repr=False)


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


def store_options(uri: str) -> dict[str, Any]:
    """What obstore's ``from_url`` is to be told beside the URI."""
    access = current_access(uri)
    if access is None:
        return {}
    options: dict[str, Any] = dict(access.config)
    if access.endpoint:
        options["endpoint"] = access.endpoint
    if access.credential_provider is not None:
        options["credential_provider"] = access.credential_provider
    return options
