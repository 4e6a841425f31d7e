"""How a registry's demand for a login is answered, as Docker Hub, GHCR and Google do it: with a token of another host."""

from __future__ import annotations

import base64
from collections.abc import Callable
from urllib.parse import parse_qs

import httpx
import pytest

from blocks.errors import AuthError, ConfigError, RateLimited
from blocks.registry import Manifest, Repository
from blocks.registry_login import Login

CHALLENGE = 'Bearer realm="{realm}",service="registry.example",scope="repository:team/trainer:pull,push"'
BODY = b'{"schemaVersion": 2, "config": {"digest": "sha256:1", "size": 1}, "layers": []}'


class TokenRegistry:
    """Lets in who shows the token that its realm gives for the right login."""

    def __init__(self, realm: str = "https://auth.example/token", status: int = 200) -> None:
        self.realm, self.status = realm, status
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.host == "auth.example":
            self.asked.append(request)
            return httpx.Response(self.status, json={"token": "t0ken"} if self.status == 200 else {})
        if request.url.host == "storage.example":
            assert "Authorization" not in request.headers
            return httpx.Response(200, content=iter([BODY]))
        if request.headers.get("Authorization") != "Bearer t0ken":
            return httpx.Response(401, headers={"WWW-Authenticate": CHALLENGE.format(realm=self.realm)})
        if "/blobs/" in request.url.path:
            return httpx.Response(307, headers={"Location": "https://storage.example/blob"})
        return httpx.Response(200, content=BODY, headers={"Content-Type": "application/vnd.oci.image.manifest.v1+json; charset=utf-8"})


@pytest.fixture
def opened() -> Callable[[TokenRegistry, Login | None], Repository]:
    def open_with(server: TokenRegistry, login: Login | None) -> Repository:
        repository = Repository("ghcr.example", "team/trainer", login)
        repository.client.close()
        repository.client = httpx.Client(transport=httpx.MockTransport(server), follow_redirects=True)
        return repository

    return open_with


Opened = Callable[[TokenRegistry, Login | None], Repository]


def test_a_token_is_fetched_once_with_the_login_and_not_shown_to_storage(opened: Opened) -> None:
    server = TokenRegistry()
    with opened(server, Login("me", "hunter2")) as repository:
        manifest = repository.find("v1")
        assert manifest == Manifest(BODY, "application/vnd.oci.image.manifest.v1+json")
        assert b"".join(repository.read_blob("sha256:1")) == BODY
    (asked,) = server.asked
    assert dict(asked.url.params) == {"service": "registry.example", "scope": "repository:team/trainer:pull,push"}
    assert asked.headers["Authorization"] == f"Basic {base64.b64encode(b'me:hunter2').decode()}"


def test_an_anonymous_token_needs_no_login_and_an_identity_token_is_exchanged(opened: Opened) -> None:
    server = TokenRegistry()
    with opened(server, None) as repository:
        assert repository.find("v1") is not None
    assert "Authorization" not in server.asked[0].headers
    with opened(server, Login("<token>", "renews")) as repository:
        assert repository.find("v1") is not None
    form = parse_qs(server.asked[1].content.decode())
    assert (form["grant_type"], form["refresh_token"]) == (["refresh_token"], ["renews"])


def test_a_login_is_not_sent_in_the_clear(opened: Opened) -> None:
    server = TokenRegistry(realm="http://auth.example/token")
    with opened(server, Login("me", "hunter2")) as repository, pytest.raises(ConfigError, match="in the clear"):
        repository.find("v1")
    assert server.asked == []


@pytest.mark.parametrize(("status", "kind"), [(401, AuthError), (403, AuthError), (429, RateLimited)])
def test_a_refused_token_is_told(opened: Opened, status: int, kind: type[Exception]) -> None:
    with opened(TokenRegistry(status=status), Login("me", "hunter2")) as repository, pytest.raises(kind) as caught:
        repository.find("v1")
    assert "hunter2" not in str(caught.value)


def test_bytes_that_are_not_those_of_the_digest_are_refused(opened: Opened) -> None:
    with opened(TokenRegistry(), None) as repository, pytest.raises(Exception, match="sent another manifest"):
        repository.find(f"sha256:{'0' * 64}")
