"""The Docker Engine through its SDK: which image it has, and a push whose password goes over the engine's socket, never in an argument."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

from blocks.errors import AuthError, ConfigError, ProviderError, QuotaError, ServiceUnavailable, TerminalError
from blocks.image_build import DAEMON_HINT, LABEL_SOURCE
from blocks.image_ref import ImageRef
from blocks.registry_login import IDENTITY_TOKEN, Login
from trainer.errors import ExitCode

OnPush = Callable[[int, int], None]  # bytes sent, of so many that the registry lacks
DEFAULT_HOST = "unix:///var/run/docker.sock"


@dataclass(frozen=True)
class LocalImage:
    id: str
    tags: tuple[str, ...]
    bytes: int
    created: str
    platform: str
    source_hash: str


class Engine:
    def __init__(self, client: Any) -> None:
        self.client = client

    def find(self, source_hash: str, platform: str) -> LocalImage | None:
        """The image that was built of these sources, if it is still here."""
        return next((image for image in self.images(source_hash, platform)), None)

    def images(self, source_hash: str = "", platform: str = "") -> list[LocalImage]:
        """Ours, newest first."""
        label = f"{LABEL_SOURCE}={source_hash}" if source_hash else LABEL_SOURCE
        with told_plainly():
            found = self.client.images.list(filters={"label": [label], "dangling": False})
            described = [image.attrs for image in found]
        wanted = [one for one in described if not platform or f"{one['Os']}/{one['Architecture']}" == platform]
        images = [
            LocalImage(
                id=one["Id"],
                tags=tuple(one.get("RepoTags") or ()),
                bytes=one["Size"],
                created=one["Created"],
                platform=f"{one['Os']}/{one['Architecture']}",
                source_hash=one["Config"]["Labels"][LABEL_SOURCE],
            )
            for one in wanted
        ]
        return sorted(images, key=lambda image: image.created, reverse=True)

    def push(self, image_id: str, target: ImageRef, login: Login | None, on_push: OnPush) -> str:
        """The digest that the engine says it pushed; the registry is to confirm it."""
        with told_plainly():
            self.client.api.tag(image_id, target.name, target.tag, force=True)
            lines = self.client.api.push(target.name, tag=target.tag, auth_config=engine_login(login), stream=True, decode=True)
            return read_push(lines, target, on_push)


def engine_login(login: Login | None) -> dict[str, str]:
    """An empty one where there is none: else the SDK would look for a stored one, under other rules."""
    if login is None:
        return {"username": "", "password": ""}
    if login.user == IDENTITY_TOKEN:
        return {"identitytoken": login.password}
    return {"username": login.user, "password": login.password}


def read_push(lines: Iterable[dict[str, Any]], target: ImageRef, on_push: OnPush) -> str:
    """Follows the stream of a push to its digest. Raises what its error means."""
    sizes: dict[str, tuple[int, int]] = {}
    digest = ""
    for line in lines:
        if "error" in line:
            raise explain_push(str(line["error"]), target)
        progress = cast("dict[str, int]", line.get("progressDetail") or {})
        if line.get("status") == "Pushing" and "current" in progress:
            # The size of a layer grows over what was said of it when it is packed worse than thought.
            sizes[str(line.get("id"))] = progress["current"], max(progress.get("total", 0), progress["current"])
            on_push(sum(sent for sent, _ in sizes.values()), sum(total for _, total in sizes.values()))
        digest = str(cast("dict[str, Any]", line.get("aux") or {}).get("Digest", digest))
    if not digest:
        raise ServiceUnavailable(f"docker does not say what it pushed to {target.name}", hint="push again")
    return digest


def explain_push(message: str, target: ImageRef) -> ProviderError:
    """By its words: the engine's stream has no codes."""
    lower = message.lower()
    if "no space left" in lower:
        return QuotaError(
            f"no disk space is left for the push to {target.registry}: {message}", hint="free space in docker and in the registry"
        )
    if "unauthorized" in lower or "authentication required" in lower or "no basic auth" in lower:
        return AuthError(f"the registry {target.registry} refuses the login", hint="mend registry_user and registry_password")
    if "denied" in lower or "forbidden" in lower:
        return AuthError(f"no permission to push to {target.name}", hint="give this user the right to push, or log in as another")
    if "name unknown" in lower or "does not exist" in lower:
        return ConfigError(f"the registry has no repository {target.name}", hint="create it there, or allow that it is created")
    return ServiceUnavailable(f"the push to {target.name} broke off: {message}", hint="push again; what the registry has is not sent again")


@contextmanager
def connect() -> Generator[Engine]:
    """The engine that DOCKER_HOST or docker's current context names. Raises TerminalError where none runs."""
    docker: Any = importlib.import_module("docker")
    named = os.environ.get("DOCKER_HOST") or _context_host() or DEFAULT_HOST
    require_answer(named)
    with told_plainly(), contextlib.ExitStack() as stack:
        client = docker.from_env() if os.environ.get("DOCKER_HOST") else docker.DockerClient(base_url=named)
        stack.callback(client.close)
        yield Engine(client)


def require_answer(host: str) -> None:
    """Of an engine on this machine, by its socket: the SDK would hide why it does not answer. Raises TerminalError."""
    if not host.startswith("unix://"):
        return
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(host.removeprefix("unix://"))
    except PermissionError as exc:
        hint = "join the group docker, or run Docker in rootless mode"
        raise TerminalError("this user may not use Docker", hint=hint, code=ExitCode.PERMISSION) from exc
    except OSError as exc:
        raise TerminalError("the Docker daemon does not run", hint=DAEMON_HINT, code=ExitCode.UNAVAILABLE) from exc


def _context_host() -> str:
    context: Any = importlib.import_module("docker.context").ContextAPI.get_current_context()
    return "" if context is None or context.name == "default" else str(context.Host or "")


@contextmanager
def told_plainly() -> Generator[None]:
    """What the SDK raises, as errors of ours."""
    from docker.errors import DockerException
    from requests.exceptions import RequestException

    try:
        yield
    except (DockerException, RequestException) as exc:
        text = str(exc)
        if "no space left" in text.lower():
            raise QuotaError("docker has no disk space left", hint="docker system prune, or a bigger disk; then again") from exc
        if isinstance(exc, RequestException) or "Error while fetching server API version" in text:
            raise TerminalError("the Docker daemon does not run", hint=DAEMON_HINT, code=ExitCode.UNAVAILABLE) from exc
        raise TerminalError(f"docker failed: {text}", hint="its own log tells why", code=ExitCode.UNAVAILABLE) from exc
