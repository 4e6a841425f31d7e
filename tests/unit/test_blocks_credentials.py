"""From the real credential blocks of prefect-aws and prefect-azure to how obstore is told."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import SecretStr

from blocks.credentials import build_access, parse_connection_string, public_endpoint
from blocks.errors import ConfigError
from blocks.profiles import LocalProfile, load_credentials
from trainer.store_access import StoreAccess, access_to, store_options

SECRET = "made-up-value-7f3a"
CONNECTION = f"DefaultEndpointsProtocol=http;AccountName=dev;AccountKey={SECRET}==;BlobEndpoint=http://127.0.0.1:1/dev;"


@pytest.fixture(autouse=True)
def no_aws_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)


def aws(**fields: Any) -> Any:
    from prefect_aws import AwsCredentials

    return AwsCredentials(aws_access_key_id="AKIDMADEUP", aws_secret_access_key=SecretStr(SECRET), region_name="eu-central-1", **fields)


def azure(**fields: Any) -> Any:
    from prefect_azure import AzureBlobStorageCredentials

    return AzureBlobStorageCredentials(**fields)


def test_aws_credentials_become_what_obstore_signs_with() -> None:
    access = build_access(aws(), "s3", "http://127.0.0.1:9000")
    with access_to(access):
        options = store_options("s3://bucket/prefix")
    assert (options["region"], options["endpoint"]) == ("eu-central-1", "http://127.0.0.1:9000")
    signed = options["credential_provider"]()
    assert (signed["access_key_id"], signed["secret_access_key"]) == ("AKIDMADEUP", SECRET)
    assert store_options("s3://bucket/prefix") == {}


def test_the_address_of_the_block_is_used_where_the_profile_has_none() -> None:
    from prefect_aws import AwsClientParameters, MinIOCredentials

    minio = MinIOCredentials(
        minio_root_user="someone",
        minio_root_password=SecretStr(SECRET),
        aws_client_parameters=AwsClientParameters(endpoint_url="http://127.0.0.1:9000"),
    )
    assert build_access(minio, "s3", None).endpoint == "http://127.0.0.1:9000"
    assert build_access(minio, "s3", "https://other").endpoint == "https://other"


def test_an_azure_connection_string_is_taken_apart() -> None:
    access = build_access(azure(connection_string=CONNECTION), "az", None)
    assert access.endpoint == "http://127.0.0.1:1/dev"
    assert dict(access.config) == {"account_name": "dev", "account_key": f"{SECRET}=="}
    assert parse_connection_string("A=b=c; D=e;")["A"] == "b=c"


def test_an_azure_service_principal_is_passed_on() -> None:
    principal = azure(account_url="https://acct.blob.core.windows.net", client_id="c", tenant_id="t", client_secret=SECRET)
    assert build_access(principal, "az", None).config == {
        "account_name": "acct",
        "client_id": "c",
        "tenant_id": "t",
        "client_secret": SECRET,
    }


def test_no_secret_shows_in_a_repr() -> None:
    for access in (build_access(aws(), "s3", None), build_access(azure(connection_string=CONNECTION), "az", None)):
        assert SECRET not in repr(access)
        assert SECRET not in str(access)


def test_credentials_of_another_cloud_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="AwsCredentials do not open a store of az://"):
        build_access(aws(), "az", None)
    with pytest.raises(ConfigError, match="no kind of credentials for a store"):
        load_credentials("slack-webhook/mine")


def test_a_profile_without_credentials_leaves_the_environment_alone() -> None:
    assert LocalProfile(slots=1).store_access("s3://bucket") is None
    assert LocalProfile(slots=1, store_credentials="aws-credentials/prod").store_access("file:///folder") is None
    assert LocalProfile(slots=1, store_endpoint="http://127.0.0.1:9").store_access("s3://bucket") == StoreAccess(
        scheme="s3", endpoint="http://127.0.0.1:9"
    )


def test_an_access_ends_with_its_context_also_where_it_is_nested() -> None:
    outer, inner = StoreAccess(scheme="s3", endpoint="http://outer"), StoreAccess(scheme="s3", endpoint="http://inner")
    with access_to(outer):
        with access_to(inner), access_to(None):
            assert store_options("s3://b")["endpoint"] == "http://inner"
        assert store_options("s3://b")["endpoint"] == "http://outer"
        assert store_options("az://b") == {}
    assert store_options("s3://b") == {}


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("https://minio.example/base", "https://minio.example/base"),
        (f"https://me:{SECRET}@minio.example:9000/base?sig={SECRET}#{SECRET}", "https://minio.example:9000/base"),
        (None, None),
        ("", None),
    ],
)
def test_an_address_is_recorded_without_what_opens_it(endpoint: str | None, told: str | None) -> None:
    assert public_endpoint(StoreAccess(scheme="s3", endpoint=endpoint)) == told
    assert public_endpoint(None) is None
