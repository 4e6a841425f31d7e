"""Which runs there are: those in the output folders and buckets that this machine knows. One that does not answer hides no others.

An output is noted in ``<home>/outputs/`` by whoever runs, checks or asks for something there: its URI and, for a bucket, how
it is reached, by reference.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ValidationError

from blocks.credentials import AccessRef
from blocks.errors import RunNotFound, ServiceUnavailable
from blocks.job import fingerprint
from blocks.places import home
from blocks.record import RunFile, RunRecord
from trainer.contract import TrainyardError
from trainer.storage import ObjectFolder, is_bucket, to_uri

SEEN = "seen"  # <SEEN>/<output>/<run id> holds a run's name: for the shell's completion, which asks no bucket
READERS = 16  # of one bucket's runs at a time

T = TypeVar("T")
log = logging.getLogger("trainyard.outputs")


@dataclass(frozen=True)
class Output:
    """Where the records of runs lie, and how that is reached."""

    uri: str
    access: AccessRef = field(default_factory=AccessRef)

    @property
    def folder(self) -> ObjectFolder:
        return ObjectFolder(self.uri, self.access.resolve(self.uri))

    @property
    def is_bucket(self) -> bool:
        return is_bucket(self.uri)

    def record(self, run_id: str) -> RunRecord:
        return RunRecord(self.uri, run_id, self.access)

    def records(self, prefix: str = "") -> list[RunRecord]:
        """A record for each name that may be a run's."""
        return [self.record(name) for name in self.folder.names() if name.startswith(prefix) and not name.startswith(".")]


def default_output_uri() -> str:
    return (home() / "runs").as_uri()


def remember_output(output_uri: str, access: AccessRef = AccessRef()) -> None:  # noqa: B008 - frozen
    """Notes an output, so that `trainyard runs` looks there too. Of one that is known, how it is reached now."""
    uri = to_uri(output_uri)
    name, folder = f"outputs/{fingerprint(uri)[:16]}", ObjectFolder(str(home()))
    if not is_bucket(uri) or access == AccessRef():
        folder.create(name, uri.encode())
        return
    note = json.dumps({"uri": uri, "endpoint": access.endpoint, "credentials": access.credentials}).encode()
    if folder.get(name) != note:
        folder.put(name, note)


def known_outputs() -> list[Output]:
    folder = ObjectFolder(str(home()))
    noted = (folder.get(f"outputs/{name}") for name in folder.names("outputs"))
    found = {Output(default_output_uri()), *(_parse_note(data.decode()) for data in noted if data)}
    return sorted(found, key=lambda output: (output.is_bucket, output.uri))  # what answers at once comes first


def _parse_note(text: str) -> Output:
    if not text.startswith("{"):
        return Output(to_uri(text))
    note = json.loads(text)
    return Output(note["uri"], AccessRef(note.get("endpoint"), note.get("credentials")))


def tell_silent(output: Output, exc: Exception) -> None:
    log.warning("not looked at: %s: %s", output.uri, exc)


def look_everywhere(read: Callable[[Output], Iterable[T]], on_silent: Callable[[Output, Exception], None] = tell_silent) -> list[T]:
    """What `read` finds in each known output. One that does not answer is told of, and the others count."""
    found: list[T] = []
    for output in known_outputs():
        try:
            found += read(output)
        except (TrainyardError, OSError) as exc:
            on_silent(output, exc)
    return found


@dataclass
class Listing:
    """The readable runs, oldest first; the places of those whose `run.json` is damaged; the outputs that did not answer."""

    runs: list[tuple[RunRecord, RunFile]] = field(default_factory=list[tuple[RunRecord, RunFile]])
    damaged: dict[str, ValidationError] = field(default_factory=dict[str, ValidationError])
    silent: dict[str, Exception] = field(default_factory=dict[str, Exception])


def note_seen(output_uri: str, names: dict[str, str], *, all_there: bool = False) -> None:
    """Notes the names of a bucket's runs by their ids; with `all_there`, others are forgotten."""
    if not is_bucket(output_uri):
        return  # there the shell's completion sees them itself
    folder = home() / SEEN / fingerprint(output_uri)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for run_id, name in names.items():
            (folder / run_id).write_text(name)
        for path in [path for path in folder.iterdir() if all_there and path.name not in names]:
            path.unlink(missing_ok=True)
    except OSError as exc:
        log.debug("%s is not known to the shell's completion: %s", output_uri, exc)


def list_runs() -> Listing:
    listing = Listing()

    def read(record: RunRecord) -> tuple[RunRecord, RunFile] | None:
        try:
            return record, record.run()
        except RunNotFound:  # somebody else's folder
            return None
        except ValidationError as exc:
            listing.damaged[record.uri] = exc
            return None

    def read_output(output: Output) -> list[tuple[RunRecord, RunFile]]:
        pairs = [pair for pair in in_parallel(read, output.records()) if pair is not None]
        note_seen(output.uri, {record.run_id: run.name for record, run in pairs}, all_there=True)
        return pairs

    found = look_everywhere(read_output, lambda output, exc: listing.silent.update({output.uri: exc}))
    listing.runs = sorted(found, key=lambda pair: pair[1].created_at)
    return listing


def in_parallel(read: Callable[[RunRecord], T], records: list[RunRecord]) -> list[T]:
    """In their order. A bucket takes its time for each answer, and gives many at once."""
    if len(records) < 2 or not any(is_bucket(record.uri) for record in records):
        return [read(record) for record in records]
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(read, records))


def all_runs() -> list[RunRecord]:
    """Every run of the known outputs, oldest first."""
    listing = list_runs()
    for uri, exc in listing.silent.items():
        tell_silent(Output(uri), exc)
    return [record for record, _ in listing.runs]


def find_run(name: str) -> RunRecord:
    """The run whose id begins with `name`, or whose record is at the URI `name`. Raises RunNotFound for none or several.

    Raises ServiceUnavailable where it may be in an output that does not answer.
    """
    if "://" in name:
        return _find_by_uri(name)
    if not name.isalnum():
        raise RunNotFound(f"{name!r} is not a run id: letters and digits only")
    silent: dict[str, Exception] = {}
    # A whole id needs one small request of each output, and none of those behind the one that has it.
    for records in (_exact, _beginning):
        found: list[RunRecord] = []
        for output in known_outputs():
            if output.uri in silent:
                continue
            try:
                found += records(output, name)
            except (TrainyardError, OSError) as exc:
                silent[output.uri] = exc
            if found and records is _exact:
                break
        if len(found) == 1:
            for uri, exc in silent.items():
                tell_silent(Output(uri), exc)
            return found[0]
        if found:
            ids = ", ".join(record.run_id for record in found[:5])
            raise RunNotFound(f"{len(found)} runs begin with {name!r}: {ids}", hint="give more characters")
    if silent:
        told = "; ".join(
            f"{uri} was not looked at: {exc.message if isinstance(exc, TrainyardError) else exc}" for uri, exc in silent.items()
        )
        hints = dict.fromkeys(exc.hint for exc in silent.values() if isinstance(exc, TrainyardError) and exc.hint)
        hint = "; ".join(hints) or "the same again when that answers"
        raise ServiceUnavailable(f"{told}; elsewhere no run begins with {name!r}", hint=hint)
    hint = "`trainyard runs` lists what there is; `trainyard runs --profile NAME` looks where a profile keeps its runs"
    raise RunNotFound(f"no run begins with {name!r}", hint=hint)


def _exact(output: Output, run_id: str) -> list[RunRecord]:
    record = output.record(run_id)
    return [record] if record.exists() else []


def _beginning(output: Output, prefix: str) -> list[RunRecord]:
    return [record for record in output.records(prefix) if record.exists()]


def _find_by_uri(uri: str) -> RunRecord:
    output_uri, _, run_id = to_uri(uri).rpartition("/")
    known = [output for output in known_outputs() if output.uri == output_uri] or [Output(output_uri)]
    for output in known:
        record = output.record(run_id)
        if record.exists():
            remember_output(output.uri, output.access)
            return record
    raise RunNotFound(f"there is no run at {uri}", hint="give <output>/<run id>, as `trainyard status` shows it")
