"""Whose credentials sign: those that were given, of the environment, or of the profile that ``aws configure`` keeps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from obstore.store import S3Store

from tests.faults import FaultProxy, running_proxy
from tests.stores import StoreServer
from trainer.contract import ExitCode, TrainerError
from trainer.storage import ObjectFolder, open_store
from trainer.store_access import StoreAccess, access_to


def signers(proxy: FaultProxy) -> set[str]:
    return {match[1] for request in proxy.requests if (match := re.search(r"Credential=(\w+)/", request.authorization))}


@pytest.fixture
def profiles(s3: StoreServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_cloud: None) -> None:
    """Two profiles in a file of a user, and nothing in the environment."""
    lines = [f"[{name}]\naws_access_key_id = AKID{name.upper()}\naws_secret_access_key = made-up\n" for name in ("default", "work")]
    (tmp_path / "credentials").write_text("".join(lines))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@pytest.mark.usefixtures("profiles")
def test_the_nearest_credentials_sign(s3: StoreServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_proxy(s3.address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)

        def signed_by() -> set[str]:
            proxy.requests.clear()
            # A bucket of its own, as stores are kept open.
            ObjectFolder(f"{s3.make_bucket()}/x").put("a", b"b")
            return signers(proxy)

        assert signed_by() == {"AKIDDEFAULT"}
        monkeypatch.setenv("AWS_PROFILE", "work")
        assert signed_by() == {"AKIDWORK"}
        with access_to(StoreAccess(scheme="s3", endpoint=proxy.address)):
            assert signed_by() == {"AKIDWORK"}
        given = {"access_key_id": "AKIDGIVEN", "secret_access_key": "made-up", "region": "us-east-1"}
        with access_to(StoreAccess(scheme="s3", endpoint=proxy.address, config=given)):
            assert signed_by() == {"AKIDGIVEN"}
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDENVIRONMENT")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "made-up")
        assert signed_by() == {"AKIDENVIRONMENT"}


@pytest.mark.parametrize(
    ("environment", "unsigned"),
    [
        ({}, True),
        ({"AWS_ENDPOINT_URL": "https://minio.example.com"}, True),
        ({"AWS_ENDPOINT_URL": "http://minio.example.com"}, False),
        ({"AWS_UNSIGNED_PAYLOAD": "false"}, False),
    ],
)
def test_bodies_are_signed_where_nothing_else_proves_them(
    environment: dict[str, str], unsigned: bool, no_cloud: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = open_store("s3://bucket/prefix")
    assert isinstance(store, S3Store)
    assert str(store.config.get("unsigned_payload", "false")).lower() == str(unsigned).lower()


@pytest.mark.usefixtures("profiles")
def test_a_profile_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(TrainerError, match="profile gives no credentials") as refused:
        ObjectFolder("s3://bucket-of-nobody/x").get("a")
    assert refused.value.code is ExitCode.PERMISSION
    assert "aws sso login" in refused.value.hint
