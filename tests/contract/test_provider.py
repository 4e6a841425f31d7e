"""What every provider must do, run against each row of the rig with real jobs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blocks.errors import ConfigError, JobNotFound, PlanChanged, ResultMissing
from blocks.job import FailureReason, JobRef, JobState, Plan, Resources, canonical_json
from tests.rig import RIGS, Rig
from trainer.contract import AttemptLayout, ResultManifest

SECRET = "hunter2-very-secret"


@pytest.fixture(params=sorted(RIGS))
def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    monkeypatch.setenv("TRAINYARD_TEST_TOKEN", SECRET)
    with RIGS[request.param](tmp_path / "home", request) as made:
        yield made
        made.stop_everything()


@pytest.fixture(params=sorted(RIGS), scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Rig, Plan, JobRef]]:
    """A job that is over, for tests that only look at what it left."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAINYARD_TEST_TOKEN", SECRET)
        with RIGS[request.param](tmp_path_factory.mktemp("finished") / "home", request) as made:
            plan = made.provider.plan(made.spec("over01"))
            ref = made.provider.submit(plan)
            made.finish(ref)
            yield made, plan, ref


def test_life_of_a_job(rig: Rig) -> None:
    """States in order, logs without loss, a verified result, and refusal of a tampered one."""
    plan = rig.provider.plan(rig.spec("life01"))
    ref = rig.provider.submit(plan)
    assert JobRef.model_validate_json(ref.model_dump_json()) == ref
    seen = [status.state for status in rig.finish(ref)]
    order = [JobState.QUEUED, JobState.STARTING, JobState.RUNNING, JobState.SUCCEEDED]
    assert seen == sorted(seen, key=order.index), seen
    assert seen[-1] is JobState.SUCCEEDED
    assert JobState.RUNNING in seen

    lines: list[str] = []
    cursor, batches = "", 0
    while not (batch := rig.provider.logs(ref, cursor)).ended:
        lines += batch.lines
        cursor, batches = batch.cursor, batches + 1
        assert batches < 1000
    lines += batch.lines
    assert lines, "a training says something"
    again = rig.provider.logs(ref, batch.cursor)
    assert again.lines == ()
    assert SECRET not in "\n".join(lines)

    result = rig.provider.collect(ref)
    assert result.outcome == "complete"
    assert 0 <= result.metrics["map50"] <= 1
    assert result.metrics_split == "test"
    assert AttemptLayout.MODEL in result.files
    model = rig.objects(ref).get(AttemptLayout.MODEL)
    assert model is not None
    rig.objects(ref).put(AttemptLayout.MODEL, model[:-1] + b"x")
    with pytest.raises(ResultMissing, match=r"model\.pt"):
        rig.provider.collect(ref)


def test_submitting_again_finds_the_job(rig: Rig) -> None:
    plan = rig.provider.plan(rig.spec("twice1"))
    first = rig.provider.submit(plan)
    second = rig.provider.submit(plan)
    assert (first.native_id, first.submitted_at) == (second.native_id, second.submitted_at)
    assert len(rig.jobs_of("twice1")) == 1


def test_two_submitters_at_once_make_one_job(rig: Rig) -> None:
    plan = rig.provider.plan(rig.spec("race01", epochs=50))
    with ThreadPoolExecutor(2) as pool:
        refs = list(pool.map(rig.provider.submit, [plan, plan]))
    assert refs[0].submitted_at == refs[1].submitted_at
    assert len(rig.jobs_of("race01")) == 1


def test_lost_answer_is_found_again(rig: Rig) -> None:
    plan = rig.provider.plan(rig.spec("lost01", epochs=50))
    with rig.lose_answer():
        first = rig.provider.submit(plan)
    assert rig.provider.submit(plan).submitted_at == first.submitted_at
    assert len(rig.jobs_of("lost01")) == 1


def test_another_request_under_the_same_key_is_refused(rig: Rig) -> None:
    rig.provider.submit(rig.provider.plan(rig.spec("chang1", epochs=50)))
    with pytest.raises(PlanChanged) as caught:
        rig.provider.submit(rig.provider.plan(rig.spec("chang1", epochs=51)))
    assert caught.value.hint
    assert len(rig.jobs_of("chang1")) == 1


def test_equal_specs_have_equal_fingerprints(rig: Rig) -> None:
    plans = [rig.provider.plan(rig.spec("print1")) for _ in range(2)]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert plans[0].fingerprint != rig.provider.plan(rig.spec("print1", epochs=2)).fingerprint
    assert Plan.model_validate_json(plans[0].model_dump_json()) == plans[0]
    json.loads(canonical_json(plans[0].request))


def test_cancel_early_twice_and_late(rig: Rig) -> None:
    ref = rig.provider.submit(rig.provider.plan(rig.spec("cancl1", epochs=500)))
    rig.wait(ref, lambda status: status.state is JobState.RUNNING)
    rig.provider.cancel(ref)
    rig.provider.cancel(ref)
    assert rig.finish(ref)[-1].state is JobState.CANCELLED
    rig.provider.cancel(ref)
    assert rig.provider.poll(ref).state is JobState.CANCELLED
    with pytest.raises(ResultMissing):
        rig.provider.collect(ref)


def test_unknown_job(rig: Rig) -> None:
    ref = rig.provider.submit(rig.provider.plan(rig.spec("known1", epochs=50)))
    stranger = ref.model_copy(
        update={"native_id": "ty-nobody-1", "run_id": "nobody", "output_uri": ref.output_uri.replace("known1", "nobody")}
    )
    rig.provider.cancel(stranger)
    with pytest.raises(JobNotFound):
        rig.provider.poll(stranger)


def test_failure_names_reason_and_next_step(rig: Rig) -> None:
    ref = rig.provider.submit(rig.provider.plan(rig.spec("fails1", model_params={"no_such_setting": 1})))
    status = rig.finish(ref)[-1]
    assert status.state is JobState.FAILED
    assert status.reason is FailureReason.CONFIG
    assert "no_such_setting" in status.message
    assert status.hint


def test_job_over_its_time_is_stopped_by_the_provider(rig: Rig) -> None:
    spec = rig.spec("timed1", epochs=5000).model_copy(update={"max_runtime_seconds": 15})
    status = rig.finish(rig.provider.submit(rig.provider.plan(spec)))[-1]
    assert (status.state, status.reason) == (JobState.FAILED, FailureReason.TIMEOUT)


def test_all_problems_are_told_at_once(rig: Rig) -> None:
    spec = rig.spec("probl1").model_copy(
        update={
            "resources": Resources(nodes=64, spot=not rig.provider.CAPABILITIES.spot),
            "image": "trainer:latest",
            "max_runtime_seconds": 10**9,
        }
    )
    fields = {problem.field for problem in rig.provider.validate(spec)}
    assert {"resources.nodes", "max_runtime_seconds", "image"} <= fields
    with pytest.raises(ConfigError) as caught:
        rig.provider.plan(spec)
    assert all(field in caught.value.message for field in fields)


def test_check_names_what_to_do(rig: Rig) -> None:
    report = rig.provider.check()
    assert report.ok, report
    assert {line.name for line in report.lines}


def test_no_secret_in_what_is_stored_or_shown(finished: tuple[Rig, Plan, JobRef]) -> None:
    rig, plan, ref = finished
    texts = [repr(plan), repr(ref), repr(rig.provider.settings), plan.model_dump_json()]
    texts += rig.texts(ref)
    assert not [text[:200] for text in texts if SECRET in text]


def test_manifest_of_another_attempt_is_refused(finished: tuple[Rig, Plan, JobRef]) -> None:
    rig, _, ref = finished
    assert rig.provider.collect(ref).outcome == "complete"
    before = rig.objects(ref).get(AttemptLayout.MANIFEST)
    assert before is not None
    other = ResultManifest.model_validate_json(before).model_copy(update={"attempt": 7})
    rig.objects(ref).put(AttemptLayout.MANIFEST, other.model_dump_json().encode())
    with pytest.raises(ResultMissing, match="attempt 7"):
        rig.provider.collect(ref)
    rig.objects(ref).put(AttemptLayout.MANIFEST, before)
