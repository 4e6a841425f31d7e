"""The cursor over pods' logs: no line twice, none lost, whatever the server cuts off."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from blocks.providers import kubernetes_logs
from blocks.providers.kubernetes_logs import LogCursor, place_in_log, pods_to_read, read_pod, split_lines

Timed = list[tuple[str, str]]


class Pod:
    """A log as the API server serves it: from a second on, cut off at a number of bytes."""

    def __init__(self, lines: Timed) -> None:
        self.lines = lines

    def fetch(self, query: dict[str, str]) -> bytes:
        since = query.get("sinceTime", "")[:19]
        text = "".join(f"{time} {line}\n" for time, line in self.lines if time[:19] >= since)
        return text.encode()[: int(query["limitBytes"])]


def time_of(step: int) -> str:
    """Several lines a second, and some in the very same moment; trailing zeros are cut off, as runtimes do."""
    fraction = f"{(step // 2) % 4 * 25:02}".rstrip("0")
    return f"2026-11-24T12:{step // 480:02}:{step // 8 % 60:02}{f'.{fraction}' if fraction else ''}Z"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]), max_size=40), max_size=60), st.data())
def test_all_lines_are_read_once(texts: list[str], data: st.DataObject) -> None:
    lines = [(time_of(step), text) for step, text in enumerate(texts)]
    there = 0
    cursor, read = LogCursor(), list[str]()
    before, kubernetes_logs.BATCH_BYTES = kubernetes_logs.BATCH_BYTES, 200
    try:
        while len(read) < len(lines):
            there = data.draw(st.integers(there, len(lines))) if there < len(lines) else there
            more = True
            while more:
                found, cursor, more = read_pod(Pod(lines[:there]).fetch, "u", LogCursor.parse(str(cursor)))
                read += found
            assert read == texts[:there]
    finally:
        kubernetes_logs.BATCH_BYTES = before
    assert read_pod(Pod(lines).fetch, "u", cursor).lines == ()


def test_a_line_that_is_only_begun_is_left_for_the_next_batch() -> None:
    assert split_lines(b"t1 whole\nt2 beg", whole=False) == [("t1", "whole")]
    assert split_lines(b"t1 whole\nt2 beg", whole=True) == [("t1", "whole"), ("t2", "beg")]


def test_pods_are_read_one_after_the_other() -> None:
    pods = [{"metadata": {"uid": name, "creationTimestamp": f"2026-11-24T12:0{place}:00Z"}} for place, name in enumerate("abc")]
    assert pods_to_read(pods, LogCursor()) == pods
    assert pods_to_read(pods, LogCursor(pod="b")) == pods[1:]
    assert pods_to_read(pods, LogCursor(pod="gone", time="2026-11-24T12:01:30.5Z")) == pods[2:]


def test_the_buckets_log_goes_on_behind_the_last_line_read() -> None:
    log = b"one\ntwo\nthree\n"
    assert place_in_log(log, LogCursor()) == 0
    assert place_in_log(log, LogCursor(last=kubernetes_logs.digest("two"))) == 8
    assert place_in_log(log, LogCursor(last=kubernetes_logs.digest("never said"))) == len(log)
