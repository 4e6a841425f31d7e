"""What an error of obstore means to the person who gave the URI. Its errors have few types, so most is told from their text."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from trainer.errors import ExitCode, TrainerError

CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; profiles (aws configure, aws sso login) need boto3: uv sync --extra aws",
    "az": "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_USE_AZURE_CLI=true after `az login`",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
}
ENDPOINT = {"s3": "AWS_ENDPOINT_URL", "az": "AZURE_STORAGE_ACCOUNT_NAME or AZURE_STORAGE_ENDPOINT"}


class Known(NamedTuple):
    pattern: str
    says: str
    hint: str
    code: ExitCode


# The first that fits. `{credentials}` and `{endpoint}` are the scheme's.
KNOWN = (
    # Where the environment has no credentials, the machine's identity is asked for: at these addresses.
    Known(
        r"/latest/(api/token|meta-data)|/metadata/identity/|/computeMetadata/|169\.254\.1\d\d\.",
        "no credentials were found, and this machine has no identity of its own in that cloud",
        "{credentials}",
        ExitCode.PERMISSION,
    ),
    Known(r"RequestTimeTooSkewed", "the clock of this machine is wrong", "set it, and try again", ExitCode.PERMISSION),
    Known(r"ExpiredToken|TokenRefreshRequired", "the credentials have expired", "renew them: {credentials}", ExitCode.PERMISSION),
    Known(
        r"Invalid Access Key|UnableToDecodeKey|Unable to (open|decode|parse) service account|Account must be specified|SASTokenInvalid",
        "the credentials in the environment are incomplete or malformed",
        "{credentials}",
        ExitCode.CONFIG,
    ),
    Known(
        r"redirect without LOCATION|AuthorizationHeaderMalformed|PermanentRedirect|IllegalLocationConstraint",
        "the bucket is in another region",
        "set AWS_REGION to the bucket's",
        ExitCode.CONFIG,
    ),
    Known(r"Invalid(Bucket|Resource)Name|InvalidUri", "no bucket or container can have that name", "correct the URI", ExitCode.CONFIG),
    Known(r"404 Not Found", "there is no such bucket or container", "create it, or correct the URI", ExitCode.NOT_FOUND),
    Known(
        r"401 Unauthorized|403 Forbidden",
        "access denied",
        "{credentials}; they must allow to list, read and write there",
        ExitCode.PERMISSION,
    ),
    Known(r"\(os error 30\)", "that place is read-only", "make it writable, or choose another", ExitCode.PERMISSION),
    Known(r"429 |SlowDown|503 |ServerBusy", "the store is busy", "try again later; what has arrived is kept", ExitCode.UNAVAILABLE),
)


def explain(uri: str, text: str, *, denied: bool = False) -> TrainerError:
    """The error to tell. The text has two paragraphs: the first is for people, with the cause at its end; the second repeats it.

    `denied` is what the error's type says, where its text says nothing that is known.
    """
    said = " ".join(text.split("\n\n", maxsplit=1)[0].split())
    scheme = urlsplit(uri).scheme
    credentials = CREDENTIALS.get(scheme, "check the credentials in the environment")
    endpoint = ENDPOINT.get(scheme, "the endpoint")
    for known in KNOWN:
        if re.search(known.pattern, said):
            hint = known.hint.format(credentials=credentials, endpoint=endpoint)
            return TrainerError(f"{uri}: {known.says}", hint=hint, code=known.code)
    if "error sending request" in said and (asked := re.search(r"Error performing \w+ (https?://[^/ ?]+)", said)):
        hint = f"check the network and {endpoint}, and try again; what has arrived is kept"
        return TrainerError(f"{uri}: no answer from {asked[1]}", hint=hint, code=ExitCode.UNAVAILABLE)
    if denied:
        hint = f"{credentials}; they must allow to list, read and write there"
        return TrainerError(f"{uri}: access denied", hint=hint, code=ExitCode.PERMISSION)
    hint = "check the network, the endpoint and the credentials"
    return TrainerError(f"{uri}: {_cause(said)}", hint=hint, code=ExitCode.UNAVAILABLE)


def _cause(said: str) -> str:
    """Without what an address asks for, which may be a signature."""
    cause = re.sub(r"\?\S+", "", said.rpartition(" - ")[2])
    status = re.search(r"status code: (\d+ [A-Z][A-Za-z ]+)", cause)
    if status is None:
        return cause[:300]
    code = re.search(r"<Code>(\w+)</Code>", cause)
    return f"the store answers {status[1].strip()}" + (f" ({code[1]})" if code else "")
