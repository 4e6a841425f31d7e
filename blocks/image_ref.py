"""Names of container images: ``registry/repository[:tag][@sha256:...]``. Pure."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, replace
from typing import Self

from blocks.errors import ConfigError

DOCKER_HUB = "docker.io"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
REGISTRY = re.compile(r"(?:\[[0-9a-f:]+\]|[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?)(?::[0-9]{1,5})?")
REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*")
TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
LOGIN = re.compile(r"^.*@(?!sha256:)")  # a password has no place there, and none in what is told
EXAMPLE = "give registry/repository:tag or registry/repository@sha256:..."


@dataclass(frozen=True)
class ImageRef:
    """An image in a registry. A plan holds only those with a digest: a tag may be moved to another image."""

    registry: str
    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        """As Docker reads it: what has neither dot nor port before its first slash is on Docker Hub. Raises ConfigError."""
        name, _, digest = text.strip().partition("@")
        registry, slash, rest = name.partition("/")
        if not slash or not ("." in registry or ":" in registry or registry == "localhost"):
            registry, rest = DOCKER_HUB, name if slash else f"library/{name}"
        repository, _, tag = rest.partition(":")
        right = REGISTRY.fullmatch(registry) and REPOSITORY.fullmatch(repository)
        if "://" in text or not right or (tag and not TAG.fullmatch(tag)) or ("@" in text and not DIGEST.fullmatch(digest)):
            raise ConfigError(f"{LOGIN.sub('***@', text)!r} is not the name of an image", hint=EXAMPLE)
        return cls(registry, repository, tag, digest)

    def __str__(self) -> str:
        """With a digest, the tag would only mislead."""
        return self.name + (f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else "")

    @property
    def name(self) -> str:
        return f"{self.registry}/{self.repository}"

    @property
    def reference(self) -> str:
        """What a registry looks it up by."""
        return self.digest or self.tag or "latest"

    def pinned(self, digest: str) -> ImageRef:
        return replace(self, tag="", digest=digest)

    def tagged(self, tag: str) -> ImageRef:
        return replace(self, tag=tag, digest="")


def is_loopback(registry: str) -> bool:
    """Whether it is this machine: only there is plain http spoken."""
    host = registry.rpartition(":")[0] if re.search(r":\d+$", registry) else registry
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
