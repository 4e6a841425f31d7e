"""Frees what no version of a store needs any more, and proves first that nobody needs it.

Needed are, with all that they name: the versions of the refs; the newest of those before them; the versions of
pins and of open runs of this machine; versions younger than the grace; and the manifests below each of these. An object
of its own right is needed while it is younger than the grace. Only what has the name of a pack, large file, manifest,
lease or pin is ever deleted, and what a process that died left half written in a folder; files that a manifest names outside
of the store are not looked at.

Why nothing is lost (stores are consistent: whoever reads after a write sees it):

stage || collection. A stage writes its lease, and later reads the generation: before it writes a manifest, and once more
after the ref has moved. A collection writes a new generation, and later lists the leases; a live one ends it with nothing
deleted. So one of the two sees the other. A stage that sees a new generation waits for the collection's end, lists the
store, sends what is gone from its folder and starts over.
A stage suspended for an hour. Its lease has ended and its packs may be gone. It wakes up, sees the new generation and
sends them again. Suspended between its last look and the move of the ref, it finds out by the look after that move; the
ref is then a root, so what it sends again stays. Killed there as well, it has left the cache marked as dirty: the next
stage of that folder lists the store and mends it.
A cache that believes in packs of last week. It holds the generation that its knowledge is of; another one in the store
means the same as above. Nothing changed in the folder: the ref names the version, so the store has it.
A store that was emptied, and filled again from another machine or a copy: it may have the same version and generation, and
other packs. A stage believes in the version of the ref; what else its manifest names it has sent itself, or asks for.
A pack that only another dataset's ref needs, and that a stage has found by it. The lease is in the store, and the generation
is the one that the stage knows, before the stage reads that ref: whoever takes the ref away later and collects sees the lease.
A manifest that is there already, of another machine or an older time, is taken over only if all that it names is there.
collection || collection. The mark is taken by compare-and-swap; the second is refused.
A collection that crashes. Manifests go first, so none is left that names what is gone; the rest is garbage still. Its mark
says that it deletes; ten minutes after it was written, others go on.
A collection suspended for an hour. It deletes for five minutes after its mark was written, by both clocks of its machine,
and reads the mark before each thousand objects.
pin || collection. Whoever pins waits for a collection under way, and then looks whether the version is still there.
fetch || collection. A fetch takes no lease, as it may have no right to write. Runs pin their version. The version of a ref
that moved on is among those before it. Another one's fetch fails and says what is missing, as every file is compared.
The clocks of machines play no part: ages are differences of the store's own times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
from pydantic import ValidationError

from blocks.deletion import (
    BATCH,
    CONTENT,
    KINDS,
    PATTERNS,
    UNFINISHED,
    StoredObject,
    delete_objects,
    delete_unfinished,
    list_kind,
    list_unfinished,
)
from blocks.leases import DEAD_AFTER, Collection, LiveLease, read_lease, settled_generation
from blocks.marking import Marker, Reason, Root
from blocks.refs import KEPT_VERSIONS, Ref, read_refs
from trainer.errors import ExitCode, TrainerError
from trainer.files import utc_now
from trainer.packs import manifest_key
from trainer.storage import open_store, told_plainly
from trainer.store_records import AwareTime, StoreRecord

if TYPE_CHECKING:
    from obstore.store import ObjectStore

GRACE = timedelta(hours=24)


class PinFile(StoreRecord, frozen=True, kw_only=True):
    """``pins/<run_id>.json``: a run needs this version, wherever its record lies."""

    version: str
    created_at: AwareTime = msgspec.field(default_factory=utc_now)
    expires_at: AwareTime


@dataclass(frozen=True, kw_only=True)
class Policy:
    """``keep_previous`` versions before a ref's stay; with `previous_for`, only those that were written more recently than that.

    With `drop_damaged`, those do not stay whose manifest is damaged, so that nobody can read them.
    """

    grace: timedelta = GRACE
    keep_previous: int = KEPT_VERSIONS
    previous_for: timedelta | None = None
    drop_damaged: bool = False


@dataclass(frozen=True)
class CollectionPlan:
    """``garbage`` in the order of its deletion; ``kept``: objects and bytes by reason; ``leases``: of stages that are under way."""

    garbage: tuple[StoredObject, ...]
    kept: dict[Reason, tuple[int, int]]
    leases: tuple[LiveLease, ...]

    @property
    def bytes(self) -> int:
        return sum(found.size for found in self.garbage)

    def by_kind(self) -> dict[str, tuple[int, int]]:
        """Objects and bytes of the garbage."""
        counts = Counter(found.kind for found in self.garbage)
        sizes: Counter[str] = Counter()
        for found in self.garbage:
            sizes[found.kind] += found.size
        return {kind: (count, sizes[kind]) for kind, count in counts.items()}


# --- Pins ----------------------------------------------------------------------------------------------


def pin_key(run_id: str) -> str:
    return f"pins/{run_id}.json"


def pin_version(store: ObjectStore, uri: str, run_id: str, version: str, days: float, on_wait: Callable[[str], None] | None = None) -> None:
    """Keeps the version for a run for so many days from now; to pin it again begins them anew.

    `on_wait` is told of a collection that is waited for.
    Raises TrainerError (NOT_FOUND) for a version that the store does not have, or not any more.
    """
    import obstore

    now = utc_now()
    pin = PinFile(version=version, created_at=now, expires_at=now + timedelta(days=days))
    with told_plainly(uri):
        obstore.put(store, pin_key(run_id), pin.to_json())
        # A collection that has not seen the pin may be under way. It deletes manifests first: what has one afterwards is whole.
        settled_generation(store, uri, on_wait=on_wait)
        try:
            obstore.head(store, manifest_key(version))
        except FileNotFoundError as exc:
            delete_objects(store, [pin_key(run_id)])
            hint = "stage the dataset again"
            raise TrainerError(f"{uri} has no dataset version {version[:12]}", hint=hint, code=ExitCode.NOT_FOUND) from exc


def unpin_version(store: ObjectStore, uri: str, run_id: str) -> None:
    """None there is fine."""
    with told_plainly(uri):
        delete_objects(store, [pin_key(run_id)])


def _read_pin(store: ObjectStore, uri: str, key: str) -> PinFile | None:
    import obstore

    try:
        return PinFile.from_json(bytes(obstore.get(store, key).bytes()))
    except FileNotFoundError:  # unpinned since it was listed
        return None
    except ValueError as exc:
        raise TrainerError(f"{uri}/{key} is damaged", hint="delete that object if its run is over", code=ExitCode.DATA) from exc


# --- What is needed --------------------------------------------------------------------------------------


def choose_garbage(
    objects: Iterable[StoredObject], marked: dict[str, Reason], oldest_kept: datetime
) -> tuple[list[StoredObject], dict[Reason, tuple[int, int]]]:
    """What is neither marked nor as young as `oldest_kept`, and how much stays for which reason."""
    garbage: list[StoredObject] = []
    kept: dict[Reason, tuple[int, int]] = {}
    for found in objects:
        reason = marked.get(found.key) or (Reason.GRACE if found.modified > oldest_kept else None)
        if reason is None:
            garbage.append(found)
        else:
            count, size = kept.get(reason, (0, 0))
            kept[reason] = (count + 1, size + found.size)
    garbage.sort(key=lambda found: CONTENT.index(found.kind))
    return garbage, kept


def plan_collection(marker: Marker, uri: str, policy: Policy, run_versions: Iterable[str], now: datetime) -> CollectionPlan:
    """What a collection would free and what it would keep. Reads only."""
    store = marker.store
    # Leases before refs: a stage whose lease is gone has moved its ref.
    leases = list_kind(store, "leases")
    ages = {found.key: now - found.modified for found in leases}
    live = {key: read_lease(store, key, age) for key, age in ages.items() if age <= DEAD_AFTER}
    refs = _read_all_refs(store, uri)
    pins = [(found, _read_pin(store, uri, found.key)) for found in list_kind(store, "pins")]
    objects = [found for kind in CONTENT for found in list_kind(store, kind)]
    manifests = {version: found for found in objects if (version := _version_of(found))}
    oldest_kept = now - policy.grace

    def roots() -> Iterator[Root]:
        yield from (Root(ref.version, Reason.REF, name) for name, ref in refs.items())
        for name, version in ((name, version) for name, ref in refs.items() for version in ref.previous[: policy.keep_previous]):
            found = manifests.get(version)
            if policy.previous_for is None or (found is not None and now - found.modified < policy.previous_for):
                yield Root(version, Reason.PREVIOUS, name)
        yield from (Root(version, Reason.RUN) for version in run_versions)
        yield from (Root(pin.version, Reason.PIN, found.key) for found, pin in pins if pin is not None and not _is_over(found, pin, now))
        yield from (Root(version, Reason.GRACE) for version, found in manifests.items() if found.modified > oldest_kept)

    marked = marker.mark(roots(), manifests, drop_damaged=policy.drop_damaged)
    garbage, kept = choose_garbage(objects, marked, oldest_kept)
    # Whoever is at work on such a file has a lease, or has not begun it ten minutes ago.
    garbage += [found for found in list_unfinished(uri) if now - found.modified > max(policy.grace, DEAD_AFTER)]
    garbage += [found for found in leases if found.key not in live]
    garbage += [found for found, pin in pins if pin is not None and _is_over(found, pin, now)]
    return CollectionPlan(tuple(garbage), kept, tuple(lease for lease in live.values() if lease is not None))


def _read_all_refs(store: ObjectStore, uri: str) -> dict[str, Ref]:
    refs = read_refs(store, uri)
    for exc in refs.damaged.values():
        exc.message += ", so nobody knows which versions it needs; nothing was freed"
        raise exc
    return refs.whole


def _version_of(found: StoredObject) -> str:
    matched = PATTERNS["manifests"].fullmatch(found.key)
    return matched[1] if matched else ""


def _is_over(found: StoredObject, pin: PinFile, now: datetime) -> bool:
    """Both times in it are of one clock, so that their difference is right though that clock be wrong."""
    return now - found.modified > pin.expires_at - pin.created_at


def versions_of_open_runs() -> set[str]:
    """Of the runs that this machine knows; those of others are pinned."""
    from blocks.errors import RunNotFound
    from blocks.outputs import all_runs
    from blocks.pruning import why_in_use

    versions: set[str] = set()
    for record in all_runs():
        if why_in_use(record):
            try:
                versions.add(record.dataset_ref().version)
            except RunNotFound:  # it was opened before it had a dataset, and has none to lose
                continue
            except ValidationError as exc:
                hint = "mend or delete the record; nothing was freed"
                raise TrainerError(f"the dataset index of run {record.run_id} is damaged", hint=hint, code=ExitCode.DATA) from exc
    return versions


# --- Deletion --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Freed:
    """``left``: objects for the next time, where there was not enough time for all."""

    objects: int
    bytes: int
    left: int


def open_marker(store_uri: str) -> Marker:
    return Marker(open_store(store_uri), store_uri)


def collect(marker: Marker, uri: str, policy: Policy, run_versions: Iterable[str]) -> Freed:
    """Looks again under the mark, and deletes. Raises TrainerError: OCCUPIED where a stage or another collection is under way."""
    collection = Collection(marker.store, uri)
    try:
        plan = plan_collection(marker, uri, policy, run_versions, collection.began)
        if plan.leases:
            raise occupied_error(uri, plan.leases)
    except BaseException:
        collection.end()
        raise
    done = 0
    for kind in KINDS:
        keys = [found.key for found in plan.garbage if found.kind == kind]
        for start in range(0, len(keys), BATCH):
            if not collection.may_delete():
                break
            some = keys[start : start + BATCH]
            if kind == UNFINISHED:
                delete_unfinished(uri, some)
            else:
                delete_objects(marker.store, some)
            done += len(some)
    collection.end()
    return Freed(done, sum(found.size for found in plan.garbage[:done]), len(plan.garbage) - done)


def occupied_error(uri: str, leases: Sequence[LiveLease]) -> TrainerError:
    more = f" (and {len(leases) - 1} more)" if len(leases) > 1 else ""
    hint = "try again when it is done, or when its lease has ended; nothing was freed"
    return TrainerError(f"{uri}: {leases[0]}{more}", hint=hint, code=ExitCode.OCCUPIED)
