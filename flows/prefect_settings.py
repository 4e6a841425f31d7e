"""Prefect's settings for a process of ours, set before Prefect is imported; whatever the user has set stays.

Which server: the one that the environment or the active Prefect profile names, else the one that `trainyard up` keeps,
else a temporary one, on the database of `trainyard up`: what is saved without a server is there with it.
"""

from __future__ import annotations

import base64
import json
import os
import tempfile
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from blocks.errors import AuthError, ConfigError, ServiceUnavailable
from blocks.places import home
from trainer.locks import is_held

DEFAULTS = {
    # A temporary server needs about half a minute on a cold machine; Prefect gives up after 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    # The command line shows progress and errors itself.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    # Waits 2, 4, 8, 16 s: longer than a server needs to start again, not the minute of Prefect's five retries.
    "PREFECT_CLIENT_MAX_RETRIES": "4",
    # Of one request, retried as above; Prefect waits 60 s each time for a server that hangs.
    "PREFECT_API_REQUEST_TIMEOUT": "30",
}
CHECK_SECONDS = 10.0
ENV_ENCRYPTION_KEY = "PREFECT_SERVER_ENCRYPTION_KEY"
# Whoever sets one of these has said where a temporary server keeps what it is told.
DATABASE = ("PREFECT_HOME", "PREFECT_SERVER_DATABASE_", "PREFECT_API_DATABASE_")


def apply_defaults() -> None:
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    if configured_server(os.environ) is not None:
        return
    own = own_server()
    if own is not None and own.get("ready"):
        os.environ["PREFECT_API_URL"] = own["url"]
        os.environ.setdefault("PREFECT_HOME", str(prefect_home()))
    elif not names_database(os.environ):
        use_own_database()


def names_database(environment: Mapping[str, str]) -> bool:
    """Whether the environment or the active Prefect profile says where a temporary server keeps what it is told."""
    return any(name.startswith(DATABASE) for name in {**profile_settings(environment), **environment})


def use_own_database() -> None:
    """A temporary server of this process is then on the database of `trainyard up`. The other settings of the user's profile stay."""
    profiles = profiles_path(os.environ)
    if profiles.exists():
        os.environ["PREFECT_PROFILES_PATH"] = str(profiles)
    os.environ["PREFECT_HOME"] = str(prefect_home())
    with suppress(OSError):  # where nothing can be written, Prefect says so, if it is needed at all
        prefect_home().mkdir(mode=0o700, parents=True, exist_ok=True)
    if encryption_key_path().exists():
        os.environ[ENV_ENCRYPTION_KEY] = encryption_key()


def has_own_database() -> bool:
    """Whether a temporary server of this process is on the database of `trainyard up`."""
    return os.environ.get("PREFECT_HOME") == str(prefect_home())


def server_url() -> str | None:
    """The address of the server that flows will use, or None where a temporary one must be started. Imports Prefect."""
    from prefect.settings import PREFECT_API_URL

    return PREFECT_API_URL.value()


# --- Which server there is ------------------------------------------------------------------------------------------


def prefect_home() -> Path:
    """Where `trainyard up` keeps Prefect's database and logs, apart from the user's own ``~/.prefect``."""
    return home() / "prefect"


def encryption_key_path() -> Path:
    return prefect_home() / "encryption.key"


def encryption_key() -> str:
    """The key of the blocks' secrets: not in the database, where Prefect itself would put it. Made once."""
    path = encryption_key_path()
    if path.exists():
        return path.read_text().strip()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as fresh:  # readable by its user only
        fresh.write(base64.urlsafe_b64encode(os.urandom(32)).decode())
        fresh.flush()
        with suppress(FileExistsError):  # another command was quicker: its key counts
            os.link(fresh.name, path)
    return path.read_text().strip()


def lock_path() -> Path:
    """Held by `trainyard up` as long as it lives."""
    return home() / "server.lock"


def details_path() -> Path:
    return home() / "server.json"


def read_details() -> dict[str, Any] | None:
    """What the last `trainyard up` wrote about itself, whether it lives or not."""
    try:
        return cast("dict[str, Any]", json.loads(details_path().read_text()))
    except (FileNotFoundError, ValueError):
        return None


def own_server() -> dict[str, Any] | None:
    """The server that a living `trainyard up` keeps."""
    return read_details() if is_held(lock_path()) else None


def configured_server(environment: Mapping[str, str]) -> str | None:
    """The server that the environment or the active Prefect profile names. Does not import Prefect."""
    return environment.get("PREFECT_API_URL") or profile_settings(environment).get("PREFECT_API_URL") or None


def profile_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The settings of the active profile, of the user's file or of those that Prefect brings."""
    own = _read_toml(profiles_path(environment))
    spec = find_spec("prefect")
    brought = _read_toml(Path(place) / "settings" / "profiles.toml") if (place := next(iter(_places(spec)), None)) else {}
    name = environment.get("PREFECT_PROFILE") or own.get("active") or brought.get("active")
    profiles = {**brought.get("profiles", {}), **own.get("profiles", {})}
    return {key: str(value) for key, value in profiles.get(name, {}).items()}


def profiles_path(environment: Mapping[str, str]) -> Path:
    folder = Path(environment.get("PREFECT_HOME") or "~/.prefect").expanduser()
    return Path(environment.get("PREFECT_PROFILES_PATH") or folder / "profiles.toml").expanduser()


def _places(spec: Any) -> list[str]:
    return list(spec.submodule_search_locations or []) if spec else []


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"cannot read Prefect's profiles in {path}: {exc}", hint="mend or remove that file") from exc


# --- Whether it can be used -----------------------------------------------------------------------------------------


def require_server() -> str | None:
    """The configured server's address once it has answered, None where a temporary one will do. Imports Prefect.

    Raises ServiceUnavailable where it does not answer or is just being started, AuthError where it wants a password, ConfigError where
    Prefect's client refuses its version. A server a little older than the client is used, as the client does.
    """
    url = server_url()
    if url is None:
        prepare_temporary()
        return None
    import httpx
    from prefect import __version__ as client_version
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    shown = without_password(url)
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}),
            get_client(httpx_settings={"timeout": CHECK_SECONDS}, sync_client=True) as client,
        ):
            version: Any = client.request("GET", "/admin/version").json()
    except httpx.HTTPStatusError as exc:
        raise refused(shown, exc.response.status_code) from exc
    except ValueError as exc:
        raise ConfigError(f"{shown} answers, but not as a Prefect server", hint="PREFECT_API_URL ends in /api, usually") from exc
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as exc:
        raise ServiceUnavailable(
            f"the Prefect server at {shown} does not answer ({type(exc).__name__})",
            hint="start it, or mend PREFECT_API_URL (`prefect config view` shows where it is set); without one, `trainyard up` starts one",
        ) from exc
    if problem := version_problem(version, client_version):
        raise ConfigError(f"the Prefect server at {shown} {problem}", hint="use the same major version of Prefect on both sides")
    return url


def prepare_temporary() -> None:
    """For a temporary server of this process. Raises ServiceUnavailable while `trainyard up` makes the database that it would use."""
    if not has_own_database():
        return
    if own_server() is not None:
        raise ServiceUnavailable("`trainyard up` is just starting its server", hint="the same command again, once `up` says: ready")
    os.environ[ENV_ENCRYPTION_KEY] = encryption_key()


def refused(shown: str, status: int) -> AuthError | ConfigError | ServiceUnavailable:
    """What an answer of `status` to the first question means."""
    if status in (401, 403):
        return AuthError(
            f"the Prefect server at {shown} wants a password, or another one (HTTP {status})",
            hint="set PREFECT_API_AUTH_STRING=user:password (Prefect Cloud: PREFECT_API_KEY), or `prefect config set` it",
        )
    if status >= 500:
        return ServiceUnavailable(f"the Prefect server at {shown} answers HTTP {status}", hint="look at the server's log")
    return ConfigError(f"{shown} answers HTTP {status}, not as a Prefect server", hint="PREFECT_API_URL ends in /api, usually")


def version_problem(server: Any, client: str) -> str:
    """Why Prefect's client would refuse this server, else empty: their major versions must match."""
    theirs, ours = (str(version).split(".")[0] for version in (server, client))
    if not theirs.isdigit():
        return "does not tell its version"
    if theirs == ours:
        return ""
    return f"has version {server}, too {'old' if int(theirs) < int(ours) else 'new'} for Prefect {client} here"


def without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
