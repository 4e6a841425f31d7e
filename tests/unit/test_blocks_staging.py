from __future__ import annotations

from collections import deque
from concurrent.futures import Future

import pytest

from blocks.reading import Read
from blocks.scanning import Stat
from blocks.staging import TAKE_BYTES, take_read


def done(*paths: str) -> Future[list[Read]]:
    future = Future[list[Read]]()
    future.set_result([Read(path, Stat(1, 2, 3, 4), b"digest", b"x") for path in paths])
    return future


def test_what_has_been_read_is_taken_together_in_its_order() -> None:
    unread = Future[list[Read]]()
    ahead: deque[tuple[Future[list[Read]] | str, int]] = deque([(done("a", "b"), 2), (done("c"), 1), (unread, 1), (done("d"), 1)])
    found, size = take_read(ahead)
    assert [read.path for read in found if isinstance(read, Read)] == ["a", "b", "c"]
    assert size == 3
    assert ahead[0][0] is unread


def test_a_path_that_is_gone_is_taken_by_itself_and_ends_what_is_taken_before_it() -> None:
    ahead: deque[tuple[Future[list[Read]] | str, int]] = deque([(done("a"), 1), ("gone", 0), (done("b"), 1)])
    assert [read.path for read in take_read(ahead)[0] if isinstance(read, Read)] == ["a"]
    assert take_read(ahead) == ("gone", 0)
    assert len(ahead) == 1


def test_no_more_is_taken_than_memory_is_meant_for() -> None:
    ahead: deque[tuple[Future[list[Read]] | str, int]] = deque([(done("a"), TAKE_BYTES), (done("b"), TAKE_BYTES)])
    assert take_read(ahead)[1] == TAKE_BYTES


def test_what_failed_is_raised_where_it_is_taken() -> None:
    failed = Future[list[Read]]()
    failed.set_exception(OSError("broken"))
    ahead: deque[tuple[Future[list[Read]] | str, int]] = deque([(failed, 1)])
    with pytest.raises(OSError, match="broken"):
        take_read(ahead)
