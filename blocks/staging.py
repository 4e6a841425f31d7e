"""Stages a folder into a store: what the store has is not sent, what is small travels in packs, and the ref moves last.

Objects are written in the order packs, manifest, ref, so a crash at any point leaves the version before it usable,
and the next stage goes on with what arrived. Two stagers at once do no harm: the same content is the same object.
What garbage collection may delete meanwhile is argued in `blocks.garbage`.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from blocks.concurrency import AdaptivePool
from blocks.counting import Counting, Counts
from blocks.learning import Learner
from blocks.leases import Lease, StoreChanged, check_generation, settled_generation, until_unchanged
from blocks.reading import MEMORY_BYTES, Read, read_files, take_read
from blocks.refs import Ref, choose_name, move_ref, read_ref, ref_key
from blocks.scanning import Scan, Stat, place_within, require_folder
from blocks.sending import find_missing, list_objects, list_sizes, object_names
from blocks.stat_cache import StatCache, with_cache
from blocks.uploads import LARGE_BYTES, Uploader
from trainer.errors import ExitCode, TrainerError
from trainer.packs import ManifestHeader, StagedFile, VersionHash, manifest_key, write_manifest
from trainer.silence import SilenceWatch
from trainer.storage import SEND_SECONDS, folders_told_plainly, list_metadata, open_store, to_uri, told_plainly

OnCounts = Callable[[Counts], None]

READ_FILES = 64
READ_BYTES = 2**20
READERS = 32  # at most; a cold disk wants many, what is in memory already is read fastest by few
FIRST_READERS = 1
AHEAD_BYTES = 32 * 2**20  # read and not yet packed
AHEAD_BATCHES = 8
MAX_DEPTH = 8  # manifests that say only what differs, before one says all again
MAX_SHARE = 0.25  # of the files; where more differs, the manifest says all again


@dataclass(frozen=True)
class Staged:
    """``sent_bytes`` are those of packs, large files and the manifest."""

    name: str
    version: str
    store_uri: str
    files: int
    bytes: int
    changed_files: int
    sent_bytes: int
    seconds: float
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])


def stage_folder(
    root: Path,
    store_uri: str,
    name: str | None = None,
    on_progress: OnCounts | None = None,
    *,
    only: Sequence[str] | None = None,
    again: bool = False,
    on_silence: Callable[[str], None] | None = None,
) -> Staged:
    """Makes the folder's files the newest version of the dataset `name` (default: the folder's name) in the store.

    With `only`, sorted relative paths, these files and no others, whatever they are called.
    With `again` nothing that is known of folder and store is relied on: all is read, here and there, and what the store lacks or has
    wrong is sent, which mends a damaged one.
    `on_silence` hears what is waited for: from another thread, that the store does not answer; at first, who stages this folder, or
    something else as this dataset, from this machine.
    Raises TrainerError: NOT_FOUND, PERMISSION, DATA (names; a file that changes while it is read), CONFIG (`name`), UNAVAILABLE.
    """
    started = time.monotonic()
    root, store_uri = root.absolute(), to_uri(store_uri)
    name = name or choose_name((Path(os.path.realpath(root)) if root.name == ".." else root).name)
    ref_key(name)  # refused before anything is done, so that no empty store is left
    require_folder(root)
    inner = place_within(store_uri, root)
    counts = Counts(total_files=len(only) if only is not None else 0)

    def tell_wait(holder: str) -> None:
        if on_silence is not None:
            on_silence(f"waiting for {holder}, which stages this folder or dataset: what it sends is not sent again")

    def stage(cache: StatCache) -> tuple[Ref, Scan]:
        counts.changed_files = counts.read_bytes = 0

        def work() -> tuple[Ref, Scan]:
            counts.done_files = counts.done_bytes = counts.reused_bytes = 0
            stager = _Stager(root, store_uri, name, cache, counts, silence, on_progress or (lambda _: None))
            with stager.lease:
                return stager.run(Scan(root, only, inner), again=again)

        with (
            told_plainly(store_uri),
            folders_told_plainly(),
            SilenceWatch(on_silence, SEND_SECONDS) as silence,
            Counting(Scan(root, None, inner), counts) if on_progress and only is None else nullcontext(),
        ):
            return until_unchanged(work, store_uri)

    ref, scan = with_cache(stage, root, store_uri, name, tell_wait, on_silence)
    seconds = time.monotonic() - started
    return Staged(name, ref.version, store_uri, ref.files, ref.bytes, counts.changed_files, counts.sent_bytes, seconds, scan.left_out)


class _Stager:
    def __init__(self, root: Path, uri: str, name: str, cache: StatCache, counts: Counts, silence: SilenceWatch, tell: OnCounts) -> None:
        self.root, self.uri, self.name, self.cache = root, uri, name, cache
        self.store = open_store(uri)
        self.counts, self.silence = counts, silence
        self.tell = partial(tell, counts)
        self.lease = Lease(self.store, name)
        self.learner = Learner(self.store, uri, name, cache)
        self.new_bytes = 0  # of contents that nothing was known of when they were read
        self.readers = AdaptivePool(FIRST_READERS, READERS, reads_files=True)
        self.uploader = Uploader(uri, root, cache, counts, silence, self.tell)

    def run(self, scan: Scan, *, again: bool) -> tuple[Ref, Scan]:
        ref, _ = read_ref(self.store, self.uri, self.name, mend=again)
        base = self._trust(ref, again=again)
        with closing(self.cache.changes(scan.files(), self.counts, distrust=base is None)) as changes:
            changed = self._send(changes)
        if base is not None and not changed:
            return base, scan
        newest = self._write_manifest(base, again=again)
        if base is not None and newest is base:  # files were written anew with the same content
            self.cache.commit(base.version)
            return base, scan
        with self.silence.asking():
            move_ref(self.uploader.store, self.uri, self.name, newest, mend=again)
        check_generation(self.store, self.uri, self.cache.get("generation"))
        self.cache.commit(newest.version)
        return newest, scan

    def _trust(self, ref: Ref | None, *, again: bool) -> Ref | None:
        """What to write the difference to. None where the store is not as this cache left it; then it is asked what it has.

        Of the store no more is believed by this than that it has the version that its ref names: `_require_remembered` sees to the rest.
        """
        if ref is not None and ref.version == self.cache.get("version") and not self.cache.get("dirty") and not again:
            return ref
        self.cache.set("dirty", "1")
        self.lease.confirm()
        self.cache.set("generation", settled_generation(self.store, self.uri, self.lease.store_time, self.silence.tell))
        if again:
            self._compare(ref)
            return None
        # A new name may well be of files that the store has under another.
        self.uploader.listed = (self.learner.learn_others(math.inf) if ref is None else {}) or list_sizes(self.store)
        if ref is not None:
            self.learner.learn(ref.version, self.uploader.listed)
        self.cache.keep_placed(object_names(self.uploader.listed))
        return None

    def _compare(self, ref: Ref | None) -> None:
        """Believes of the store only what is read there now and is right. An object of which a part is wrong is sent anew as a whole."""
        self.learner.look_at = math.inf  # nobody has compared what the others have
        self.cache.set("others", "")
        self.cache.forget_stats()
        if ref is not None and self.learner.learn(ref.version):
            files = self.learner.files_of(ref.version)
        else:  # this machine may know what the manifest said
            self.cache.keep_placed_of_seen()
            files = self.cache.staged_files()
        self.counts.to_compare_bytes = ref.bytes if ref is not None else 0
        self.cache.forget_objects(object_names(self._find_wrong(files)))

    def _find_wrong(self, files: Iterable[StagedFile]) -> set[str]:
        """Keys of the store's objects in which these files are not as they should be."""
        from trainer.verifying import find_wrong

        def tell(size: int) -> None:
            self.counts.compared_bytes += size
            self.tell()

        return find_wrong(self.uri, files, tell, self.silence)

    # --- What changed ---

    def _send(self, changes: Iterator[tuple[str, Stat | None]]) -> bool:
        """Reads what is new and sends what the store lacks. Whether anything was new."""
        began = False
        try:
            for found in self._read(changes):
                if not began:
                    began = True
                    self.lease.take()
                    self.cache.set("dirty", "1")  # until the ref has moved
                    self.cache.writer.execute("BEGIN")
                self._take(found)
            if began:
                self.uploader.finish()
                self.cache.writer.execute("COMMIT")
        except BaseException:
            self.uploader.abandon()
            raise
        finally:
            self.readers.shutdown()
            self.uploader.shutdown()
        return began

    def _read(self, changes: Iterator[tuple[str, Stat | None]]) -> Iterator[list[Read] | str]:
        """Files that threads read ahead, some at a time; a bare path for one that is gone."""
        ahead: deque[tuple[Future[list[Read]] | str, int]] = deque()
        waiting = 0
        for batch, size in batches(changes):
            ahead.append((batch if isinstance(batch, str) else self.readers.submit(size, read_files, self.root, batch, MEMORY_BYTES), size))
            waiting += size
            while waiting > AHEAD_BYTES or len(ahead) > AHEAD_BATCHES + 2 * self.readers.limit:
                self._await(ahead[0][0])
                found, taken = take_read(ahead)
                waiting -= taken
                yield found
        while ahead:
            self._await(ahead[0][0])
            yield take_read(ahead)[0]

    def _await(self, first: Future[list[Read]] | str) -> None:
        """Until it has been read. What arrives meanwhile is remembered, as a large file takes its time."""
        while isinstance(first, Future) and not first.done():
            self.uploader.wait(first)

    def _take(self, found: list[Read] | str) -> None:
        if isinstance(found, str):
            self.cache.remove(found)
            return
        digests = [read.digest for read in found]
        known = self.uploader.pending.intersection(digests) | self.cache.find_placed_among(digests)
        new = {read.digest: read.stat.size for read in found if read.digest not in known}
        self.new_bytes += sum(new.values())
        if new and self.new_bytes >= self.learner.look_at:
            self._ask_others()
            known |= self.cache.find_placed_among(list(new))
        for read in found:
            self.counts.changed_files += 1
            self.counts.read_bytes += read.stat.size
            if read.digest in known:
                self.counts.reuse(1, read.stat.size)
                continue
            known.add(read.digest)
            self.uploader.add(read)
        self.cache.add_seen((read.path, read.stat, read.digest, read.began_ns) for read in found)
        self.tell()

    def _ask_others(self) -> None:
        """Whether another dataset of the store has what is new here. Nothing that it has goes from here on until the ref has moved."""
        self.cache.writer.execute("COMMIT")
        self.lease.confirm()
        check_generation(self.store, self.uri, self.cache.get("generation"))
        self.uploader.listed |= self.learner.learn_others(self.new_bytes)
        self.cache.writer.execute("BEGIN")

    # --- The commit ---

    def _write_manifest(self, base: Ref | None, *, again: bool) -> Ref:
        import obstore

        total = VersionHash()
        for path, digest, size in self.cache.files():
            total.add(path, digest, size)
        version = total.hexdigest()
        if not total.files:
            raise TrainerError(f"{self.root} has no files to stage", hint="check the folder and .trainyardignore", code=ExitCode.DATA)
        if base is not None and version == base.version:
            return base
        self.lease.confirm()
        check_generation(self.store, self.uri, self.cache.get("generation"))
        found = "damaged" if again else self._find_manifest(version)
        chain: dict[str, int] = json.loads(self.cache.get("chain") or "{}")  # manifests that the base's is read with, and their sizes
        self.cache.set("chain", "")
        if isinstance(found, Ref):
            return found
        depth = base.depth + 1 if base is not None else 0
        small = self.cache.count_difference() < MAX_SHARE * total.files
        difference = base is not None and found == "none" and depth <= MAX_DEPTH and small and base.version in chain
        if base is not None:
            self._require_remembered(chain if difference else {}, difference=difference)
        header = ManifestHeader(
            version=version,
            base=base.version if base is not None and difference else None,
            depth=depth if difference else 0,
            files=total.files,
            bytes=total.bytes,
            packs=tuple(self.cache.packs(difference=difference)),
        )
        out = io.BytesIO()
        write_manifest(out, header, self.cache.lines(difference=difference))
        with self.silence.asking():
            obstore.put(self.uploader.store, manifest_key(version), out.getbuffer())
        self.counts.sent_bytes += out.tell()
        self.cache.set("chain", json.dumps((chain if difference else {}) | {version: out.tell()}))
        return Ref(version=version, files=total.files, bytes=total.bytes, depth=header.depth)

    def _require_remembered(self, chain: dict[str, int], *, difference: bool) -> None:
        """What the manifest names and this stage has not sent, the cache only remembers: of a store that may have been emptied since,
        and filled from another machine or a copy, with the same version in other packs. Of the manifests below it a rule of the
        bucket may have dropped the oldest.

        Raises StoreChanged where any of it is gone.
        """
        if chain:
            there = {meta["path"]: meta["size"] for meta in list_metadata(self.store, "manifests")}
            if any(there.get(manifest_key(version)) != size for version, size in chain.items()):
                raise StoreChanged
        remembered = self.cache.objects(difference=difference) - self.uploader.arrived - self.uploader.listed.keys()
        if find_missing(self.store, remembered):
            raise StoreChanged

    def _find_manifest(self, version: str) -> Ref | Literal["none", "damaged"]:
        """A version that was there before keeps its manifest: others may say what differs from it, so it must not refer to them.

        Where it names other places than the cache does, a content was sent again since, maybe as its object was damaged. So these are
        compared, and either the manifest is written anew or the cache is taught.
        """
        from trainer.fetching import read_version

        named: set[str] = set()
        disputed = 0
        try:
            header, files = read_version(self.store, version)
            for file, known in zip(files, self.cache.staged_files(), strict=True):
                named.add(file.pack or file.sha256.hex())
                disputed += file.size if file != known else 0
            if not named <= list_objects(self.store):
                return "damaged"
        except TrainerError as exc:
            return "none" if exc.code is ExitCode.NOT_FOUND else "damaged"
        if disputed:
            self.counts.to_compare_bytes += disputed
            pairs = zip(read_version(self.store, version)[1], self.cache.staged_files(), strict=True)
            if self._find_wrong(file for file, known in pairs if file != known):
                return "damaged"
            self.learner.learn(version, list_sizes(self.store))
        return Ref(version=version, files=header.files, bytes=header.bytes, depth=header.depth)


# --- Reading and sending -------------------------------------------------------------------------------


def batches(changes: Iterable[tuple[str, Stat | None]]) -> Iterator[tuple[list[str] | str, int]]:
    """Paths to be read together, with their bytes; a large file is read alone, a bare path is gone."""
    batch: list[str] = []
    total = 0
    for path, found in changes:
        if found is None:
            yield path, 0
            continue
        if found.size > LARGE_BYTES:
            yield [path], min(found.size, MEMORY_BYTES)
            continue
        batch.append(path)
        total += found.size
        if len(batch) >= READ_FILES or total >= READ_BYTES:
            yield batch, total
            batch, total = [], 0
    if batch:
        yield batch, total
