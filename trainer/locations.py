"""Where things lie: URIs of object stores, ``file://`` URIs and plain paths. Pure."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainer.errors import ExitCode, TrainerError

REMOTE_SCHEMES = ("s3", "gs", "az")
ONE_SLASH = re.compile(rf"^({'|'.join((*REMOTE_SCHEMES, 'file'))}):/(?!/)(.*)")


def to_uri(location: str | Path) -> str:
    """A plain path as a ``file://`` URI; a URI as it is. Raises TrainerError (CONFIG) for a URI that has not its slashes."""
    text = str(location)
    _refuse_slips(text)
    uri = text.rstrip("/") if "://" in text else _expanded(text).absolute().as_uri()
    return "file:///" if uri == "file:" else uri  # a file may be mounted at the root


def _refuse_slips(text: str) -> None:
    """No folder is meant by ``s3:/bucket``, and no machine by ``file://folder``, which by the rules of URIs it would be."""
    if slip := ONE_SLASH.match(text):
        scheme, rest = slip.groups()
        slashes = "///" if scheme == "file" else "//"
        needed = "three" if scheme == "file" else "two"
        message = f"{text!r} has one slash where a URI has {needed}"
        raise TrainerError(message, hint=f"write {scheme}:{slashes}{rest}", code=ExitCode.CONFIG)
    parts = urlsplit(text)
    if parts.scheme in REMOTE_SCHEMES and "//" in parts.path.rstrip("/"):
        once = re.sub("/+", "/", parts.path)
        hint = f"write {text.replace(parts.path, once, 1)}; an object whose name has an empty part cannot be used"
        raise TrainerError(f"{text!r} has two slashes in a row", hint=hint, code=ExitCode.CONFIG)
    if parts.scheme == "file" and not parts.netloc and parts.path[:1] not in ("", "/"):
        hint = f"write ./{parts.path} for a folder below this one, file:///{parts.path} for one below the root"
        raise TrainerError(f"{text!r} is neither a path nor a URI", hint=hint, code=ExitCode.CONFIG)
    if parts.scheme == "file" and parts.netloc not in ("", "localhost"):
        rest = text.removeprefix("file://")
        hint = f"write {rest} for a folder below this one, file:///{rest} for one below the root"
        raise TrainerError(f"{text!r} has two slashes where a file's URI has three", hint=hint, code=ExitCode.CONFIG)


def _expanded(text: str) -> Path:
    """With the home for a ``~``, which a shell leaves where it is not the beginning of a word, as in ``--store=~/data``."""
    try:
        return Path(text).expanduser()
    except RuntimeError as exc:
        raise TrainerError(f"{text!r}: {exc}", hint="write the whole path", code=ExitCode.CONFIG) from exc


def to_store_uri(location: str | Path) -> str:
    """As `to_uri`, for what is a store as a whole. Raises TrainerError (CONFIG) besides where more follows, which a store would not see."""
    uri = to_uri(location)
    for mark in "?#":
        store, found, rest = uri.partition(mark)
        if found:
            what = f"its dataset {rest!r} is named by itself" if mark == "#" else "settings come from the profile or the environment"
            raise TrainerError(f"{uri!r} is more than a store", hint=f"write {store}; {what}", code=ExitCode.CONFIG)
    return uri


def is_bucket(uri: str) -> bool:
    return urlsplit(uri).scheme in REMOTE_SCHEMES


def to_path(uri: str) -> Path:
    """The local path of a ``file://`` URI or plain path. Raises TrainerError (CONFIG) for other schemes, and as `to_uri` does."""
    _refuse_slips(uri)
    parts = urlsplit(uri)
    if parts.scheme not in ("", "file"):
        raise TrainerError(
            f"{uri!r} is not a folder of this machine",
            hint="give a local path or a file:// URI; object stores are not supported for this yet",
            code=ExitCode.CONFIG,
        )
    return Path(unquote(parts.path)) if parts.scheme else _expanded(uri)
