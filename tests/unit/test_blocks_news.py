from __future__ import annotations

import logging
from datetime import timedelta
from pathlib import Path

import pytest

from blocks.job import FailureReason, JobState, JobStatus
from blocks.news import CLAIM_PATIENCE, STOP_PATIENCE, claim, mark_sent, news_of
from blocks.record import CancelRequest, Outcome, RunRecord
from flows.telling import tell_news
from tests.unit.test_blocks_attempts import make_plan
from tests.unit.test_blocks_record import run_file
from trainer.contract import utc_now


@pytest.fixture
def record(tmp_path: Path) -> RunRecord:
    made = RunRecord(str(tmp_path), "news1234")
    made.open(run_file("news1234"))
    made.write_plan(make_plan(made))
    return made


def events(record: RunRecord, seconds: float = 0) -> list[str]:
    return [news.event.rsplit(".", 1)[-1] for news in news_of(record, record.run(), utc_now() + timedelta(seconds=seconds))]


def test_an_open_run_is_no_news_until_it_stalls_or_does_not_stop(record: RunRecord) -> None:
    assert events(record) == []
    record.add_event("stalled", "no step for 6 minutes", attempt=1, cause="no-step")
    record.request_cancel(CancelRequest(attempt=1, asked_by="me"))
    assert events(record) == ["stalled"]
    assert events(record, STOP_PATIENCE.total_seconds() + 1) == ["stalled", "stop-unconfirmed"]


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (Outcome(state=JobState.SUCCEEDED, epoch=3), ["finished"]),
        (Outcome(state=JobState.FAILED, reason=FailureReason.DATA, message="a box is outside"), ["failed"]),
        (Outcome(state=JobState.FAILED, reason=FailureReason.PREEMPTED), []),  # another attempt follows
        (Outcome(state=JobState.CANCELLED), []),  # whoever cancelled knows
    ],
)
def test_how_a_run_ended_is_told_once_nothing_follows(record: RunRecord, outcome: Outcome, told: list[str]) -> None:
    record.write_outcome(1, outcome)
    assert events(record) == told


def test_news_names_cause_cost_and_next_step(record: RunRecord) -> None:
    status = JobStatus(state=JobState.FAILED, cost_usd=1.5)
    record.write_outcome(
        1, Outcome(state=JobState.FAILED, reason=FailureReason.DATA, message="a box is outside", hint="mend it", status=status)
    )
    [news] = news_of(record, record.run(), utc_now())
    assert (news.cause, news.next, news.cost) == ("a box is outside", "mend it", (1.5, False))


def test_a_piece_of_news_is_sent_once_whoever_looks(record: RunRecord) -> None:
    record.write_outcome(1, Outcome(state=JobState.SUCCEEDED))
    [news] = news_of(record, record.run(), utc_now())
    now = utc_now()
    assert claim(record, news, now)
    assert not claim(record, news, now)
    # Its claimer died: another sends it, under the same id.
    assert claim(record, news, now + CLAIM_PATIENCE * 2)
    assert news.event_id("news1234") == news_of(record, record.run(), utc_now())[0].event_id("news1234")
    mark_sent(record, news)
    assert not claim(record, news, now + CLAIM_PATIENCE * 2)


def test_news_that_another_has_claimed_and_not_sent_keeps_the_run_looked_at(record: RunRecord) -> None:
    record.write_outcome(1, Outcome(state=JobState.SUCCEEDED))
    [news] = news_of(record, record.run(), utc_now())
    assert claim(record, news, utc_now())
    assert not tell_news(record, record.run(), logging.getLogger()), "the claimer may have died"
    mark_sent(record, news)
    assert tell_news(record, record.run(), logging.getLogger())
