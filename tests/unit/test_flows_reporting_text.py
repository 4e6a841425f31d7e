from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from blocks.job import JobState, JobStatus, Plan, Result
from blocks.record import CancelRequest, RunFile, RunRecord
from blocks.spending import Cost
from flows.reporting import StagingReporter, publish_report
from flows.reporting_text import (
    build_ending,
    build_report,
    describe_status,
    describe_worst_case,
    ending_of,
    epoch_table,
    format_seconds,
    replace_tags,
    running_tags,
)
from tests.unit.test_blocks_local_process import make_spec
from trainer.contract import DatasetRef, Phase, Progress, RunLayout


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (75, "1m15s"), (3600, "1h00m"), (90_061, "25h01m")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_status_in_one_line() -> None:
    progress = Progress(
        attempt=1, phase=Phase.TRAINING, epoch=3, epochs=20, metrics={"map50": 0.4321}, images_per_second=14.2, eta_seconds=75
    )
    line = describe_status(JobStatus(state=JobState.RUNNING, progress=progress, message="all is well"))
    assert line == "running, epoch 3/20, val mAP50 0.432, 14 images/s, ETA 1m15s, all is well"


def test_a_plan_tells_what_its_cost_at_worst_covers() -> None:
    spec = make_spec({}).model_copy(update={"max_attempts": 3})
    plan = Plan(provider="x", spec=spec, instance_type="t4", region="r", request={}, fingerprint="f", worst_case_usd=2.55)
    told = "at worst $2.55 for 3 attempts of 1h00m; a wait for machines, which costs nothing where they are paid for in use, is not in it"
    assert describe_worst_case(plan) == told
    once = plan.model_copy(update={"spec": make_spec({})})
    assert "for one attempt of 1h00m" in describe_worst_case(once)
    longer = describe_worst_case(once.model_copy(update={"attempt_seconds": 7200}))
    assert "for one attempt of 2h00m; that is 1h00m of run time each, and the longest wait" in longer
    assert describe_worst_case(once.model_copy(update={"worst_case_usd": None})) == "at worst unknown"
    assert describe_worst_case(once.model_copy(update={"worst_case_usd": 0.0})) == "at worst $0.00"


RUN = RunFile(run_id="abcd", name="bccd-yolo11n", request={}, request_hash="", provider="local", settings={}, owner="me")


def made_result(manifest_uri: str = "file:///x") -> Result:
    return Result(
        outcome="complete",
        model_uri="file:///m",
        manifest_uri=manifest_uri,
        metrics={"map50": 0.69, "map50_95": 0.4, "precision": 0.7, "recall": 0.6},
        metrics_split="test",
        files={},
        best_epoch=3,
        epochs=4,
        duration_seconds=60,
    )


def test_report_tells_the_verdict_first_and_knows_classes_without_figures() -> None:
    row: dict[str, Any] = {"name": "rare", "instances": 0, **dict.fromkeys(("precision", "recall", "map50", "map50_95"))}
    lines = build_report(RUN, made_result(), Cost(), None, None, {"classes": [row]}).splitlines()
    assert lines[2].startswith("**mAP50 0.690** on the test split")
    assert "| rare | 0 | - | - | - | - |" in lines
    assert "unknown" in "".join(lines), "no price, so no cost"


VERSION = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"root": "/data/my cells"}, [f"- version `{VERSION}`, read in place from `/data/my cells`"]),
        (
            {"root": "/data/cells", "store_uri": "file:///a%20store"},
            [
                f"- version `{VERSION}` in the store `/a store`, from `/data/cells`",
                "- fetch it: `uv run trainyard dataset fetch 0123456789ab --store '/a store' --to FOLDER`",
            ],
        ),
        (
            {"root": "s3://b/images", "store_uri": "s3://b/store", "store_endpoint": "https://minio.example"},
            [
                f"- version `{VERSION}` in the store `s3://b/store` at https://minio.example, from `s3://b/images`",
                "- fetch it: `uv run trainyard dataset fetch 0123456789ab --store s3://b/store --to FOLDER`",
            ],
        ),
        (
            {"root": "file:///store#cells", "store_uri": "file:///store"},
            [
                f"- version `{VERSION}` in the store `/store`",
                "- fetch it: `uv run trainyard dataset fetch 0123456789ab --store /store --to FOLDER`",
            ],
        ),
    ],
)
def test_report_names_store_and_version_of_the_dataset(values: dict[str, Any], told: list[str]) -> None:
    source = DatasetRef(index_uri="file:///runs/i.json", version=VERSION, name="cells", image_count=4, **values)
    lines = build_report(RUN, made_result(), Cost(2.5, at_least=True), None, source, {}).splitlines()
    assert [line for line in lines if "version `" in line or "fetch it" in line] == told
    assert "cost at least $2.50" in lines[2], "that of the run, and not of the attempt that the result is of"
    assert lines[-1].startswith("Run `abcd`")


def published(record: RunRecord, monkeypatch: pytest.MonkeyPatch) -> str:
    """The report that lies in the run's folder, where Prefect takes no artifact."""

    def refuse(_: object) -> None:
        raise OSError("no server")

    monkeypatch.setattr("flows.reporting.run_page", refuse)
    publish_report(record, RUN, made_result(f"{record.uri}/attempts/1/manifest.json"), logging.getLogger(__name__))
    return (record.folder.get(RunLayout.REPORT) or b"").decode()


def test_the_report_of_a_run_is_written_with_its_dataset_and_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = published(RunRecord(str(tmp_path), "bare"), monkeypatch)
    assert "succeeded, mAP50 0.690" in bare
    assert "version" not in bare
    record = RunRecord(str(tmp_path), "abcd")
    record.write_source(DatasetRef(root="s3://b/i", index_uri="", version=VERSION, name="c", image_count=4, store_uri="s3://b/store"))
    assert f"version `{VERSION}` in the store `s3://b/store`, from `s3://b/i`" in published(record, monkeypatch)


def test_a_silent_store_is_told_in_the_log_and_to_whoever_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[JobStatus] = []
    record = RunRecord(str(tmp_path), "abcd")
    teller = StagingReporter(record, logging.getLogger(__name__), lambda _, status: heard.append(status), total=10)
    teller.on_silence("the store has not answered for 30 s")
    assert [(status.state, status.native_state, status.message) for status in heard] == [
        (JobState.STARTING, "staging", "the store has not answered for 30 s")
    ]
    assert [(entry.levelname, entry.message) for entry in caplog.records] == [("WARNING", "the store has not answered for 30 s")]


def training(epoch: int) -> Progress:
    return Progress(attempt=1, phase=Phase.TRAINING, epoch=epoch, epochs=20, metrics={"map50": epoch / 100}, eta_seconds=75)


def test_tags_say_how_far_and_how_good_and_keep_those_of_others() -> None:
    tags = running_tags(JobStatus(state=JobState.RUNNING, progress=training(3)))
    assert tags == ["epoch 3/20", "val mAP50 0.030", "ETA 1m15s"]
    assert running_tags(JobStatus(state=JobState.QUEUED)) == ["job: queued"]
    assert replace_tags(["trainyard", "mine", "epoch 2/20", "ETA 2m"], tags) == ["trainyard", "mine", *tags]


def test_the_newest_epoch_is_the_first_row() -> None:
    assert [row["epoch"] for row in epoch_table([training(1), training(2), training(3)])] == [3, 2, 1]


def test_a_refused_run_without_a_record_is_told_by_its_message(tmp_path: Path) -> None:
    message = "Flow run encountered an exception: TrainerError: no dataset at /x. Next: check the path"
    ending = ending_of(RunRecord(str(tmp_path), "abcd"), "bccd-yolo11n-abcd", message, cancelled=False)
    assert (ending.cause, ending.next) == ("no dataset at /x", "check the path")
    assert build_ending(ending).splitlines()[:5] == [
        "# bccd-yolo11n-abcd: failed",
        "",
        "**Cause:** no dataset at /x",
        "",
        "**Next:** check the path",
    ]


def test_a_run_cancelled_before_its_plan_says_who(tmp_path: Path) -> None:
    record = RunRecord(str(tmp_path), "abcd")
    record.open(RunFile(run_id="abcd", name="bccd-yolo11n", request={}, request_hash="", provider="local", settings={}, owner="me"))
    record.request_cancel(CancelRequest(attempt=1, asked_by="me@here"))
    ending = ending_of(record, "bccd-yolo11n-abcd", "", cancelled=True)
    assert ending.cause == "me@here asked to stop it"
    assert "epoch" not in " ".join(ending.tags)
