"""Fencing: of several trainers that may be alive, one writes an attempt's objects.

A platform that has lost a machine starts the attempt's container again, and the old one may still train. Each container takes
the attempt by compare-and-swap on ``owner.json``, and looks at it before it writes: who finds another's name there stops.
A later attempt of the run fences, too: its plan is there.

A write that was on its way when its sender looked may arrive later. The result is safe from it, as the one that has the attempt
compares all that the record holds once more at its end (`Mirror.forget`), and a checkpoint, as it is verified before it is used.
"""

from __future__ import annotations

import random
import secrets
import socket
import time
from typing import TYPE_CHECKING, Self

import msgspec

from trainer.contract import AttemptLayout
from trainer.errors import ExitCode, TrainerError
from trainer.files import NO_LOCKS, utc_now
from trainer.storage import ObjectFolder, folders_told_plainly, open_store, told_plainly
from trainer.store_records import AwareTime, StoreRecord, swap, tag_of

if TYPE_CHECKING:
    from obstore import UpdateVersion
    from obstore.store import ObjectStore

TRIES = 20
TRUST_SECONDS = 1.0  # so long an answer counts, where many small objects are written


class Fenced(TrainerError):
    """Somebody else's result counts by now."""


class Owner(StoreRecord, frozen=True, kw_only=True):
    """``owner.json``: the container that writes the attempt's objects. Each one that takes over counts on."""

    token: str
    generation: int
    host: str = msgspec.field(default_factory=socket.gethostname)
    pod: str = ""
    node: str = ""
    claimed_at: AwareTime = msgspec.field(default_factory=utc_now)

    @property
    def name(self) -> str:
        place = f" on {self.node}" if self.node else ""
        return f"{self.pod or self.host}{place}"


class Claim:
    """One container's right to write an attempt's objects, until another one takes it."""

    def __init__(self, uri: str, owner: Owner) -> None:
        self.uri, self.owner = uri, owner
        self._objects = ObjectFolder(uri)
        self._seen = (time.monotonic(), time.time())
        self._lost: TrainerError | None = None

    @classmethod
    def take(cls, uri: str, *, pod: str = "", node: str = "") -> Self:
        """Raises TrainerError: PERMISSION, UNAVAILABLE, DATA (``owner.json`` is damaged)."""
        token = secrets.token_hex(8)
        with folders_told_plainly(), told_plainly(uri):
            store = open_store(uri)
            for _ in range(TRIES):
                found, tag = _read(store, uri)
                owner = Owner(token=token, generation=found.generation + 1 if found else 1, pod=pod, node=node)
                # A swap whose answer was lost is refused when it is sent again.
                if _swap(store, uri, owner, tag) or _read(store, uri)[0] == owner:
                    return cls(uri, owner)
                time.sleep(random.uniform(0.05, 0.3))
        raise TrainerError(f"{uri}: other containers take this attempt all the time", hint="start one", code=ExitCode.UNAVAILABLE)

    def check(self, *, afresh: bool = False) -> None:
        """Raises Fenced (SUPERSEDED) where another container has taken the attempt; TrainerError where that cannot be learnt.

        An answer counts for a second, unless it is asked for `afresh`.
        """
        self.refuse_lost()
        now = (time.monotonic(), time.time())
        # The one clock stands still while a machine sleeps, the other may be set back.
        if not afresh and max(after - before for before, after in zip(self._seen, now, strict=True)) < TRUST_SECONDS:
            return
        with folders_told_plainly():
            data = self._objects.get(AttemptLayout.OWNER)
        if data is not None and (other := _parse(data, self.uri)).token != self.owner.token:
            since = f"{other.claimed_at:%H:%M:%S} UTC"
            self._lost = Fenced(
                f"another container ({other.name}) has had this attempt since {since}: this one stopped and writes nothing further",
                hint="follow that one, which goes on from the last checkpoint in the record",
                code=ExitCode.SUPERSEDED,
            )
            raise self._lost
        self._seen = now

    def refuse_lost(self) -> None:
        """Raises what an earlier `check`, perhaps of another thread, has learnt. Asks nobody."""
        if self._lost is not None:
            raise self._lost

    def give_up(self, error: TrainerError) -> None:
        """What is still on its way in a thread is not written."""
        self._lost = self._lost or error


def _read(store: ObjectStore, uri: str) -> tuple[Owner | None, UpdateVersion | None]:
    import obstore

    try:
        answer = obstore.get(store, AttemptLayout.OWNER)
        return _parse(bytes(answer.bytes()), uri), tag_of(answer.meta)
    except FileNotFoundError:
        return None, None


def _parse(data: bytes, uri: str) -> Owner:
    try:
        return Owner.from_json(data)
    except ValueError as exc:
        hint = "delete that object when no container of the attempt is left"
        raise TrainerError(f"{uri}/{AttemptLayout.OWNER} is damaged", hint=hint, code=ExitCode.DATA) from exc


def _swap(store: ObjectStore, uri: str, owner: Owner, tag: UpdateVersion | None) -> bool:
    import obstore

    try:
        return swap(store, uri, AttemptLayout.OWNER, owner, tag)
    except OSError as exc:
        if exc.errno not in NO_LOCKS:
            raise
        obstore.put(store, AttemptLayout.OWNER, owner.to_json())  # a volume without locks: the last one to write has it
        return True


# --- A later attempt ------------------------------------------------------------------------------------


def refuse_newer_attempt(attempts: ObjectFolder, number: int) -> None:
    """Raises Fenced (OCCUPIED) where a later attempt of the run was planned: its result counts, not this one's."""
    numbers = sorted((int(name) for name in attempts.names() if name.isdigit() and int(name) > number), reverse=True)
    for newer in numbers:
        refuse_attempt(attempts, number, newer)


def refuse_attempt(attempts: ObjectFolder, number: int, newer: int) -> None:
    """As `refuse_newer_attempt`, of one later attempt alone, which costs no listing."""
    begun = (AttemptLayout.PLAN, AttemptLayout.CONFIG)
    if any(attempts.get(f"{newer}/{name}") is not None for name in begun):
        raise Fenced(
            f"a newer attempt exists ({newer}), so attempt {number} keeps its result back",
            hint="follow the newer attempt, which goes on from this one's checkpoints",
            code=ExitCode.OCCUPIED,
        )
