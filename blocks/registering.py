"""Registers objects that lie in a bucket as a version of a dataset, in place: a manifest is written over them, no image moves.

The bucket is listed, a request per 1,000 objects, and nothing of it is read. Labels may come from a folder, or a COCO file:
they are staged as ever, under a name of their own, and laid over the objects. Everything is judged by names before
anything is written. Objects are then read by `trainer.in_place`, which refuses what has changed since.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

from blocks.joined_tree import JoinedTree
from blocks.label_matching import CONFIG_SUFFIXES, expected_label, find_format, is_label, labels_prefix, read_coco_names
from blocks.leases import Lease, check_generation, settled_generation, until_unchanged
from blocks.listing import add_objects, check_places
from blocks.reading import read_file
from blocks.refs import MAX_NAME, Ref, choose_name, move_ref, read_ref, ref_key
from blocks.scanning import Scan
from blocks.sending import list_objects, put_file, put_object
from blocks.staging import MAX_DEPTH, MAX_SHARE, Staged, stage_folder
from trainer.contract import ExitCode, TrainerError
from trainer.fetching import read_version
from trainer.locations import expand_home
from trainer.packs import ManifestHeader, StagedFile, file_key, manifest_key, write_manifest
from trainer.storage import folders_told_plainly, open_store, to_uri, told_plainly

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SAMPLES = 3
LABELS = ".labels"  # behind the name of a registered dataset: that of its labels

Say = Callable[[str], None]


@dataclass(frozen=True)
class Matched:
    """What the given labels are for. ``unused`` counts labels, or entries of a COCO file, that are of no image, with an example."""

    images: int
    unused: int
    unused_example: str
    format: str  # that a training would see; empty where it would see none
    problem: str = ""


@dataclass(frozen=True)
class Registered(Staged):
    """``changed_files`` are those that the version before lacks, or has otherwise. ``matched`` is None where no labels were given.

    ``labelled`` counts the images with a label, given or among the objects, by names; ``unlabelled`` is one without, and where its
    label is looked for. ``unread`` is an object that may be a COCO file: objects are not read.
    """

    source: str = ""
    in_place_files: int = 0
    in_place_bytes: int = 0
    images: int = 0
    matched: Matched | None = None
    labelled: int = 0
    unlabelled: tuple[str, str] = ("", "")
    unread: str = ""


def register_uri(
    data_uri: str, store_uri: str, *, labels: Path | None = None, name: str | None = None, on_progress: Say | None = None
) -> Registered:
    """Makes the objects below `data_uri`, with the labels laid over them, the newest version of a dataset in the store.

    `name` is by default made of the last part of the URI. Raises TrainerError: NOT_FOUND, CONFIG (places), PERMISSION, UNAVAILABLE,
    DATA (names; no images; labels that fit none of them).
    """
    started = time.monotonic()
    data_uri, store_uri = to_uri(data_uri), to_uri(store_uri)
    name = name or choose_name(unquote(data_uri.rpartition("/")[2]), MAX_NAME - len(LABELS))
    say: Say = on_progress or (lambda _: None)
    check_places(data_uri, store_uri)
    for each in (name, labels_name(name)):
        ref_key(each)
    with closing(JoinedTree()) as tree, folders_told_plainly():
        left_out = add_objects(tree, data_uri, store_uri, say)
        images = sum(1 for _ in tree.images())
        folder = expand_home(labels).absolute() if labels else None
        matched = match_labels(tree, folder, data_uri, images) if folder else None
        tree.add_labels_among_files()
        tree.match_labels()
        labels_found = (tree.count_labelled(), tree.find_unlabelled(), tree.find_json())

        def write() -> tuple[Ref, int, int]:
            store = open_store(store_uri)
            with Lease(store, name) as lease:
                lease.confirm()
                generation = settled_generation(store, store_uri, lease.store_time, say)
                sent = add_labels(tree, folder, store_uri, labels_name(name), say) if folder else 0
                ref, changed, sent_manifest = commit(tree, store, store_uri, name, data_uri)
                check_generation(store, store_uri, generation)
            return ref, changed, sent + sent_manifest

        with told_plainly(store_uri):
            ref, changed, sent = until_unchanged(write, store_uri)
        files, size = tree.count_in_place()
    return Registered(
        *(name, ref.version, store_uri, ref.files, ref.bytes, changed, sent, time.monotonic() - started, left_out),
        *(data_uri, files, size, images, matched, *labels_found),
    )


def labels_name(name: str) -> str:
    """The name under which the labels of a registered dataset are staged."""
    return f"{name}{LABELS}"


# --- Labels --------------------------------------------------------------------------------------------


def label_files(labels: Path) -> Iterator[tuple[str, Path]]:
    """Path in the dataset and file of each label. Raises TrainerError: NOT_FOUND, DATA."""
    if labels.is_file():
        if labels.suffix.lower() != ".json":
            raise TrainerError(f"{labels} is no COCO .json", hint="give that, or a folder of labels", code=ExitCode.DATA)
        yield f"annotations/{labels.name}", labels
    elif labels.is_dir():
        prefix = labels_prefix(labels)
        yield from ((prefix + path, labels / path) for path, _ in Scan(labels).files())
    else:
        raise TrainerError(f"there are no labels at {labels}", hint="check the path", code=ExitCode.NOT_FOUND)


def match_labels(tree: JoinedTree, labels: Path, data_uri: str, images: int) -> Matched:
    """Judges the labels by their names. Raises TrainerError (DATA) where they fit no image, or would replace one."""
    tree.add_labels(path for path, _ in label_files(labels))
    if image := tree.find_overlaid_image():
        hint = "remove it from the labels: images are used from the bucket"
        raise TrainerError(f"{image} is an image both in {data_uri} and in {labels}", hint=hint, code=ExitCode.DATA)
    if both := tree.find_both():
        hint = "rename one of them"
        raise TrainerError(f"{both} would be a file and a folder at once, in {data_uri} and {labels}", hint=hint, code=ExitCode.DATA)
    tree.match_labels()
    missing: list[str] = []
    configs: dict[str, Path] = {}
    for path, file in label_files(labels):
        if path.lower().endswith(CONFIG_SUFFIXES):
            configs[path] = file
        if path.lower().endswith(".json"):
            names = read_coco_names(file)
            if names is None and file == labels:
                raise TrainerError(f"{labels} is no COCO file", hint="it needs a list of images with file names", code=ExitCode.DATA)
            missing += tree.match_coco(path, names or [])
    labelled = tree.count_labelled()
    if not labelled:
        raise _no_match(tree, labels, data_uri, images, missing)
    unused, example = tree.unused_labels()
    try:
        layout, problem = find_format(tree.outline(), configs), ""
    except TrainerError as exc:
        layout, problem = "", str(exc)
    return Matched(labelled, unused + len(missing), example or (missing[0] if missing else ""), layout, problem)


def _no_match(tree: JoinedTree, labels: Path, data_uri: str, images: int, missing: list[str]) -> TrainerError:
    given = [path for path in tree.labels() if is_label(path)] or missing
    stems = {Path(path).stem for path in given}
    fitting = next((image for image in tree.images() if Path(image).stem in stems), None)
    if not given:
        hint = "give a folder of YOLO .txt or Pascal VOC .xml files, or a COCO .json"
        return TrainerError(f"{labels} has no labels", hint=hint, code=ExitCode.DATA)
    hint = "check that both are of the same dataset"
    if fitting and missing:
        hint = f"the file names fit, the folders do not: for {fitting} a file_name relative to the prefix or its images folder is needed"
    elif fitting:
        hint = f"the file names fit, the folders do not: for {fitting} a training looks for {expected_label(fitting, given[0])}"
    return TrainerError(
        f"none of the {images} images of {data_uri} has a label in {labels}: images are such as {_samples(tree.images())}, "
        f"labels are for such as {_samples(given)}",
        hint=hint,
        code=ExitCode.DATA,
    )


def _samples(paths: Iterator[str] | list[str]) -> str:
    return ", ".join(islice(paths, SAMPLES))


def add_labels(tree: JoinedTree, labels: Path, store_uri: str, name: str, say: Say) -> int:
    """Stages the labels and lays them over the tree. Returns the bytes that were sent."""
    if labels.is_file():
        with told_plainly(store_uri):
            file, sent = _stage_file(labels, open_store(store_uri))
        tree.add([file])
        return sent
    staged = stage_folder(labels, store_uri, name, lambda counts: say(f"{counts.changed_files} labels read"), on_silence=say)
    prefix = labels_prefix(labels)
    with told_plainly(store_uri):
        _, files = read_version(open_store(store_uri), staged.version)
        tree.add(file._replace(path=prefix + file.path) for file in files)
    return staged.sent_bytes


def _stage_file(labels: Path, store: ObjectStore) -> tuple[StagedFile, int]:
    """A single file, as an object of its own, unless the store has it."""
    import obstore

    read = read_file(str(labels), f"annotations/{labels.name}")
    key = file_key(read.digest)
    staged = StagedFile(read.path, read.digest, read.stat.size, "", 0)
    try:
        if obstore.head(store, key)["size"] == read.stat.size:
            return staged, 0
    except FileNotFoundError:
        pass
    if read.content is None:
        put_file(store, key, labels, read.digest, read.stat.size)
    else:
        put_object(store, key, read.content)
    return staged, read.stat.size


# --- The commit ----------------------------------------------------------------------------------------


def commit(tree: JoinedTree, store: ObjectStore, store_uri: str, name: str, source: str) -> tuple[Ref, int, int]:
    """Writes manifest and ref, where the newest version is another one. Returns the ref, how many files are new, and bytes sent."""
    total = tree.version()
    version = total.hexdigest()
    ref, _ = read_ref(store, store_uri, name)
    stored = _find_version(store, version)
    if ref is not None and ref.version == version and isinstance(stored, Ref):
        return ref, 0, 0
    if ref is not None:
        _read_base(tree, store, ref)
    changed, gone = tree.count_difference()
    newest, sent = stored, 0
    if not isinstance(newest, Ref):
        depth = ref.depth + 1 if ref is not None else 0
        comparable = ref is not None and ref.version != version and newest == "none"
        difference = comparable and depth <= MAX_DEPTH and changed + gone < MAX_SHARE * total.files
        header = ManifestHeader(
            version=version,
            base=ref.version if ref is not None and difference else None,
            depth=depth if difference else 0,
            files=total.files,
            bytes=total.bytes,
            packs=tree.packs(difference=difference),
            sources=(source,),
        )
        sent = _put_manifest(store, header, tree.lines(difference=difference))
        newest = Ref(version=version, files=total.files, bytes=total.bytes, depth=header.depth)
    move_ref(store, store_uri, name, newest)
    return newest, changed, sent


def _find_version(store: ObjectStore, version: str) -> Ref | Literal["none", "damaged"]:
    """A version that was there before keeps its manifest: others may say what differs from it, so it must not refer to them."""
    try:
        header, files = read_version(store, version)
        staged = {file.pack or file.sha256.hex() for file in files if not file.in_place}
    except TrainerError as exc:
        return "none" if exc.code is ExitCode.NOT_FOUND else "damaged"
    whole = staged <= list_objects(store)
    return Ref(version=version, files=header.files, bytes=header.bytes, depth=header.depth) if whole else "damaged"


def _read_base(tree: JoinedTree, store: ObjectStore, ref: Ref) -> None:
    """What the newest version has; nothing where it cannot be read, so that the new one says all again."""
    tree.forget_base()
    try:
        tree.add_base(read_version(store, ref.version)[1])
    except TrainerError as exc:
        if exc.code not in (ExitCode.NOT_FOUND, ExitCode.DATA):
            raise
        tree.forget_base()


def _put_manifest(store: ObjectStore, header: ManifestHeader, lines: Iterator[StagedFile | str]) -> int:
    import obstore

    with tempfile.TemporaryFile() as file:  # of a million objects it has some 60 MB
        write_manifest(file, header, lines)
        size = file.tell()
        file.seek(0)
        obstore.put(store, manifest_key(header.version), file)
    return size
