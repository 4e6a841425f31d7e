"""A registry's answers as the errors of our tree. Pure."""

from __future__ import annotations

import json
import ssl
from typing import Any, cast

import httpx

from blocks.errors import AuthError, ConfigError, ProviderError, QuotaError, RateLimited, ServiceUnavailable

NO_SPACE = ("no space left on device", "not enough space", "enospc")
NO_SPACE_NUMBER = 28  # ENOSPC, in the detail of docker-registry's answer


def explain_answer(registry: str, repository: str, action: str, response: httpx.Response, *, known: bool) -> ProviderError:
    """`action` is pull or push; `known` whether a login was sent. The response's body has been read."""
    status = response.status_code
    codes, text = read_errors(response.content)
    told = f"{status}{f' {codes[0]}' if codes else ''}"
    place = f"{registry}/{repository}"
    if is_disk_full(status, response.content):
        return QuotaError(
            f"the registry {registry} has no disk space left", hint="free space there and repeat this: what it has is not sent again"
        )
    if status == 401 and known:
        return AuthError(f"the registry {registry} refuses the user or the password", hint="mend registry_user and registry_password")
    if status == 401:
        return AuthError(
            f"the registry {registry} wants a login to {action} {repository}",
            hint=f"docker login {registry}, or give registry_user and registry_password in the profile",
        )
    if status == 403 or "DENIED" in codes:
        return AuthError(f"no permission to {action} {place} ({told})", hint=f"give this user the right to {action}, or log in as another")
    if status == 404:
        return ConfigError(
            f"the registry {registry} has no repository {repository} ({told})",
            hint="create it there, allow that it is created (create_repository), or choose another",
        )
    if status == 429:
        return RateLimited(f"the registry {registry} wants fewer requests ({told})", hint="try again later, or log in")
    if status >= 500:
        return ServiceUnavailable(f"the registry {registry} failed: {told} {text}".rstrip(), hint="try again; its own log tells why")
    return ConfigError(f"the registry {registry} refuses to {action} {place}: {told} {text}".rstrip(), hint="look at the name of the image")


def explain_failure(registry: str, exc: httpx.HTTPError) -> ProviderError:
    """For what never came to an answer, or broke off in one."""
    causes = [cause for cause in (exc, exc.__cause__, exc.__context__) if cause is not None]
    if any(isinstance(cause, ssl.SSLError) for cause in causes) or "CERTIFICATE_VERIFY_FAILED" in str(exc):
        return ConfigError(
            f"the certificate of the registry {registry} is not trusted: {exc}",
            hint="set SSL_CERT_FILE to the CA bundle of your network or registry",
        )
    why = str(exc) or type(exc).__name__
    if isinstance(exc, httpx.ConnectError | httpx.ConnectTimeout | httpx.UnsupportedProtocol):
        return ServiceUnavailable(
            f"the registry {registry} does not answer: {why}", hint="check its name and the network, and that it runs"
        )
    return ServiceUnavailable(
        f"the connection to the registry {registry} broke off: {why}", hint="try again; what it has is not sent again"
    )


def read_errors(body: bytes) -> tuple[list[str], str]:
    """The codes and the first message of an error's body, if it has the form that the specification gives it."""
    try:
        parsed = json.loads(body)
    except ValueError:
        return [], ""
    errors: Any = cast("dict[str, Any]", parsed).get("errors") if isinstance(parsed, dict) else None
    found = [cast("dict[str, Any]", error) for error in cast("list[Any]", errors or []) if isinstance(error, dict)]
    return [str(error.get("code", "")) for error in found], str(found[0].get("message", ""))[:200] if found else ""


def is_disk_full(status: int, body: bytes) -> bool:
    if status == 507:
        return True
    if status < 500:
        return False
    text = body.decode(errors="replace").lower()
    if any(word in text for word in NO_SPACE):
        return True
    return f'"err":{NO_SPACE_NUMBER},' in text.replace(" ", "").replace("}", ",")
