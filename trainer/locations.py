"""Where things lie: URIs of object stores, ``file://`` URIs and plain paths. Pure."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainer.errors import ExitCode, TrainerError

REMOTE_SCHEMES = ("s3", "gs", "az")
ONE_SLASH = re.compile(rf"^({'|'.join(REMOTE_SCHEMES)}):/(?!/)(.*)")


def to_uri(location: str | Path) -> str:
    """A plain path as a ``file://`` URI; a URI as it is. Raises TrainerError (CONFIG) for a URI that lacks a slash: no folder is meant."""
    text = str(location)
    if slip := ONE_SLASH.match(text):
        scheme, rest = slip.groups()
        raise TrainerError(f"{text!r} has one slash where a URI has two", hint=f"write {scheme}://{rest}", code=ExitCode.CONFIG)
    uri = text.rstrip("/") if "://" in text else Path(text).expanduser().absolute().as_uri()
    return "file:///" if uri == "file:" else uri  # a file may be mounted at the root


def is_bucket(uri: str) -> bool:
    return urlsplit(uri).scheme in REMOTE_SCHEMES


def to_path(uri: str) -> Path:
    """The local path of a ``file://`` URI or plain path. Raises TrainerError for other schemes."""
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        raise TrainerError(
            f"{uri!r} is not a folder of this machine",
            hint="give a local path or a file:// URI; object stores are not supported for this yet",
            code=ExitCode.CONFIG,
        )
    return Path(unquote(parts.path) if parts.scheme else uri)
