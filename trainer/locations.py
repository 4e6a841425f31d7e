"""Where things lie: URIs of object stores, ``file://`` URIs and plain paths. Pure."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainer.errors import ExitCode, TrainerError

REMOTE_SCHEMES = ("s3", "gs", "az")
ONE_SLASH = re.compile(rf"^({'|'.join((*REMOTE_SCHEMES, 'file'))}):/(?!/)(.*)")

# No bucket's name has either mark, and a secret key may have the slash that would end it.
SECRET = re.compile(rf"^({'|'.join(REMOTE_SCHEMES)}):/{{1,2}}[^/?#]*[:@]|^\w[\w+.-]*:/{{1,2}}[^/?#]*@")
BUCKETS = "s3://bucket/prefix, az://container/prefix, gs://bucket/prefix"
ELSEWHERE = "credentials and settings come from the profile or the environment"


def refuse_secrets(text: str) -> None:
    """Raises TrainerError (CONFIG) for a URI with credentials, which every message and record would show. This one does not."""
    if SECRET.match(text):
        message = "a URI has credentials, or a port, where its bucket should be; it is not shown"
        raise TrainerError(message, hint=f"use {BUCKETS}; {ELSEWHERE}", code=ExitCode.CONFIG)


def check_bucket(uri: str) -> None:
    """Raises TrainerError (CONFIG) for what is no URI of a bucket, or has credentials in it."""
    refuse_secrets(uri)
    parts = urlsplit(uri)
    if parts.scheme not in REMOTE_SCHEMES or not parts.netloc:
        shown = uri.partition("?")[0]  # behind it may be a signature
        raise TrainerError(f"{shown!r} is no object store", hint=f"use {BUCKETS}, file:// or a folder", code=ExitCode.CONFIG)


def to_uri(location: str | Path) -> str:
    """A plain path as a ``file://`` URI; a URI as it is. Raises TrainerError (CONFIG) for one that has not its slashes, or credentials."""
    text = str(location)
    _refuse_slips(text)
    uri = text.rstrip("/") if "://" in text else expand_home(text).absolute().as_uri()
    return "file:///" if uri == "file:" else uri  # a file may be mounted at the root


def _refuse_slips(text: str) -> None:
    """No folder is meant by ``s3:/bucket``, and no machine by ``file://folder``, which by the rules of URIs it would be."""
    refuse_secrets(text)
    text = text.partition("?")[0]  # behind it may be a signature
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


def expand_home(text: str | Path) -> Path:
    """With the home for a ``~``, which a shell leaves where it is not the beginning of a word, as in ``--store=~/data``.

    Raises TrainerError (CONFIG) for the home of nobody.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as exc:
        raise TrainerError(f"{str(text)!r}: {exc}", hint="write the whole path", code=ExitCode.CONFIG) from exc


def to_store_uri(location: str | Path) -> str:
    """As `to_uri`, for what is a store as a whole. Raises TrainerError (CONFIG) besides where more follows, which a store would not see."""
    uri = to_uri(location)
    place, asked, _ = uri.partition("?")
    store, hash_sign, name = place.partition("#")
    if not (asked or hash_sign):
        return uri
    instead = f"write {store}" if urlsplit(store).scheme in (*REMOTE_SCHEMES, "file") else f"use {BUCKETS}"
    what = ELSEWHERE if asked else f"its dataset {name!r} is named by itself"
    more = "; what follows its ? is not shown" if asked else ""  # it may be a signature
    raise TrainerError(f"{place!r} is more than a store{more}", hint=f"{instead}; {what}", code=ExitCode.CONFIG)


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
    return Path(unquote(parts.path)) if parts.scheme else expand_home(uri)
