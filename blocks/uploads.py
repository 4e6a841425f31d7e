"""Brings contents to the store: small ones in packs, large ones as objects of their own, and remembers of each as soon as it is there.

Packs are made in the order of the paths, and those that have arrived are left out by whoever goes on after a kill. So he makes
the same ones anew, and finds by their names which of them have arrived though nobody wrote it down.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blocks.concurrency import AdaptivePool
from blocks.counting import Counts
from blocks.reading import MEMORY_BYTES, Read
from blocks.sending import PART_BYTES, PARTS_AT_ONCE, put_file, put_object
from blocks.stat_cache import StatCache
from trainer.packs import BLOCK, END, file_key, pack_id, pack_key, padding, tar_header
from trainer.silence import SilenceWatch
from trainer.storage import open_store

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PACK_BYTES = 16 * 2**20
# Larger files are objects of their own. Measured on loopback, 150 MB of files, medians of 4, packed against on their own, CPU seconds of
# client and server: 0.57 against 0.68 at 300 KB, 0.52 against 0.53 at 1 MB, 0.53 against 0.49 at 3 MB; wall with 30 ms of latency: 0.92
# against 1.20 s, 0.88 against 0.91 s, 0.78 against 0.78 s. So what is saved by packing is gone from 1 MB on.
LARGE_BYTES = 2**20
SENDERS = 32  # at most
FIRST_SENDERS = 4
FLYING_BYTES = 96 * 2**20  # handed to the senders and not yet in the store

Rows = list[tuple[bytes, str, int]]  # digest, pack and offset of contents


@dataclass
class Pack:
    """A pack that fills. ``id`` is known once it is full."""

    content: bytearray = field(default_factory=bytearray)
    digests: list[tuple[bytes, int]] = field(default_factory=list[tuple[bytes, int]])
    offsets: list[int] = field(default_factory=list[int])

    def add(self, digest: bytes, content: bytes) -> None:
        self.digests.append((digest, len(content)))
        self.offsets.append(len(self.content) + BLOCK)
        self.content += tar_header(digest, len(content))
        self.content += content
        self.content += padding(len(content))


class Upload(NamedTuple):
    """One object under way. ``bytes`` are those that travel, ``held`` those of memory, ``content`` those of the files in it."""

    key: str
    bytes: int
    held: int
    content: int
    rows: Rows


class Uploader:
    """Of one stage, and for its thread; others send. ``listed``: objects and sizes that the store has, where it was asked.

    The cache has a transaction open while contents are added.
    """

    def __init__(
        self, uri: str, root: Path, cache: StatCache, counts: Counts, silence: SilenceWatch, on_counts: Callable[[], None]
    ) -> None:
        self.uri, self.root, self.cache, self.counts, self.silence = uri, root, cache, counts, silence
        self.on_counts = on_counts
        self.listed: dict[str, int] = {}
        self.pending: set[bytes] = set()  # on its way to the store
        self.arrived: set[str] = set()  # keys of what was sent
        self._pack = Pack()
        self._pool = AdaptivePool(FIRST_SENDERS, SENDERS)
        self._flying: dict[Future[None], Upload] = {}

    @cached_property
    def store(self) -> ObjectStore:
        return open_store(self.uri, "send")

    def add(self, read: Read) -> None:
        """A content that the store lacks as far as the cache knows. May wait until there is memory for it."""
        self.pending.add(read.digest)
        size, key = read.stat.size, file_key(read.digest)
        if size <= LARGE_BYTES:
            assert read.content is not None, "what is packed fits into memory"
            self._pack.add(read.digest, read.content)
            if len(self._pack.content) >= PACK_BYTES:
                self._close_pack()
            return
        held = size if size <= MEMORY_BYTES + PACK_BYTES else PART_BYTES * PARTS_AT_ONCE
        upload = Upload(key, size, held, size, [(read.digest, "", 0)])
        if read.content is not None:
            self._send(upload, partial(put_object, self.store, key, read.content))
        else:
            self._send(upload, partial(put_file, self.store, key, self.root / read.path, read.digest, size, self.silence.answered))

    def _close_pack(self) -> None:
        pack, self._pack = self._pack, Pack()
        if not pack.digests:
            return
        name = pack_id(pack.digests)
        rows = [(digest, name, offset) for (digest, _), offset in zip(pack.digests, pack.offsets, strict=True)]
        pack.content += END
        size = len(pack.content)
        upload = Upload(pack_key(name), size, size, sum(size for _, size in pack.digests), rows)
        self._send(upload, partial(put_object, self.store, upload.key, pack.content))

    def _send(self, upload: Upload, send: Callable[[], None]) -> None:
        if self.listed.get(upload.key) == upload.bytes:  # of a stage that was killed before its cache said so
            self.counts.reuse(len(upload.rows), upload.content)
            self._place(upload.rows)
            return
        self._settle(max(0, FLYING_BYTES - upload.held))
        self._flying[self._pool.submit(upload.bytes, self.silence.during, send)] = upload

    def finish(self) -> None:
        """Sends the last pack, and returns once all has arrived."""
        self._close_pack()
        self._settle(0)

    def _settle(self, most: int) -> None:
        """Waits until those under way hold at most so many bytes."""
        self.remember()
        while sum(upload.held for upload in self._flying.values()) > most:
            self.wait()

    def wait(self, *others: Future[Any]) -> None:
        """Until one of those under way has arrived, or one of the others is done."""
        wait([*self._flying, *others], return_when=FIRST_COMPLETED)
        self.remember()

    def remember(self) -> None:
        """Where what has arrived lies, in whatever order: a stage that is cut after this goes on from here. Raises what did not arrive."""
        done = [future for future in self._flying if future.done()]
        uploads = [(future, self._flying.pop(future)) for future in done]
        arrived = [upload for future, upload in uploads if future.exception() is None]
        for upload in arrived:
            self.counts.sent_bytes += upload.bytes
            self.counts.done_files += len(upload.rows)
            self.counts.done_bytes += upload.content
            self.arrived.add(upload.key)
            self._place(upload.rows)
        if arrived:
            self.cache.writer.execute("COMMIT")
            self.cache.writer.execute("BEGIN")
            self.on_counts()
        for future in done:
            future.result()

    def _place(self, rows: Rows) -> None:
        self.cache.add_placed(rows)
        self.pending.difference_update(digest for digest, _, _ in rows)

    def shutdown(self) -> None:
        """Waits for what has begun, and drops the rest."""
        self._pool.shutdown()

    def abandon(self) -> None:
        """As `shutdown`, after an error: what arrives all the same is remembered, and spares the next stage that much."""
        self.shutdown()
        with suppress(Exception):  # what went wrong first tells more
            self.remember()
