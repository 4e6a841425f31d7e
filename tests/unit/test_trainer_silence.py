from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from trainer.silence import Silence, SilenceWatch


def told(silence: Silence, *, answers: int, since: float | None, until: float, start: float = 0.0) -> list[tuple[float, str]]:
    """What is said, looked at once a second."""
    looks = ((now, silence.look(answers, since, now)) for now in range(int(start), int(until) + 1))
    return [(now, line) for now, line in looks if line]


def test_it_speaks_after_half_a_minute_and_then_at_growing_distance() -> None:
    lines = told(Silence(600), answers=3, since=0.0, until=600)
    assert [now for now, _ in lines] == [30, 60, 120, 240, 480]
    assert lines[0][1] == ("the store has not answered for 30 s: it stalls, or the link is slow; still waiting (gives up after 10 min)")


def test_it_says_once_that_the_store_goes_on_and_begins_anew() -> None:
    silence = Silence(90)
    assert "gives up after 90 s" in told(silence, answers=3, since=0.0, until=45)[0][1]
    assert told(silence, answers=4, since=46.0, start=46, until=70) == [(46, "the store answers again, after 46 s")]
    assert [now for now, _ in told(silence, answers=4, since=46.0, start=71, until=120)] == [76, 106]


def test_where_nothing_is_asked_nothing_is_said() -> None:
    assert told(Silence(600), answers=0, since=None, until=1000) == []


def test_the_answer_to_the_last_question_is_told_too() -> None:
    silence = Silence(600)
    told(silence, answers=0, since=0.0, until=31)
    assert silence.look(1, None, 35.0) == "the store answers again, after 35 s"
    assert silence.look(1, None, 36.0) == ""


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.silence.FIRST_SECONDS", 0.2)


def test_a_watch_tells_what_is_asked_and_not_answered() -> None:
    lines: list[str] = []
    with SilenceWatch(lines.append, 600) as watch:
        time.sleep(0.5)
        assert lines == [], "nothing is asked"
        watch.during(lambda: time.sleep(0.5))
    assert "has not answered" in lines[0]
    assert lines[-1].startswith("the store answers again")


def test_any_answer_is_a_sign_of_life() -> None:
    lines: list[str] = []
    with SilenceWatch(lines.append, 600) as watch, watch.asking():
        for _ in range(10):
            watch.during(lambda: time.sleep(0.05))
    assert lines == []


def test_an_error_is_no_answer_and_what_is_tried_again_is_silent_for_longer() -> None:
    lines: list[str] = []

    def fail() -> None:
        time.sleep(0.15)
        raise OSError("cut")

    with SilenceWatch(lines.append, 600) as watch:
        for _ in range(4):
            with pytest.raises(OSError, match="cut"):
                watch.during(fail)
    assert lines
    assert not [line for line in lines if "again" in line]


def test_pieces_are_signs_of_life_and_what_is_done_with_them_is_not_waited_for() -> None:
    lines: list[str] = []

    def pieces() -> Iterator[int]:
        for number in range(6):
            time.sleep(0.05)
            yield number

    with SilenceWatch(lines.append, 600) as watch:
        got: list[int] = []
        for piece in watch.each(pieces()):
            got.append(piece)
            time.sleep(0.3 if piece == 2 else 0)
    assert (got, lines) == ([0, 1, 2, 3, 4, 5], [])


def test_what_the_listener_raises_comes_out_at_the_end() -> None:
    def stop(_: str) -> None:
        raise KeyboardInterrupt("asked to stop")

    def fail() -> None:
        time.sleep(0.5)
        raise ValueError("mine")

    with pytest.raises(KeyboardInterrupt, match="asked to stop"), SilenceWatch(stop, 600) as watch:
        watch.during(lambda: time.sleep(0.5))
    with pytest.raises(ValueError, match="mine"), SilenceWatch(stop, 600) as watch:
        watch.during(fail)


def test_a_watch_that_nobody_listens_to_has_no_thread() -> None:
    before = threading.active_count()
    with SilenceWatch() as watch:
        assert watch.during(lambda: 1) == 1
        assert threading.active_count() == before
