"""Marks what the versions of a store need, and refuses where that cannot be told."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple

from blocks.deletion import StoredObject
from trainer.errors import ExitCode, TrainerError
from trainer.packs import DamagedManifest, StagedFile, manifest_key, object_key, open_manifest

if TYPE_CHECKING:
    from obstore.store import ObjectStore


class Reason(StrEnum):
    """Why something stays. An object counts once, for the first of them."""

    REF = "ref"
    PREVIOUS = "previous"
    RUN = "run"
    PIN = "pin"
    GRACE = "grace"


class Root(NamedTuple):
    """A version that is needed. ``name`` is that of the dataset, or of the pin."""

    version: str
    reason: Reason
    name: str = ""


@dataclass
class Marker:
    """A manifest is read once, also where a plan is made again, unless it was written anew since."""

    store: ObjectStore
    uri: str
    read: dict[tuple[str, str], tuple[str | None, frozenset[str]]] = field(
        default_factory=dict[tuple[str, str], tuple[str | None, frozenset[str]]]
    )

    def mark(self, roots: Iterable[Root], manifests: dict[str, StoredObject], *, drop_damaged: bool = False) -> dict[str, Reason]:
        """The keys that the roots need, with the first reason; with `drop_damaged`, a damaged manifest before a ref's newest needs nothing.

        Raises TrainerError (DATA) where what a root needs cannot be told.
        """
        marked: dict[str, Reason] = {}
        for root in roots:
            version: str | None = root.version
            while version and manifest_key(version) not in marked:
                found = manifests.get(version)
                if found is None and root.reason is Reason.REF:
                    raise self._refusal(root, f"the store lacks the manifest of version {version[:12]}")
                if found is None:
                    break  # freed before
                try:
                    base, keys = self._read(version, found)
                except DamagedManifest as exc:
                    # Of a young one nobody can read it, and nobody named it.
                    if root.reason is Reason.GRACE or (root.reason is Reason.PREVIOUS and drop_damaged):
                        break
                    raise self._refusal(root, exc.message) from exc
                marked[found.key] = root.reason
                for key in keys:
                    marked.setdefault(key, root.reason)
                version = base
        return marked

    def _read(self, version: str, found: StoredObject) -> tuple[str | None, frozenset[str]]:
        import obstore

        known = self.read.get((version, found.tag))
        if known is None:
            header, lines = open_manifest(bytes(obstore.get(self.store, found.key).bytes()), version)
            keys = frozenset(object_key(line) for line in lines if isinstance(line, StagedFile) and not line.in_place)
            known = self.read[version, found.tag] = (header.base, keys)
        return known

    def _refusal(self, root: Root, why: str) -> TrainerError:
        store, name = shlex.quote(self.uri), shlex.quote(root.name)
        match root.reason:
            case Reason.REF:
                needed = f"a ref needs it, that of dataset {root.name!r}"
                hint = (
                    f"`trainyard dataset stage PATH --name {name} --store {store} --again`, with its folder as PATH, writes it anew, "
                    "and `trainyard dataset register` does so for a set in place; "
                    f"`trainyard dataset rm {name} --store {store}` gives the dataset up"
                )
            case Reason.PREVIOUS:
                needed = f"the dataset {root.name!r} had before, and keeps, version {root.version[:12]}, which needs it"
                hint = f"nobody can read that version any more: `trainyard dataset gc --store {store} --drop-damaged` gives it up"
            case Reason.PIN:
                needed = f"{root.name} needs it"
                hint = "delete that object if its run is over"
            case _:
                needed = f"an open run of this machine needs it, as version {root.version[:12]}"
                hint = "`trainyard runs` shows them; cancel the run, as it cannot fetch its dataset"
        return TrainerError(f"{self.uri}: {why}; {needed}; nothing was freed", hint=hint, code=ExitCode.DATA)
