"""The newest version of each dataset of a store: one small object, moved by compare-and-swap after all that it names."""

from __future__ import annotations

import random
import re
import shlex
import time
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec

from blocks.leases import MARK_KEY
from blocks.scanning import STORE_FOLDERS
from trainer.errors import ExitCode, TrainerError
from trainer.files import utc_now
from trainer.packs import SHA256
from trainer.storage import folders_told_plainly, list_metadata, list_paths, open_store, to_path, told_plainly
from trainer.store_records import AwareTime, StoreRecord, swap, tag_of

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ObjectStore

KEPT_VERSIONS = 10
NAMES_TOLD = 10
TRIES = 20
UNCLEAR_TRIES = 3
MAX_NAME = 100
NAME = re.compile(rf"[\w][\w .+-]{{0,{MAX_NAME - 1}}}")

Version = Annotated[str, msgspec.Meta(pattern=rf"^{SHA256.pattern}$")]


class Ref(StoreRecord, frozen=True, kw_only=True):
    """``refs/<name>.json``. ``previous`` are the versions before it, newest first: a run may be at work on one."""

    version: Version
    files: int
    bytes: int
    depth: int = 0
    updated_at: AwareTime = msgspec.field(default_factory=utc_now)
    previous: tuple[Version, ...] = ()


def ref_key(name: str) -> str:
    """Raises TrainerError (CONFIG) for a name that is no plain file name."""
    if len(name) > MAX_NAME:
        raise TrainerError(f"{name!r} is too long for a name", hint=f"use at most {MAX_NAME} characters (--name)", code=ExitCode.CONFIG)
    if not NAME.fullmatch(name):
        raise TrainerError(
            f"{name!r} is no name of a dataset", hint="use letters, digits, . _ + - and spaces (--name)", code=ExitCode.CONFIG
        )
    return f"refs/{name}.json"


def choose_name(said: str, most: int = MAX_NAME) -> str:
    """The name of a dataset that was given none: that of its folder, with a dash for what no name may have. At most so many characters."""
    text = re.sub(r"[^\w .+-]+", "-", unicodedata.normalize("NFC", said))[:most]
    return re.sub(r"^\W+", "", text) or "dataset"


def read_ref(store: ObjectStore, uri: str, name: str, *, mend: bool = False) -> tuple[Ref | None, UpdateVersion | None]:
    """The ref, and what tells this state of it from the next.

    Raises TrainerError (DATA) for a damaged one; with `mend`, that is as none, to be replaced.
    """
    return _read(store, uri, name, ref_key(name), mend=mend)


def _read(store: ObjectStore, uri: str, name: str, key: str, *, mend: bool = False) -> tuple[Ref | None, UpdateVersion | None]:
    import obstore

    try:
        answer = obstore.get(store, key)
        data = bytes(answer.bytes())
    except FileNotFoundError:
        return None, None
    try:
        return Ref.from_json(data), tag_of(answer.meta)
    except ValueError as exc:
        if mend:
            return None, tag_of(answer.meta)
        options = f"{shlex.quote(name)} --store {shlex.quote(uri)}"
        hint = (
            f"`trainyard dataset rm {options}` removes it, and `trainyard dataset stage PATH --name {options} --again` writes it anew: "
            "either way the versions before its newest are garbage then"
        )
        raise TrainerError(f"the ref of dataset {name!r} in {uri} is damaged", hint=hint, code=ExitCode.DATA) from exc


def move_ref(store: ObjectStore, uri: str, name: str, newest: Ref, *, mend: bool = False) -> None:
    """Makes `newest` the dataset's version; with `mend`, also in place of a damaged ref.

    Of two stagers at once the later one wins; the other's version stays, named by its hash.
    No answer to the swap is believed but a clear yes: an answer can be lost, and "exists already" can be our own first try,
    or on S3 a conflict after which nothing is there. So the ref is read again, and what it says counts.
    """
    from obstore.exceptions import GenericError

    unclear = 0
    for _ in range(TRIES):
        stored, tag = read_ref(store, uri, name, mend=mend)
        if stored is not None and stored.version == newest.version:
            return
        before = (stored.version, *stored.previous) if stored else ()
        previous = tuple(version for version in before if version != newest.version)[:KEPT_VERSIONS]
        try:
            if swap(store, uri, ref_key(name), msgspec.structs.replace(newest, previous=previous), tag):
                return
        except GenericError:
            unclear += 1
            if unclear == UNCLEAR_TRIES:
                raise
        time.sleep(random.uniform(0.05, 0.3))
    raise TrainerError(f"{uri}: others move the ref of {name!r} all the time", hint="stage again", code=ExitCode.UNAVAILABLE)


def delete_ref(store: ObjectStore, uri: str, name: str) -> None:
    """Takes the name away, also of a damaged ref; its versions go with the next collection of garbage.

    Raises TrainerError (NOT_FOUND) for none.
    """
    import obstore

    key = ref_key(name)
    try:
        obstore.head(store, key)
    except FileNotFoundError as exc:
        hint = f"trainyard dataset list --store {shlex.quote(uri)}"
        raise TrainerError(f"{uri} has no dataset {name!r}", hint=hint, code=ExitCode.NOT_FOUND) from exc
    obstore.delete(store, key)


def list_names(store: ObjectStore) -> list[str]:
    """Of what has the name of a ref: other files may lie there, such as the ``._cells.json`` that macOS leaves beside one."""
    return sorted(name for path in list_paths(store, "refs") if (name := _name_of(path)))


def _name_of(key: str) -> str:
    """The dataset whose ref it is; empty for what is none. Also of a ref whose accents a file system has taken apart, as HFS+ does."""
    name = key.removeprefix("refs/").removesuffix(".json")
    return name if key.endswith(".json") and NAME.fullmatch(unicodedata.normalize("NFC", name)) else ""


def _name_datasets(store: ObjectStore) -> str:
    names = list_names(store)
    more = f" and {len(names) - NAMES_TOLD} more" if len(names) > NAMES_TOLD else ""
    return f"it has {', '.join(map(repr, names[:NAMES_TOLD]))}{more}" if names else "it has no datasets"


class Refs(NamedTuple):
    """By name, each in the order of names; of a damaged one, what is wrong."""

    whole: dict[str, Ref]
    damaged: dict[str, TrainerError]


def read_refs(store: ObjectStore, uri: str) -> Refs:
    refs = Refs({}, {})
    for name in list_names(store):
        try:
            ref, _ = _read(store, uri, name, f"refs/{name}.json")
        except TrainerError as exc:
            refs.damaged[name] = exc
            continue
        if ref is not None:
            refs.whole[name] = ref
    return refs


class OtherRef(NamedTuple):
    """``tag`` tells this state of the ref from the next."""

    name: str
    tag: str
    ref: Ref


def other_refs(store: ObjectStore, uri: str, name: str, known: Mapping[str, str], most: int) -> list[OtherRef]:
    """Of datasets other than `name` whose refs are not as the `known` tags say. At most so many, the one that was moved last first."""
    others: list[OtherRef] = []
    for meta in sorted(list_metadata(store, "refs"), key=lambda meta: meta["last_modified"], reverse=True):
        other, tag = _name_of(meta["path"]), meta["e_tag"] or ""
        if len(others) == most or not other or other == name or known.get(other) == tag:
            continue
        with suppress(TrainerError):  # damaged, or of no name of ours: nobody can stage by it
            ref, _ = read_ref(store, uri, other)
            if ref is not None:
                others.append(OtherRef(other, tag, ref))
    return others


def resolve_version(store: ObjectStore, uri: str, wanted: str) -> str:
    """The version that a dataset's name, a version or the beginning of one means.

    Raises TrainerError: NOT_FOUND for none, CONFIG for more than one.
    """
    if NAME.fullmatch(wanted):
        ref, _ = read_ref(store, uri, wanted)
        if ref is not None:
            return ref.version
    found = {path.removeprefix("manifests/").split(".")[0] for path in list_paths(store, "manifests")}
    matching = sorted(version for version in found if version.startswith(wanted.lower()))
    if not matching or len(wanted) < 4:
        hint = f"{_name_datasets(store)}; see them with: trainyard dataset list --store {shlex.quote(uri)}"
        raise TrainerError(f"{uri} has no dataset or version {wanted!r}", hint=hint, code=ExitCode.NOT_FOUND)
    if len(matching) > 1:
        raise TrainerError(f"{wanted!r} is the beginning of {len(matching)} versions", hint="give more of it", code=ExitCode.CONFIG)
    return matching[0]


def find_version(uri: str, wanted: str) -> str:
    """As `resolve_version`, of a store that is only looked at: a folder that is not there is not made."""
    require_store(uri)
    with told_plainly(uri):
        return resolve_version(open_store(uri), uri, wanted)


def require_store(uri: str) -> None:
    """Raises TrainerError (NOT_FOUND) for a folder that is not there, or holds something else; a bucket answers for itself."""
    if "://" in uri and not uri.startswith("file://"):
        return
    folder = to_path(uri)
    hint = "check --store; `dataset stage` makes one"
    if not folder.is_dir():
        raise TrainerError(f"there is no store at {folder}", hint=hint, code=ExitCode.NOT_FOUND)
    with folders_told_plainly():
        names = {path.name for path in folder.iterdir()}
    if names and names.isdisjoint((*STORE_FOLDERS, MARK_KEY)):
        raise TrainerError(f"{folder} is no store: it holds other files", hint=hint, code=ExitCode.NOT_FOUND)
