"""Records are kept in a bucket by the calls that keep them in a folder."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import obstore
import pytest
from obstore.exceptions import AlreadyExistsError, GenericError

from blocks.errors import PlanChanged, RunNotFound
from blocks.job import JobRef, JobSpec, JobState, Plan, TrainRequest
from blocks.outputs import all_runs, find_run, remember_output
from blocks.record import CancelRequest, Outcome, RunFile, RunRecord, request_hash
from trainer.contract import DatasetRef, ExitCode, TrainConfig, TrainerError
from trainer.storage import ObjectFolder


def run_file(run_id: str, epochs: int = 3) -> RunFile:
    request = TrainRequest(dataset="/data/bccd", config=TrainConfig(epochs=epochs))
    return RunFile(
        run_id=run_id,
        name="bccd-yolo11n",
        request=request.model_dump(mode="json"),
        request_hash=request_hash(request),
        provider="local",
        settings={},
        owner="tester",
    )


def make_plan(record: RunRecord, attempt: int = 1, fingerprint: str = "f") -> Plan:
    spec = JobSpec(
        run_id=record.run_id,
        attempt=attempt,
        name="n",
        config=TrainConfig(),
        dataset=DatasetRef(root="/d", index_uri="file:///d", version="v", name="d", image_count=1),
        output_uri=record.output_uri,
        max_runtime_seconds=60,
    )
    return Plan(provider="local", spec=spec, instance_type="x", region="x", request={}, fingerprint=fingerprint)


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    results: list[Any] = []
    barrier = threading.Barrier(count)

    def begin(number: int) -> None:
        barrier.wait()
        results.append(work(number))

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_objects_are_written_read_named_and_removed(store_uri: str) -> None:
    folder = ObjectFolder(store_uri)
    assert folder.get("a.json") is None
    assert folder.sha256("a.json") is None
    assert folder.names() == []
    folder.put("a.json", b"old")
    folder.put("a.json", b"new")
    folder.put("deep/er/b c ü.json", b"")
    folder.put("deep/d.json", b"x" * 6_000_000)
    assert folder.get("a.json") == b"new"
    assert folder.sha256("a.json") == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"
    assert folder.names() == ["a.json", "deep"]
    assert folder.names("deep") == ["d.json", "er"]
    assert folder.child("deep").child("er").names() == ["b c ü.json"]
    assert folder.child("deep").get("er/b c ü.json") == b""
    assert folder.names("none") == []
    assert folder.names("dee") == [], "a folder is not the beginning of a name"
    folder.delete("a.json")
    folder.delete("a.json")
    assert folder.get("a.json") is None


def test_only_the_first_creates(store_uri: str) -> None:
    folder = ObjectFolder(store_uri)
    assert folder.create("plan.json", b"first")
    assert not folder.create("plan.json", b"second")
    assert folder.get("plan.json") == b"first"


def test_of_many_creators_one_wins(store_uri: str) -> None:
    folder = ObjectFolder(store_uri)
    won = in_threads(8, lambda number: number if folder.create("plan.json", f"{number}".encode()) else None)
    [winner] = [number for number in won if number is not None]
    assert folder.get("plan.json") == f"{winner}".encode()


def test_a_run_is_recorded_and_found_again(store_uri: str) -> None:
    record = RunRecord(store_uri, "abcd1234")
    assert not record.exists()
    with pytest.raises(RunNotFound):
        record.run()
    first = record.open(run_file("abcd1234"))
    assert record.open(run_file("abcd1234")) == first
    with pytest.raises(PlanChanged, match=r"config\.epochs: 3 -> 4"):
        record.open(run_file("abcd1234", epochs=4))
    remember_output(record.output_uri)
    assert [found.uri for found in all_runs()] == [record.uri]
    assert find_run("abcd").uri == record.uri
    with pytest.raises(RunNotFound, match="no run begins"):
        find_run("zzz")


def test_an_attempt_is_recorded_from_plan_to_outcome(store_uri: str) -> None:
    record = RunRecord(store_uri, "abcd1234")
    assert record.attempts() == []
    plans = [record.write_plan(make_plan(record, attempt)) for attempt in (1, 2)]
    assert record.attempts() == [1, 2]
    assert [record.plan(number) for number in (1, 2, 3)] == [*plans, None]
    ref = JobRef(provider="local", native_id="x", run_id="abcd1234", attempt=1, output_uri=record.attempt_uri(1), fingerprint="f")
    record.write_ref(ref)
    assert record.ref(1) == ref
    assert record.write_outcome(1, Outcome(state=JobState.SUCCEEDED)).state is JobState.SUCCEEDED
    assert record.write_outcome(1, Outcome(state=JobState.FAILED)).state is JobState.SUCCEEDED
    record.request_cancel(CancelRequest(attempt=2, asked_by="me"))
    assert record.cancel_request(1) is None
    assert record.cancel_request(2) is not None
    for number in range(3):
        record.add_event("note", f"{number}", number=number)
    assert [event.message for event in record.events()] == ["0", "1", "2"]


def test_two_who_plan_at_once_go_on_with_one_plan(store_uri: str) -> None:
    def plan(number: int) -> str:
        record = RunRecord(store_uri, "race1234")
        return record.write_plan(make_plan(record, fingerprint=f"{number}")).fingerprint

    chosen = set(in_threads(4, plan))
    stored = RunRecord(store_uri, "race1234").plan(1)
    assert stored is not None
    assert chosen == {stored.fingerprint}


# --- Answers that are not what they seem ---------------------------------------------------------------


in_buckets = pytest.mark.parametrize("store_uri", ["s3", "az"], indirect=True)  # a folder's answers are never lost


@pytest.fixture
def bucket(store_uri: str) -> ObjectFolder:
    return ObjectFolder(store_uri)


def answer(monkeypatch: pytest.MonkeyPatch, *answers: tuple[bool, Exception | None]) -> list[str]:
    """What the next puts do: whether the object lands, and what is raised. Returns the names put."""
    put, left, names = obstore.put, list(answers), list[str]()

    def answering(store: Any, name: str, data: Any, **options: Any) -> Any:
        names.append(name)
        lands, error = left.pop(0) if left else (True, None)
        done = put(store, name, data, **options) if lands else None
        if error:
            raise error
        return done

    monkeypatch.setattr(obstore, "put", answering)
    monkeypatch.setattr("trainer.storage.CREATE_PAUSE_SECONDS", 0.0)
    return names


@in_buckets
@pytest.mark.parametrize("error", [AlreadyExistsError("exists"), GenericError("connection reset")])
def test_an_answer_that_was_lost_after_ours_landed_counts_as_ours(
    bucket: ObjectFolder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    answer(monkeypatch, (True, error))
    assert bucket.create("plan.json", b"ours")
    assert bucket.get("plan.json") == b"ours"


@in_buckets
def test_exists_of_a_name_where_nothing_landed_is_tried_again(bucket: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    puts = answer(monkeypatch, (False, AlreadyExistsError("409")), (False, AlreadyExistsError("409")))
    assert bucket.create("plan.json", b"ours")
    assert len(puts) == 3
    assert bucket.get("plan.json") == b"ours"


@in_buckets
def test_a_lost_answer_after_another_wrote_is_a_loss(bucket: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.put("plan.json", b"theirs")
    answer(monkeypatch, (False, GenericError("connection reset")))
    assert not bucket.create("plan.json", b"ours")


@in_buckets
def test_an_answer_that_stays_unclear_is_one_error(bucket: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, (False, GenericError("connection reset")))
    with pytest.raises(TrainerError) as refused:
        bucket.create("plan.json", b"ours")
    assert refused.value.code is ExitCode.UNAVAILABLE
    assert refused.value.hint


@in_buckets
def test_a_bucket_that_is_not_there_is_one_error(bucket: ObjectFolder) -> None:
    scheme, _, rest = bucket.uri.partition("://")
    nowhere = ObjectFolder(f"{scheme}://none-{rest}")
    for write in (nowhere.put, nowhere.create):
        with pytest.raises(TrainerError) as refused:
            write("a.json", b"a")
        assert refused.value.code is ExitCode.NOT_FOUND
    with pytest.raises(TrainerError):
        nowhere.names()
