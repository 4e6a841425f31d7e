from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from blocks.errors import ConfigError, PlanChanged, RunNotFound
from blocks.job import JobState, TrainRequest
from blocks.outputs import all_runs, find_run, remember_output
from blocks.record import Outcome, RunFile, RunRecord, check_run_id, describe_difference, request_hash
from trainer.contract import TrainConfig


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "a home with spaces ü"))
    return tmp_path / "a home with spaces ü"


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


def test_a_run_is_opened_once_and_found_again(home: Path) -> None:
    record = RunRecord(str(home / "runs"), "abcd1234")
    first = record.open(run_file("abcd1234"))
    assert record.open(run_file("abcd1234")) == first


def test_another_request_under_one_id_is_refused_with_the_difference(home: Path) -> None:
    record = RunRecord(str(home / "runs"), "abcd1234")
    record.open(run_file("abcd1234"))
    with pytest.raises(PlanChanged, match=r"config\.epochs: 3 -> 4"):
        record.open(run_file("abcd1234", epochs=4))


def test_unknown_fields_of_a_newer_version_are_kept(home: Path) -> None:
    record = RunRecord(str(home / "runs"), "abcd1234")
    stored = run_file("abcd1234").model_dump(mode="json") | {"from_the_future": [1, 2]}
    record.folder.put("run.json", RunFile.model_validate(stored).model_dump_json().encode())
    assert record.run().model_dump()["from_the_future"] == [1, 2]


def test_the_first_outcome_stands(home: Path) -> None:
    record = RunRecord(str(home / "runs"), "abcd1234")
    assert record.write_outcome(1, Outcome(state=JobState.SUCCEEDED)).state is JobState.SUCCEEDED
    assert record.write_outcome(1, Outcome(state=JobState.FAILED)).state is JobState.SUCCEEDED


def test_runs_are_found_by_unique_prefix_in_every_known_folder(home: Path, tmp_path: Path) -> None:
    elsewhere = (tmp_path / "elsewhere").as_uri()
    remember_output(elsewhere)
    RunRecord(str(home / "runs"), "abcd1234").open(run_file("abcd1234"))
    RunRecord(elsewhere, "abce5678").open(run_file("abce5678"))
    assert {record.run_id for record in all_runs()} == {"abcd1234", "abce5678"}
    assert find_run("abce").output_uri == elsewhere
    with pytest.raises(RunNotFound, match="2 runs begin"):
        find_run("abc")
    with pytest.raises(RunNotFound, match="no run begins"):
        find_run("zzz")


@pytest.mark.parametrize("bad", ["../etc", "a/b", "A1234", "ab", "", "x" * 41, "run id"])
def test_a_run_id_that_could_be_a_path_is_refused(bad: str, home: Path) -> None:
    with pytest.raises(ConfigError):
        check_run_id(bad)
    with pytest.raises(RunNotFound):
        find_run(bad + "/x")


def test_difference_names_nested_fields() -> None:
    assert describe_difference({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 1, "c": 3}, "d": 1}) == "a.c: 2 -> 3"


def _write(folder: str, number: int, wins: multiprocessing.Queue[int]) -> None:
    if RunRecord(folder, "race1234").folder.create("attempts/1/plan.json", str(number).encode() * 10_000):
        wins.put(number)


def test_of_many_writers_one_wins_and_no_one_reads_half(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    wins: multiprocessing.Queue[int] = context.Queue()  # type: ignore[assignment]
    writers = [context.Process(target=_write, args=(str(tmp_path), number, wins)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    winner = wins.get(timeout=10)
    assert wins.empty()
    assert (tmp_path / "race1234/attempts/1/plan.json").read_bytes() == str(winner).encode() * 10_000
