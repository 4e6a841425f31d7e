"""A run's result is brought to a folder, held to its manifest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from blocks import attempts
from blocks.attempts import provider_of
from blocks.errors import ConfigError, ResultMissing
from blocks.job import JobRef, JobState
from blocks.record import Outcome, RunRecord
from flows.cli import app
from tests.unit.test_blocks_attempts import make_plan
from tests.unit.test_blocks_record import run_file
from trainer.contract import AttemptLayout, Framework, ManifestFile, ResultManifest, Task

MODEL = b"weights"


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    made = RunRecord(str(tmp_path / "runs"), "done1234")
    made.open(run_file("done1234"))
    return made


def end(record: RunRecord, content: bytes = MODEL) -> None:
    """As a job that is over leaves its attempt."""
    record.write_plan(make_plan(record))
    ref = JobRef(provider="local", native_id="x", run_id="done1234", attempt=1, output_uri=record.attempt_uri(1), fingerprint="f")
    record.write_ref(ref)
    file = ManifestFile(sha256=hashlib.sha256(MODEL).hexdigest(), bytes=len(MODEL))
    manifest = ResultManifest(
        run_id="done1234",
        attempt=1,
        framework=Framework.YOLO,
        task=Task.OBJECT_DETECTION,
        model="yolo11n",
        dataset_version="v",
        best_epoch=2,
        epochs=3,
        metrics={"map50": 0.5},
        metrics_split="test",
        files={AttemptLayout.MODEL: file},
    )
    record.folder.put(f"attempts/1/{AttemptLayout.MODEL}", content)
    record.folder.put(f"attempts/1/{AttemptLayout.MANIFEST}", manifest.model_dump_json().encode())


def collect(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["collect", *arguments])


def test_the_model_comes_to_a_folder_named_as_the_run(record: RunRecord, tmp_path: Path) -> None:
    end(record)
    done = collect("done", "--json")
    assert done.exit_code == 0, done.output
    model = tmp_path / record.run().name / AttemptLayout.MODEL
    assert json.loads(done.stdout)["model"] == str(model)
    assert model.read_bytes() == MODEL
    shown = collect("done", "--to", str(tmp_path / "else where"))
    assert f"model    {tmp_path / 'else where' / AttemptLayout.MODEL}" in shown.output


def test_what_is_not_as_the_manifest_says_is_refused(record: RunRecord, tmp_path: Path) -> None:
    end(record, b"another")
    refused = collect("done", "--to", str(tmp_path / "place"))
    assert isinstance(refused.exception, ResultMissing)
    assert not (tmp_path / "place").exists()


def test_of_a_run_that_is_over_nobody_asks_the_provider(record: RunRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end(record)
    ref = record.ref(1)
    assert ref is not None
    result = provider_of(record).collect(ref)
    record.write_outcome(1, Outcome(state=JobState.SUCCEEDED, result=result))
    monkeypatch.setattr(attempts, "provider_of", lambda _: pytest.fail("asked"))
    assert collect("done", "--to", str(tmp_path / "place")).exit_code == 0
    assert (tmp_path / "place" / AttemptLayout.MODEL).read_bytes() == MODEL


def test_a_run_without_a_job_has_nothing_to_bring(record: RunRecord) -> None:
    refused = collect(record.run_id)
    assert isinstance(refused.exception, ConfigError)
    assert "no job yet" in str(refused.exception)
