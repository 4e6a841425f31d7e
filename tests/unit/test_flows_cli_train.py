"""Requests from options, which run they attach to, the plan they show, and the log that is followed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from pydantic import Field

from blocks.attempts import Action, Step, may_resume
from blocks.errors import ConfigError, PlanChanged, ServiceUnavailable
from blocks.job import JobRef, JobState, JobStatus, LogBatch, TrainRequest, canonical_json
from blocks.naming import run_id_of_key
from blocks.outputs import remember_output
from blocks.profiles import load_profile
from blocks.record import Outcome, RunRecord, describe_dataset_change, request_hash
from blocks.staging import stage_folder
from flows import cli_runs, drafting, running
from flows.cli import app
from flows.requesting import add_options, build_request, request_options
from tests.unit.test_blocks_attempts import make_plan
from tests.unit.test_blocks_record import run_file
from trainer.contract import ExitCode, FailureReason, TrainerError, UserInput
from trainer.dataset import check_dataset
from trainer.shapes import write_shapes


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def request_for_shapes(tmp_path: Path) -> TrainRequest:
    return TrainRequest(dataset=str(write_shapes(tmp_path / "shapes", train=4, val=2, test=2, size=64)))


def open_run(tmp_path: Path, request: TrainRequest, run_id: str) -> RunRecord:
    record = RunRecord(str(tmp_path / "runs"), run_id)
    record.write_dataset(check_dataset(Path(request.dataset)))
    changes = {"request": request.model_dump(mode="json"), "request_hash": request_hash(request)}
    record.open(run_file(run_id).model_copy(update=changes))
    return record


# --- Options ----------------------------------------------------------------------------------------------


class Config(UserInput):
    trust: bool = Field(default=False, description="Trust it.")
    epochs: int = Field(default=3, description="Passes.")


@pytest.mark.parametrize(("given", "expected"), [([], None), (["--trust"], True), (["--no-trust"], False)])
def test_a_yes_or_no_is_a_flag_that_may_be_left_to_the_file(given: list[str], expected: bool | None) -> None:
    seen: dict[str, Any] = {}

    @click.command()
    @add_options(Config, ["trust", "epochs"])
    def command(**options: Any) -> None:
        seen.update(options)

    assert CliRunner().invoke(command, given).exit_code == 0
    assert seen == {"trust": expected, "epochs": None}
    text = CliRunner().invoke(command, ["--help"]).output
    assert "--trust / --no-trust" in text
    assert "[default: off]" in text


def test_the_machine_is_chosen_by_options_which_win_over_the_file(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    @click.command()
    @request_options
    def command(**options: Any) -> None:
        seen.update(options)

    file = tmp_path / "request.yaml"
    file.write_text("resources:\n  instance_type: small\n  cpus: 4\n")
    given = ["--file", str(file), "--instance-type", "t4", "--accelerator-count", "1", "--spot"]
    assert CliRunner().invoke(command, given, catch_exceptions=False).exit_code == 0
    asked = build_request("/data/cells", seen).resources
    assert asked.model_dump(exclude_defaults=True) == {"instance_type": "t4", "cpus": 4, "accelerator_count": 1, "spot": True}


# --- Attaching --------------------------------------------------------------------------------------------


def test_the_newest_open_run_of_the_request_is_found(tmp_path: Path, request_for_shapes: TrainRequest) -> None:
    assert running.find_open_run(request_for_shapes) is None
    first = open_run(tmp_path, request_for_shapes, "first123")
    second = open_run(tmp_path, request_for_shapes, "second12")
    other = request_for_shapes.model_copy(update={"max_attempts": 5})
    open_run(tmp_path, other, "other123")
    assert running.find_open_run(request_for_shapes) == "second12"
    second.folder.put("attempts/1/plan.json", b"{")  # damage is no reason to refuse a training
    assert running.find_open_run(request_for_shapes) == "first123"
    first.write_plan(make_plan(first))
    first.write_outcome(1, Outcome(state=JobState.SUCCEEDED))
    assert running.find_open_run(request_for_shapes) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("added image", "images/train/new.jpg came to the dataset"),
        ("added label", "came to the dataset"),
        ("changed", "changed"),
        ("gone", "changed"),
        ("no dataset any more", "changed"),
    ],
)
def test_a_run_whose_dataset_changed_is_not_attached_to(
    tmp_path: Path, request_for_shapes: TrainRequest, change: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = Path(request_for_shapes.dataset)
    image, label = dataset / "images/train/shapes_00000.jpg", dataset / "labels/train/shapes_00000.txt"
    if change == "added label":
        label.rename(tmp_path / "label")
        request_for_shapes = request_for_shapes.model_copy(update={"max_problem_share": 0.5})
        index = check_dataset(dataset, max_problem_share=0.5)
        RunRecord(str(tmp_path / "runs"), "open1234").write_dataset(index)
        (tmp_path / "label").rename(label)
    record = open_run(tmp_path, request_for_shapes, "open1234")
    match change:
        case "added image":
            shutil.copy(image, image.with_name("new.jpg"))
        case "changed":
            image.write_bytes(image.read_bytes() + b" ")
        case "gone":
            label.unlink()
        case "no dataset any more":
            (dataset / "data.yaml").unlink()
            shutil.rmtree(dataset / "labels")
    assert told in describe_dataset_change(record, Path(request_for_shapes.dataset))
    assert running.find_open_run(request_for_shapes) is None
    assert "does not attach to run open1234" in capsys.readouterr().err


def test_files_that_are_only_newer_are_no_change(tmp_path: Path, request_for_shapes: TrainRequest) -> None:
    """As after a fresh clone in CI."""
    open_run(tmp_path, request_for_shapes, "open1234")
    for file in Path(request_for_shapes.dataset).rglob("*.*"):
        file.touch()
    assert running.find_open_run(request_for_shapes) == "open1234"


def test_a_run_key_stands_for_one_request(tmp_path: Path, request_for_shapes: TrainRequest) -> None:
    """Also where the other request names another output folder, in which there is no such run."""
    open_run(tmp_path, request_for_shapes, run_id_of_key("commit-1"))
    elsewhere = request_for_shapes.model_copy(update={"output": str(tmp_path / "elsewhere")})
    with pytest.raises(PlanChanged, match="output: None -> "):
        running.run_keyed(elsewhere, "commit-1", False)
    shutil.copy(Path(request_for_shapes.dataset) / "images/val/shapes_00000.jpg", Path(request_for_shapes.dataset) / "images/val/new.jpg")
    with pytest.raises(PlanChanged, match=r"new\.jpg came to the dataset"):
        running.run_keyed(request_for_shapes, "commit-1", False)


# --- The plan ---------------------------------------------------------------------------------------------


def test_the_plan_shows_byte_for_byte_what_a_run_submits(
    tmp_path: Path, request_for_shapes: TrainRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows import job_tasks, train

    record = open_run(tmp_path, request_for_shapes, "same1234")
    name = request_for_shapes.name or drafting.display_name("shapes", request_for_shapes.config.model)
    run = record.run().model_copy(update={"name": name, "run_id": "same1234"})
    provider = load_profile("local").provider()
    planned: list[Any] = []

    def make_plan_only(chosen: Any, _record: RunRecord, spec: Any) -> None:
        planned.append(chosen.plan(spec))
        raise KeyboardInterrupt

    monkeypatch.setattr(job_tasks, "make_plan", make_plan_only)
    with pytest.raises(KeyboardInterrupt):
        train.run_attempt(provider, record, run, request_for_shapes, Step(Action.START, 1), lambda _status: None, lambda: None)
    monkeypatch.setattr(drafting, "DRAFT_RUN_ID", "same1234")
    drafted = drafting.draft_plan(request_for_shapes).plan
    assert canonical_json(drafted.request) == canonical_json(planned[0].request)
    assert drafted.fingerprint == planned[0].fingerprint


def test_where_no_server_looks_at_a_plan_that_is_told(request_for_shapes: TrainRequest) -> None:
    command = ["plan", request_for_shapes.dataset, "--server"]
    done = CliRunner().invoke(app, command)
    assert isinstance(done.exception, ConfigError)
    assert "local has no server that looks at a plan" in done.exception.message
    assert "provider  local" in done.stdout, "the plan is shown all the same"
    told = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert (told["provider"], told["server"]["valid"]) == ("local", False)
    assert told["server"]["details"] == {"server": done.exception.message}


def test_a_name_that_the_store_lacks_is_refused_at_once_with_those_that_it_has(tmp_path: Path, request_for_shapes: TrainRequest) -> None:
    store = (tmp_path / "store").as_uri()
    staged = stage_folder(Path(request_for_shapes.dataset), store, "cells")
    for command in (["plan"], ["train", "--json"]):
        done = CliRunner().invoke(app, [*command, f"{store}#nope"])
        assert isinstance(done.exception, TrainerError)
        assert done.exception.code is ExitCode.NOT_FOUND
        assert "it has 'cells'" in (done.exception.hint or "")
    assert json.loads(done.stdout) == {
        **{"run_id": None, "state": "failed", "error": f"{store} has no dataset or version 'nope'"},
        **{"hint": done.exception.hint, "exit_code": ExitCode.NOT_FOUND},
    }
    told = CliRunner().invoke(app, ["plan", f"{store}#cells"], catch_exceptions=False).stdout
    assert f"{store}#cells, 8 images, version {staged.version[:12]}" in told
    assert isinstance(CliRunner().invoke(app, ["plan", f"{store}2#cells"]).exception, TrainerError)
    assert not (tmp_path / "store2").exists()


def test_a_refusal_names_no_run_that_was_never_written_down(tmp_path: Path, request_for_shapes: TrainRequest) -> None:
    remember_output(str(tmp_path / "runs"))
    assert running.recorded("never123") is None
    open_run(tmp_path, request_for_shapes, "same1234")
    assert running.recorded("same1234") == "same1234"


# --- The log ----------------------------------------------------------------------------------------------


class LogsOnly:
    """A provider whose attempt `n` has logged one line and is over."""

    def logs(self, ref: JobRef, cursor: str = "") -> LogBatch:
        return LogBatch(lines=() if cursor else (f"line of attempt {ref.attempt}",), cursor="1", ended=bool(cursor))


def begin(record: RunRecord, attempt: int) -> None:
    plan = make_plan(record)
    record.write_plan(plan.model_copy(update={"spec": plan.spec.model_copy(update={"attempt": attempt})}))
    uri = record.attempt_uri(attempt)
    record.write_ref(JobRef(provider="local", native_id="n", run_id=record.run_id, attempt=attempt, output_uri=uri, fingerprint="f"))


def test_following_goes_from_attempt_to_attempt_and_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = RunRecord(str(tmp_path / "runs"), "logs1234")
    record.open(run_file("logs1234"))
    begin(record, 1)
    waits: list[float] = []

    def meanwhile(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            record.write_outcome(1, Outcome(state=JobState.FAILED, reason=FailureReason.PREEMPTED, epoch=1))
        if len(waits) == 3:
            begin(record, 2)
        if len(waits) == 5:
            record.write_outcome(2, Outcome(state=JobState.SUCCEEDED))

    monkeypatch.setattr(cli_runs, "provider_of", lambda _record: LogsOnly())
    monkeypatch.setattr(cli_runs.time, "sleep", meanwhile)
    cli_runs.follow_run(record)
    assert capsys.readouterr().out.splitlines() == ["line of attempt 1", "--- attempt 2 ---", "line of attempt 2"]
    assert len(waits) == 5


def test_following_a_run_that_nobody_closes_ends_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord(str(tmp_path / "runs"), "logs1234")
    record.open(run_file("logs1234"))
    begin(record, 1)
    monkeypatch.setattr(cli_runs, "provider_of", lambda _record: LogsOnly())
    monkeypatch.setattr(cli_runs, "CLOSE_PATIENCE_SECONDS", 0.1)
    monkeypatch.setattr(cli_runs, "FOLLOW_SECONDS", 0.02)
    with pytest.raises(ServiceUnavailable, match="nobody goes on"):
        cli_runs.follow_run(record)


def test_a_cancel_while_a_resume_starts_up_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_for_shapes: TrainRequest
) -> None:
    """From `resume` to its flow half a minute may pass, and the run is over all the while."""
    record = open_run(tmp_path, request_for_shapes, "over1234")
    record.write_plan(make_plan(record))
    record.write_outcome(1, Outcome.of(JobStatus(state=JobState.CANCELLED), None))
    heard: list[str] = []
    may: list[bool] = []

    def start_up(_request: TrainRequest, _as_json: bool, *, run_id: str, resume_wish: str) -> None:
        if heard:
            told = CliRunner().invoke(app, ["cancel", run_id], catch_exceptions=False)
            assert (told.exit_code, "does not begin" in told.stdout) == (0, True)
        heard.append(run_id)
        may.append(may_resume(record, resume_wish))

    monkeypatch.setattr(running, "run_and_print", start_up)
    for _ in range(2):
        assert CliRunner().invoke(app, ["resume", "over"], catch_exceptions=False).exit_code == 0
    assert may == [True, False]
    asked = record.cancel_request(1)
    assert asked is not None
    assert "is over: cancelled" in CliRunner().invoke(app, ["cancel", "over"], catch_exceptions=False).stdout
