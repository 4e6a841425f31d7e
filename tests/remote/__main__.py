"""`trainyard` with the provider of the tests, and its profile, among those that there are: python -m tests.remote train ..."""

from __future__ import annotations

import os
import sys

from flows import prefect_settings

prefect_settings.apply_defaults()


def main() -> None:
    import blocks
    from blocks import profiles
    from flows.cli import main as trainyard
    from tests.remote.provider import RemoteProfile

    blocks.PROVIDERS["remote"] = "tests.remote.provider:RemoteProvider"
    profiles.PROFILES = (*profiles.PROFILES, RemoteProfile)
    if sys.argv[1] == "save-profile":  # NAME, and the fields
        from prefect_aws import AwsCredentials
        from pydantic import SecretStr

        fields = dict(pair.split("=", 1) for pair in sys.argv[3:])
        if key := fields.pop("key", ""):
            AwsCredentials.register_type_and_schema()
            secret = SecretStr(os.environ["SECRET"])
            credentials = AwsCredentials(aws_access_key_id=key, aws_secret_access_key=secret, region_name="us-east-1")
            credentials.save("remote-store", overwrite=True)
            fields["store_credentials"] = "aws-credentials/remote-store"
        RemoteProfile.register_type_and_schema()
        RemoteProfile.model_validate(fields).save(sys.argv[2], overwrite=True)
        return
    trainyard()


if __name__ == "__main__":
    main()
