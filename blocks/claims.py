"""Which run a request is: an open one, one that another process begins at this moment, or a new one.

A run has no record until its dataset was read, which may take minutes. Until then a claim,
``<home>/claims/<request hash>.json``, says which run id was chosen for the request and by which processes.
It is read and written under a lock of its own, so two commands of the same second agree on one run.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import ValidationError

from blocks.driving import Driver, is_alive
from blocks.errors import ServiceUnavailable
from blocks.naming import short_hash
from blocks.outputs import look_everywhere
from blocks.places import home
from trainer.contract import StoredRecord, utc_now
from trainer.files import write_json
from trainer.locks import wait_for_lock

LOCK_SECONDS = 120.0  # whoever holds it may be comparing a large dataset with its index


class Claim(StoredRecord):
    """``claims/<request hash>.json``. It counts while one of its processes lives and the run has no record."""

    run_id: str
    holders: tuple[Driver, ...]


@dataclass(frozen=True)
class Claimed:
    run_id: str
    is_new: bool


def claim_run(wanted: str, find_open: Callable[[], str | None]) -> Claimed:
    """The run of the request with the hash `wanted`: what `find_open` finds, what another process has claimed, or a new one."""
    with _locked(wanted):
        open_run = find_open()
        if open_run is not None:
            return Claimed(open_run, is_new=False)
        claim = _read(wanted)
        now = utc_now()
        living = tuple(holder for holder in claim.holders if is_alive(holder, now)) if claim else ()
        # With a record, `find_open` has judged the run: it is over, or its dataset is another by now.
        if claim is not None and living and not has_record(claim.run_id):
            write_json(_path(wanted), Claim(run_id=claim.run_id, holders=(*living, _myself())))
            return Claimed(claim.run_id, is_new=False)
        run_id = new_run_id()
        write_json(_path(wanted), Claim(run_id=run_id, holders=(_myself(),)))
        return Claimed(run_id, is_new=True)


def release(wanted: str) -> None:
    """This process no longer begins a run for the request. The claim of others stands."""
    with _locked(wanted):
        claim = _read(wanted)
        if claim is None:
            return
        others = tuple(holder for holder in claim.holders if (holder.host, holder.pid) != (socket.gethostname(), os.getpid()))
        if others:
            write_json(_path(wanted), Claim(run_id=claim.run_id, holders=others))
        else:
            _path(wanted).unlink(missing_ok=True)


def new_run_id() -> str:
    return short_hash(secrets.token_hex(16))


def has_record(run_id: str) -> bool:
    """Also in the record's bucket: that of an output which does not answer counts as none, and the claim goes on."""
    return any(look_everywhere(lambda output: [output.record(run_id).exists()]))


def _path(wanted: str) -> Path:
    return home() / "claims" / f"{wanted}.json"


def _read(wanted: str) -> Claim | None:
    try:
        return Claim.model_validate_json(_path(wanted).read_bytes())
    except (FileNotFoundError, ValidationError):  # damage: nobody can say what was claimed
        return None


def _myself() -> Driver:
    process = psutil.Process()
    return Driver(flow_run_id="", host=socket.gethostname(), pid=process.pid, pid_created_at=process.create_time())


@contextmanager
def _locked(wanted: str) -> Generator[None]:
    path = _path(wanted).with_suffix(".lock")
    descriptor = wait_for_lock(path, LOCK_SECONDS)
    if descriptor is None:
        message = f"another command has been comparing the same request for {LOCK_SECONDS:.0f} s"
        raise ServiceUnavailable(message, hint="try again, or --new")
    try:
        yield
    finally:
        os.close(descriptor)
