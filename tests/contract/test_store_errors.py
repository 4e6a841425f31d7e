"""What a person is told when a store cannot be used: one error with cause and next step, soon, and without a secret."""

from __future__ import annotations

import base64
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blocks.staging import stage_folder
from tests.faults import ALWAYS, Fault, running_proxy
from tests.stores import StoreServer, new_store
from trainer.contract import ExitCode, TrainerError
from trainer.fetching import fetch_version
from trainer.storage import open_store, told_plainly
from trainer.store_errors import explain

WRONG_KEY = base64.b64encode(b"a key that is wrong").decode()


def told(root: Path, uri: str) -> TrainerError:
    with pytest.raises(TrainerError) as error:
        stage_folder(root, uri)
    assert error.value.hint
    assert error.value.__suppress_context__, "the library's text has addresses, which may be signed"
    return error.value


@pytest.fixture
def silent() -> Iterator[int]:
    """A port whose connections are never accepted, as where a firewall drops them."""
    with ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):  # the queue is full
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


def test_there_is_no_such_bucket(server: StoreServer, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"{new_store(server, monkeypatch).split('-')[0]}-that-is-not-there/some/prefix"
    error = told(source, uri)
    assert error.code is ExitCode.NOT_FOUND
    assert "no such bucket or container" in str(error)
    with pytest.raises(TrainerError) as fetching:
        fetch_version(uri, "0" * 64, tmp_path / "copy")
    assert fetching.value.code is ExitCode.NOT_FOUND


def test_the_credentials_are_refused(server: StoreServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_proxy(server.address) as proxy:
        uri = new_store(server, monkeypatch, proxy.address)
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", WRONG_KEY)
        if server.kind == "s3":  # moto takes any credentials
            proxy.add(Fault("refuse", times=ALWAYS, status=403))
        error = told(source, uri)
    assert error.code is ExitCode.PERMISSION
    assert WRONG_KEY not in str(error)


def test_writing_is_refused(server: StoreServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a role that may only read."""
    with running_proxy(server.address) as proxy:
        uri = new_store(server, monkeypatch, proxy.address)
        proxy.add(Fault("refuse", "PUT|POST", times=ALWAYS, status=403))
        error = told(source, uri)
    assert error.code is ExitCode.PERMISSION
    assert "list, read and write" in error.hint


@pytest.mark.parametrize(
    ("uri", "variable", "value", "named"),
    [
        ("s3://bucket/prefix", "AWS_METADATA_ENDPOINT", "http://127.0.0.1:{}", "AWS_ACCESS_KEY_ID"),
        ("az://container/prefix", "AZURE_MSI_ENDPOINT", "http://127.0.0.1:{}/metadata/identity/oauth2/token", "AZURE_STORAGE_ACCOUNT_KEY"),
    ],
    ids=["s3", "az"],
)
def test_there_are_no_credentials_at_all(
    no_cloud: None, silent: int, source: Path, monkeypatch: pytest.MonkeyPatch, uri: str, variable: str, value: str, named: str
) -> None:
    """Then the machine's identity is asked for, where on most machines nobody answers."""
    monkeypatch.setenv(variable, value.format(silent))
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "team")
    began = time.monotonic()
    error = told(source, uri)
    assert time.monotonic() - began < 40
    assert error.code is ExitCode.PERMISSION
    assert named in error.hint


def test_an_endpoint_that_nobody_answers_is_named(no_cloud: None, silent: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent}")
    began = time.monotonic()
    error = told(source, "s3://bucket/prefix")
    assert time.monotonic() - began < 35
    assert error.code is ExitCode.UNAVAILABLE
    assert f"no answer from http://127.0.0.1:{silent}" in str(error)
    assert "AWS_ENDPOINT_URL" in error.hint


@pytest.mark.parametrize(
    ("uri", "environment"),
    [
        ("s3://bucket", {"AWS_ENDPOINT_URL": "nonsense"}),
        ("s3://bucket", {"AWS_ENDPOINT_URL": "http://"}),
        ("s3:///prefix", {}),
        ("ftp://bucket", {}),
        ("az://container", {"AZURE_STORAGE_ACCOUNT_KEY": WRONG_KEY}),
        ("az://container", {"AZURE_STORAGE_ACCOUNT_NAME": "team", "AZURE_STORAGE_ACCOUNT_KEY": "no base64!"}),
        ("gs://bucket", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere/key.json"}),
    ],
)
def test_wrong_settings_are_told_as_such(
    no_cloud: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainerError) as error, told_plainly(uri):
        open_store(uri)
    assert error.value.code is ExitCode.CONFIG
    assert error.value.hint
    assert not [value for value in environment.values() if len(value) > 7 and value in str(error.value)]


def test_the_emulator_of_azure_needs_no_endpoint(az: StoreServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = new_store(az, monkeypatch)
    monkeypatch.delenv("AZURE_STORAGE_ENDPOINT")
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", az.address)
    assert stage_folder(source, uri).files


def test_a_signature_in_an_address_is_not_told(az: StoreServer, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared access signature travels in the query of each request."""
    uri = new_store(az, monkeypatch)
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2024-01-01&sig=VERYSECRET")
    error = told(source, uri)
    assert error.code is ExitCode.PERMISSION
    assert "VERYSECRET" not in str(error)


HEAD = "Generic S3 error: Error performing GET https://s3.amazonaws.com/b/k?sig=VERYSECRET in 2ms"


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (f"{HEAD} - Received redirect without LOCATION, this normally indicates an incorrectly configured region", "CONFIG", "region"),
        (f"{HEAD} - Server returned non-2xx status code: 400 Bad Request: <Code>AuthorizationHeaderMalformed</Code>", "CONFIG", "region"),
        (f"{HEAD} - Server returned non-2xx status code: 400 Bad Request: <Code>ExpiredToken</Code>", "PERMISSION", "expired"),
        (f"{HEAD} - Server returned non-2xx status code: 403 Forbidden: <Code>RequestTimeTooSkewed</Code>", "PERMISSION", "clock"),
        (f"{HEAD} - Server returned non-2xx status code: 503 Service Unavailable: <Code>SlowDown</Code>", "UNAVAILABLE", "busy"),
        (
            "Generic LocalFileSystem error: Unable to open file /s/refs/a.json#1: Read-only file system (os error 30)",
            "PERMISSION",
            "read-only",
        ),
        (f"{HEAD} - HTTP error: error sending request", "UNAVAILABLE", "no answer from https://s3.amazonaws.com"),
        (
            f"{HEAD} - Server returned non-2xx status code: 400 Bad Request: <Code>Odd</Code>",
            "UNAVAILABLE",
            "400 Bad Request (Odd)",
        ),
        (f"{HEAD}\n\nDebug source:\nGeneric {{ sig=VERYSECRET }}", "UNAVAILABLE", "s3://b"),
    ],
)
def test_answers_of_real_clouds_are_told_by_their_meaning(text: str, code: str, says: str) -> None:
    error = explain("s3://b/k", text)
    assert error.code.name == code
    assert says in str(error)
    assert "VERYSECRET" not in str(error)
