"""Lists the objects that a dataset is to use in place: what is left out, what is refused, and whether the place may be used at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from blocks.joined_tree import JoinedTree
from blocks.label_matching import LABEL_SUFFIXES, is_image
from blocks.scanning import EXCLUDED, EXCLUDED_SUFFIXES, IGNORE_FILE, STORE_FOLDERS, Scan, parse_ignored, place_within
from trainer.errors import ExitCode, TrainerError
from trainer.in_place import find_identity
from trainer.packs import InPlace, StagedFile, check_path
from trainer.storage import list_metadata, open_store, to_path, told_plainly

if TYPE_CHECKING:
    from obstore import ObjectMeta
    from obstore.store import ObjectStore

UNREADABLE = re.compile(r"#[0-9]+$")  # as a name's end: in a folder, obstore takes it for its own part of an upload
MARKERS = "empty objects that stand for a folder"
TELL_EVERY = 1000

LeftOut = dict[str, tuple[int, str]]


def check_places(data_uri: str, store_uri: str) -> None:
    """Raises TrainerError: CONFIG where the two would mix, or a URI says more than a place; NOT_FOUND for no such folder."""
    parts = urlsplit(data_uri)
    if parts.scheme == "file":
        if not to_path(data_uri).is_dir():
            raise TrainerError(f"{to_path(data_uri)} is not a folder", hint="check the path", code=ExitCode.NOT_FOUND)
        if urlsplit(store_uri).scheme != "file":
            hint = "upload it with: trainyard dataset stage"
            raise TrainerError("a folder of this machine cannot be used in place by a store in a bucket", hint=hint, code=ExitCode.CONFIG)
    elif parts.query or parts.fragment or "@" in parts.netloc:
        # Not shown: it may be a signature.
        raise TrainerError(
            "the URI of the data has more than bucket and prefix", hint="give credentials by the environment", code=ExitCode.CONFIG
        )
    inside = f"{data_uri}/".removeprefix(f"{store_uri}/").split("/")[0] if f"{data_uri}/".startswith(f"{store_uri}/") else None
    if inside == "" or inside in STORE_FOLDERS:
        hint = f"give the store a prefix of its own, such as {data_uri}/.trainyard"
        raise TrainerError(f"{data_uri} is where the store {store_uri} keeps its own objects", hint=hint, code=ExitCode.CONFIG)


def add_objects(tree: JoinedTree, data_uri: str, store_uri: str, on_progress: Callable[[str], None]) -> LeftOut:
    """Adds all objects below the URI. Returns what was left out: kind → how many, and an example.

    Raises TrainerError: NOT_FOUND for no objects, DATA for no image or for a name that no folder can hold.
    """
    from obstore.exceptions import InvalidPathError

    listing = _Listing(data_uri, store_uri, on_progress)
    with told_plainly(data_uri):
        try:
            tree.add(listing.files(tree))
        except InvalidPathError as exc:
            text = str(exc).split("\n\n", maxsplit=1)[0].partition("path: ")[2]
            raise _unusable(data_uri, text) from exc
    if not listing.count:
        hint = "check bucket and prefix; a prefix is a folder, not the beginning of a name"
        raise TrainerError(f"{data_uri} has no objects", hint=hint, code=ExitCode.NOT_FOUND)
    markers, example = tree.drop_folder_markers()
    if markers:
        listing.leave_out(MARKERS, example, markers)
    if both := tree.find_both():
        raise _unusable(data_uri, f"{both} is an object and has objects below it, so it cannot be a file")
    if next(tree.images(), None) is None:
        raise TrainerError(
            f"none of the {listing.count} objects of {data_uri} is an image",
            hint="give the prefix that the images lie below",
            code=ExitCode.DATA,
        )
    return listing.left_out


class _Listing:
    """One listing: ``count`` is that of all objects, ``left_out`` what was not used."""

    def __init__(self, data_uri: str, store_uri: str, on_progress: Callable[[str], None]) -> None:
        self.count = 0
        self.left_out: LeftOut = {}
        self._uri, self._store_uri, self._on_progress = data_uri, store_uri, on_progress
        self._store = f"{store_uri}/".removeprefix(f"{data_uri}/") if store_uri.startswith(f"{data_uri}/") else ""

    def files(self, tree: JoinedTree) -> Iterator[StagedFile]:
        for meta in self._folder_metadata() if urlsplit(self._uri).scheme == "file" else self._bucket_metadata():
            path = meta["path"]
            self.count += 1
            if self.count % TELL_EVERY == 0:
                self._on_progress(f"{self.count} objects listed")
            if why := self._why_not(path, meta["size"]):
                self.leave_out(why, path)
                continue
            try:
                check_path(path)
            except ValueError as exc:
                raise _unusable(self._uri, str(exc)) from exc
            tree.add_folders_of(path)
            yield StagedFile(path, find_identity(self._uri, meta), meta["size"], "", 0, InPlace(self._uri, path))

    def _bucket_metadata(self) -> Iterator[ObjectMeta]:
        store = open_store(self._uri)
        is_ignored = ignored_in(store, self._uri)
        return (meta for meta in list_metadata(store) if is_ignored is None or not is_ignored(meta["path"]))

    def _folder_metadata(self) -> Iterator[ObjectMeta]:
        """Of what a stage would send: the library's own listing follows links to folders, wherever they lead."""
        import obstore

        store, folder = open_store(self._uri), to_path(self._uri)
        scan = Scan(folder, store=place_within(self._store_uri, folder))
        for path, _ in scan.files():
            if UNREADABLE.search(path):
                self.leave_out("names that end with # and a number, which cannot be read in place", path)
                continue
            try:
                found = obstore.head(store, path)
            except ValueError as exc:
                raise _unusable(self._uri, f"{path!r} has a character that no object's name may have") from exc
            yield found
        for kind, (count, example) in scan.left_out.items():
            self.leave_out(kind, example, count)

    def leave_out(self, kind: str, path: str, count: int = 1) -> None:
        before, example = self.left_out.get(kind, (0, path))
        self.left_out[kind] = (before + count, example)

    def _why_not(self, path: str, size: int) -> str:
        """Why an object is left out; empty for one that is used."""
        if self._store and path.startswith(self._store):
            return "objects of the store itself"
        if not EXCLUDED.isdisjoint(path.split("/")) or path.endswith(EXCLUDED_SUFFIXES):
            return "version control, caches and the like"
        if not size and not is_image(path) and not path.lower().endswith(LABEL_SUFFIXES):
            return MARKERS
        return ""


def ignored_in(store: ObjectStore, uri: str) -> Callable[[str], bool] | None:
    """What the bucket's own ``.trainyardignore`` names; None where it has none. Raises TrainerError (DATA) for one that is wrong."""
    import obstore

    try:
        content = bytes(obstore.get(store, IGNORE_FILE).bytes())
    except FileNotFoundError:
        return None
    return parse_ignored(content, f"{uri}/{IGNORE_FILE}")


def _unusable(data_uri: str, why: str) -> TrainerError:
    hint = "rename or delete that object, or give a prefix without it"
    return TrainerError(f"{data_uri}: {why}", hint=hint, code=ExitCode.DATA)
