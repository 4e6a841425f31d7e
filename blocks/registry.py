"""A repository in an image registry, over its HTTP interface (OCI distribution specification). No Docker Engine is needed.

Our own client on httpx, since a copy must keep each manifest byte for byte, else its digest changes: oras writes manifests anew
and blobs to disk first, python-dxf has had no release since May 2025 and takes no manifest without its media type.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import ssl
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast
from urllib.parse import urljoin, urlsplit

import httpx

from blocks.errors import AuthError, ConfigError, ServiceUnavailable
from blocks.image_ref import DOCKER_HUB, is_loopback
from blocks.registry_errors import explain_answer, explain_failure
from blocks.registry_login import IDENTITY_TOKEN, Login

MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
ACCEPT = {"Accept": ", ".join((*MANIFESTS, *INDEXES))}
CHUNK_BYTES = 1 << 20
TIMEOUT = httpx.Timeout(60, connect=10)
MOST_TAGS = 10_000


@dataclass(frozen=True)
class Manifest:
    """As the registry has it, byte for byte."""

    body: bytes
    media_type: str

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.body).hexdigest()}"

    @property
    def content(self) -> dict[str, Any]:
        return json.loads(self.body)

    @property
    def is_index(self) -> bool:
        return "manifests" in self.content

    @property
    def blobs(self) -> list[tuple[str, int]]:
        """Digest and size of configuration and layers, each once; not those that lie elsewhere by licence."""
        content = self.content
        parts = [content["config"], *(layer for layer in content["layers"] if not layer.get("urls"))]
        return list({part["digest"]: (part["digest"], int(part["size"])) for part in parts}.values())

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.blobs)


@dataclass(frozen=True)
class ImageConfig:
    """What an image's configuration says: ``os/architecture``, labels, when it was made."""

    platform: str
    labels: dict[str, str]
    created: str


class Repository:
    """One repository, with one login. Raises AuthError, ConfigError, QuotaError, or a TransientError where it may work later."""

    def __init__(self, registry: str, repository: str, login: Login | None = None) -> None:
        self.registry, self.repository, self.login = registry, repository, login
        self.local = is_loopback(registry)
        host = "registry-1.docker.io" if registry == DOCKER_HUB else registry
        self.address = f"{'http' if self.local else 'https'}://{host}/v2/"
        # A proxy of the environment is for what is outside.
        self.client = httpx.Client(timeout=TIMEOUT, trust_env=not self.local, verify=_trusted(), follow_redirects=True)
        self.client.headers["Accept-Encoding"] = "identity"  # blobs are passed on as they are
        self.authorization = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    # --- Manifests -------------------------------------------------------------------------------

    def find(self, reference: str) -> Manifest | None:
        """By tag or digest. Raises ServiceUnavailable where the bytes are not those of the digest."""
        with self._send("GET", f"manifests/{reference}", headers=ACCEPT, missing=True) as response:
            if response is None:
                return None
            body = response.read()
        manifest = Manifest(body, response.headers.get("Content-Type", "").partition(";")[0])
        if reference.startswith("sha256:") and manifest.digest != reference:
            raise ServiceUnavailable(f"the registry {self.registry} sent another manifest than {reference}", hint="try again")
        return manifest

    def digest(self, reference: str) -> str | None:
        """Whether the registry has it, without its bytes."""
        with self._send("HEAD", f"manifests/{reference}", headers=ACCEPT, missing=True) as response:
            return None if response is None else str(response.headers.get("Docker-Content-Digest", ""))

    def put(self, reference: str, manifest: Manifest) -> None:
        with self._send("PUT", f"manifests/{reference}", content=manifest.body, headers={"Content-Type": manifest.media_type}):
            pass

    def config(self, manifest: Manifest) -> ImageConfig:
        with self._send("GET", f"blobs/{manifest.content['config']['digest']}") as response:
            assert response is not None
            content: dict[str, Any] = json.loads(response.read())
        labels = cast("dict[str, dict[str, str]]", content.get("config") or {}).get("Labels") or {}
        return ImageConfig(f"{content.get('os', '?')}/{content.get('architecture', '?')}", labels, str(content.get("created") or ""))

    def tags(self) -> list[str]:
        names: list[str] = []
        path = "tags/list?n=1000"
        while path and len(names) < MOST_TAGS:
            with self._send("GET", path, missing=True) as response:
                if response is None:
                    return names
                names += cast("list[str]", json.loads(response.read()).get("tags") or [])
            following = response.links.get("next", {}).get("url", "")
            path = urljoin(str(response.url), following) if following else ""
        return names

    # --- Blobs -----------------------------------------------------------------------------------

    def has_blob(self, digest: str) -> bool:
        with self._send("HEAD", f"blobs/{digest}", missing=True) as response:
            return response is not None

    def read_blob(self, digest: str) -> Iterator[bytes]:
        with self._send("GET", f"blobs/{digest}") as response:
            assert response is not None
            yield from response.iter_raw(CHUNK_BYTES)

    def put_blob(self, digest: str, size: int, chunks: Iterable[bytes]) -> None:
        """In one request, as a stream. The registry refuses what does not have the digest, so nothing half-sent counts."""
        place = self._start_upload()
        separator = "&" if urlsplit(place).query else "?"
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        with self._send("PUT", f"{place}{separator}digest={digest}", content=chunks, headers=headers):
            pass

    def mount_blob(self, digest: str, source: str) -> bool:
        """From another repository of the same registry, without sending it; False where the registry does not do so."""
        with self._send("POST", f"blobs/uploads/?mount={digest}&from={source}", missing=True) as response:
            return response is not None and response.status_code == 201

    def require_push(self) -> None:
        """Raises what a push would, by an upload that is begun and given up: better before a long build than after it."""
        place = self._start_upload()
        request = self.client.build_request("DELETE", place, headers={"Authorization": self.authorization} if self.authorization else {})
        try:
            self.client.send(request).close()  # where it is not taken back, the registry does so itself
        except httpx.HTTPError as exc:
            raise explain_failure(self.registry, exc) from exc

    def _start_upload(self) -> str:
        with self._send("POST", "blobs/uploads/") as response:
            assert response is not None
            return urljoin(str(response.url), response.headers["Location"])

    # --- Requests and logins ---------------------------------------------------------------------

    @contextmanager
    def _send(
        self, method: str, path: str, *, content: bytes | Iterable[bytes] | None = None, headers: Any = None, missing: bool = False
    ) -> Generator[httpx.Response | None]:
        """The answer, its body not yet read; None for 404 where `missing` is an answer, too."""
        address = path if "://" in path else f"{self.address}{self.repository}/{path}"
        action = "pull" if method in ("GET", "HEAD") else "push"
        try:
            response = self._exchange(method, address, content, headers)
            try:
                if response.status_code == 404 and missing:
                    yield None
                elif response.is_success:
                    yield response
                else:
                    response.read()
                    raise explain_answer(self.registry, self.repository, action, response, known=self.login is not None)
            finally:
                response.close()
        except httpx.HTTPError as exc:
            raise explain_failure(self.registry, exc) from exc

    def _exchange(self, method: str, address: str, content: bytes | Iterable[bytes] | None, headers: Any) -> httpx.Response:
        # A stream cannot be sent twice; whoever sends one has just been let in to begin the upload.
        tries = 2 if content is None or isinstance(content, bytes) else 1
        while True:
            request = self.client.build_request(method, address, content=content, headers=headers)
            if self.authorization and urlsplit(address).netloc == urlsplit(self.address).netloc:
                request.headers["Authorization"] = self.authorization
            response = self.client.send(request, stream=True)
            tries -= 1
            challenge = response.headers.get("WWW-Authenticate", "")
            if response.status_code != 401 or not tries or not self._authorize(challenge):
                return response
            response.close()

    def _authorize(self, challenge: str) -> bool:
        """Answers the registry's demand for a login; False where there is nothing (new) to say."""
        kind, _, rest = challenge.partition(" ")
        if kind.lower() == "basic" and self.login is not None:
            pair = f"{self.login.user}:{self.login.password}".encode()
            self.authorization = f"Basic {base64.b64encode(pair).decode()}"
            return True
        if kind.lower() == "bearer":
            fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
            self.authorization = f"Bearer {self._fetch_token(fields)}"
            return True
        return False

    def _fetch_token(self, fields: dict[str, str]) -> str:
        realm = urljoin(self.address, fields.get("realm", ""))
        if urlsplit(realm).scheme != "https" and not (self.local and is_loopback(urlsplit(realm).netloc)):
            raise ConfigError(f"the registry {self.registry} wants the login sent in the clear, to {realm}", hint="use another registry")
        scope = fields.get("scope") or f"repository:{self.repository}:pull"
        asked = {"service": fields.get("service", ""), "scope": scope}
        if self.login is not None and self.login.user == IDENTITY_TOKEN:
            form = {**asked, "grant_type": "refresh_token", "refresh_token": self.login.password, "client_id": "trainyard"}
            response = self.client.post(realm, data=form)
        else:
            basic = httpx.BasicAuth(self.login.user, self.login.password) if self.login else None
            response = self.client.get(realm, params=asked, auth=basic)
        if not response.is_success:
            raise explain_answer(self.registry, self.repository, "use", response, known=self.login is not None)
        answer = response.json()
        token = answer.get("token") or answer.get("access_token")
        if not token:
            raise AuthError(f"the registry {self.registry} gave no token for this login", hint="log in again")
        return str(token)


def _trusted() -> ssl.SSLContext | bool:
    """httpx heeds SSL_CERT_FILE by itself; what other tools call by another name counts, too."""
    bundle = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE")
    return ssl.create_default_context(cafile=bundle) if bundle else True
