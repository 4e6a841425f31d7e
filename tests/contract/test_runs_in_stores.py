"""What is done with runs as a whole goes on a folder as in a bucket: who works on them, their logs, their leftovers."""

from __future__ import annotations

import json

import click
import pytest

from blocks.attempt_objects import LOG_BATCH_BYTES, read_exit, read_log, read_progress
from blocks.driving import announce, driven_runs, drivers, driving, forget
from blocks.job import JobState
from blocks.outputs import list_runs, remember_output
from blocks.pruning import delete, find_leftovers, whole_run
from blocks.record import Outcome, RunRecord
from blocks.store_check import check_store
from flows.cli_completion import complete_runs
from tests.contract.test_object_folder import make_plan, run_file
from trainer.contract import AttemptLayout, ExitRecord, utc_now
from trainer.storage import ObjectFolder, is_bucket


def make_run(store_uri: str, run_id: str = "good1234") -> RunRecord:
    """One that succeeded; its best epoch is the second of three."""
    record = RunRecord(store_uri, run_id)
    record.open(run_file(run_id))
    record.write_plan(make_plan(record))
    record.folder.put("attempts/1/model/model.pt", b"m" * 10)
    for epoch in (1, 2, 3):
        record.folder.put(f"attempts/1/checkpoints/epoch-000{epoch}.pt", b"x" * 100)
        record.folder.put(f"attempts/1/checkpoints/epoch-000{epoch}.json", json.dumps({"best_epoch": min(2, epoch)}).encode())
    record.write_outcome(1, Outcome(state=JobState.SUCCEEDED, epoch=3))
    remember_output(store_uri)
    return record


def test_the_shell_completes_the_runs_that_were_listed_last(store_uri: str) -> None:
    context, parameter = click.Context(click.Command("status")), click.Argument(["run"])
    record = make_run(store_uri)
    list_runs()
    assert [item.value for item in complete_runs(context, parameter, "go")] == [record.run_id]
    record.folder.delete_all(list(record.folder.sizes()))
    list_runs()
    assert complete_runs(context, parameter, "go") == []


def test_a_log_is_read_on_from_where_it_was(store_uri: str) -> None:
    objects = ObjectFolder(store_uri)
    assert (read_progress(objects), read_exit(objects)) == (None, None)
    assert read_log(objects, "", ended=False).lines == ()
    objects.put(AttemptLayout.LOG, b"one\ntwo\nthr")
    first = read_log(objects, "", ended=False)
    assert (first.lines, first.ended) == (("one", "two"), False)
    assert read_log(objects, first.cursor, ended=False).lines == ()
    objects.put(AttemptLayout.LOG, b"one\ntwo\nthree\n" + b"x" * LOG_BATCH_BYTES + b"\nlast")
    lines, cursor, ended = [], first.cursor, False
    while not ended:
        batch = read_log(objects, cursor, ended=True)
        lines += batch.lines
        cursor, ended = batch.cursor, batch.ended
    assert (lines[0], lines[-1], "".join(lines[1:-1])) == ("three", "last", "x" * LOG_BATCH_BYTES)
    assert read_log(objects, cursor, ended=True).lines == ()
    objects.put(AttemptLayout.EXIT, ExitRecord(exit_code=0, started_at=utc_now()).model_dump_json().encode())
    assert (found := read_exit(objects)) is not None
    assert found.exit_code == 0


def test_who_works_on_a_run_is_found(store_uri: str) -> None:
    idle, record = make_run(store_uri), make_run(store_uri, "busy1234")
    assert driven_runs() == []
    with driving(record, "flow-1", deployed=True, max_attempts=3):
        announce(record, "flow-2")
        assert [found.uri for found in driven_runs()] == [record.uri]
        assert {driver.flow_run_id for driver in drivers(record)} == {"flow-1", "flow-2"}
    assert [found.uri for found in driven_runs()] == [record.uri], "somebody else is still to come"
    forget(record, "flow-2")
    assert driven_runs() == []
    assert not drivers(idle)
    if is_bucket(store_uri):
        assert not [name for name in ObjectFolder(store_uri).sizes() if name.startswith(".driven/")]


def test_leftovers_go_and_the_rest_stays(store_uri: str) -> None:
    record = make_run(store_uri)
    [kept] = find_leftovers([record], keep_best=True, now=utc_now())
    assert (kept.files, kept.bytes > 200) == (4, True)
    [removal] = find_leftovers([record], now=utc_now())
    assert removal.files == 6
    assert delete(kept)
    assert record.folder.names("attempts/1/checkpoints") == ["epoch-0002.json", "epoch-0002.pt"]
    [removal] = find_leftovers([record], now=utc_now())
    assert delete(removal)
    assert record.folder.names("attempts/1/checkpoints") == []
    assert record.folder.get("attempts/1/model/model.pt") is not None
    assert find_leftovers([record], now=utc_now()) == []


def test_a_whole_run_goes_and_its_neighbour_stays(store_uri: str) -> None:
    record, neighbour = make_run(store_uri), make_run(store_uri, "good12345")
    removal = whole_run(record)
    assert removal.files == len(record.folder.sizes()) == 10
    assert delete(removal)
    assert record.folder.sizes() == {}
    assert neighbour.exists()


def test_the_place_of_the_runs_is_checked(store_uri: str) -> None:
    objects = ObjectFolder(f"{store_uri}/runs")
    line = check_store(objects)
    assert line.ok, line
    assert objects.sizes() == {}


@pytest.mark.parametrize("store_uri", ["s3", "az"], indirect=True)
def test_a_bucket_that_is_not_there_is_told(store_uri: str) -> None:
    scheme, _, rest = store_uri.partition("://")
    line = check_store(ObjectFolder(f"{scheme}://none-{rest}"))
    assert not line.ok
    assert line.fix
