"""Learns from a store's manifests where contents lie, so that what any dataset of it has is not sent again.

To ask what other datasets have costs requests, and time for each of their files. So a dataset that the store has asks only while it
finds more new content than that is worth, and each state of another's ref once; a name that is new there asks before all else.
Believed is only what is listed, and nothing that is listed goes: the lease of the stage is there before, see `blocks.garbage`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from blocks.refs import OtherRef, Ref, other_refs
from blocks.sending import list_sizes
from blocks.stat_cache import StatCache
from trainer.errors import TrainerError
from trainer.packs import StagedFile, object_key

if TYPE_CHECKING:
    from obstore.store import ObjectStore

OTHERS = 16  # datasets that are asked for, those that moved last first
# To send so much takes as long as to ask for refs, 80 ms at 100 Mbit/s; the same for a file of a manifest that is read, and remembered.
LOOK_BYTES = 2**20
FILE_BYTES = 100


def price(ref: Ref) -> int:
    """The bytes of new content that it is worth to read this dataset's manifest for."""
    return max(LOOK_BYTES, ref.files * FILE_BYTES)


class Learner:
    """Of one stage. ``look_at``: the bytes of new content at which the others are to be asked, or asked again."""

    def __init__(self, store: ObjectStore, uri: str, name: str, cache: StatCache) -> None:
        self.store, self.uri, self.name, self.cache = store, uri, name, cache
        self.look_at: float = LOOK_BYTES
        self._others: list[OtherRef] | None = None

    def files_of(self, version: str) -> Iterator[StagedFile]:
        """Raises as `read_version` does."""
        from trainer.fetching import read_version

        return (file for file in read_version(self.store, version)[1] if not file.in_place)

    def learn(self, version: str, listed: Container[str] | None = None) -> bool:
        """Where the files of a version lie: in objects that are `listed`; else in whatever it names, and nothing else is known then.

        False where its manifest is gone or damaged.
        """
        with suppress(TrainerError), self.cache.writer:  # it says nothing, and is written anew
            self.cache.writer.execute("BEGIN")
            if listed is None:
                self.cache.forget_placed()
            files = self.files_of(version)
            self.cache.add_placed((file.sha256, file.pack, file.offset) for file in files if listed is None or object_key(file) in listed)
            return True
        return False

    def learn_others(self, new_bytes: float) -> dict[str, int]:
        """What other datasets have, of those for which `new_bytes` pay. Objects and sizes that the store has, where it was asked.

        Garbage must not be collected meanwhile.
        """
        known: dict[str, str] = json.loads(self.cache.get("others") or "{}")
        if self._others is None:
            self._others = other_refs(self.store, self.uri, self.name, known, OTHERS)
        chosen = [other for other in self._others if price(other.ref) <= new_bytes]
        self._others = [other for other in self._others if other not in chosen]
        self.look_at = min((price(other.ref) for other in self._others), default=math.inf)
        if not chosen:
            return {}
        listed = list_sizes(self.store)  # after the refs, so that it has what they need
        for version in dict.fromkeys(other.ref.version for other in chosen):
            self.learn(version, listed)
        self.cache.set("others", json.dumps(known | {other.name: other.tag for other in chosen}))
        return listed
