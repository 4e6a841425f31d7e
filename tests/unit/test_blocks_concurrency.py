"""How many transfers at once: against worlds that are known."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

import pytest

from blocks.concurrency import SETTLED_WINDOWS, AdaptivePool, Growth


def drive(growth: Growth, seconds_of_one: Callable[[int], float], transfers: int) -> list[int]:
    """The limits that a run of transfers of 1 MB leads to, where `seconds_of_one` says how long each takes among so many."""
    limits: list[int] = []
    for _ in range(transfers):
        growth.add(10**6, seconds_of_one(growth.limit), growth.limit)
        limits.append(growth.limit)
    return limits


def test_a_link_with_latency_gets_as_many_as_it_takes_to_be_full() -> None:
    # 100 MB/s shared, and 100 ms of waiting that many can do at the same time: full from 11 transfers on.
    limits = drive(Growth(2, 64), lambda at_once: max(0.1 + 0.01, at_once * 0.01), 300)
    assert limits[-1] in (8, 16)
    assert max(limits) <= 32, "one step of trying beyond what helps"


def test_a_slow_line_stays_with_few() -> None:
    limits = drive(Growth(2, 64), lambda at_once: 5.0 * at_once, 300)
    assert max(limits) == 4, "one more step was tried"
    assert limits.count(2) > len(limits) / 2


def test_what_gets_slower_together_is_given_up() -> None:
    assert drive(Growth(1, 32), lambda at_once: 0.01 * at_once * at_once, 40)[-1] == 1


def test_a_world_that_changes_is_noticed() -> None:
    growth = Growth(2, 64)
    drive(growth, lambda at_once: 1.0 * at_once, 50)
    assert growth.limit <= 4
    drive(growth, lambda _: 1.0, 2000)
    assert growth.limit == 64


def test_transfers_that_the_limit_did_not_hold_up_say_nothing() -> None:
    growth = Growth(8, 64)
    for _ in range(1000):
        growth.add(10**6, 0.1, at_once=3)
    assert growth.limit == 8


@pytest.mark.parametrize("seed", range(20))
def test_noise_moves_it_only_within_its_bounds(seed: int) -> None:
    rng = random.Random(seed)
    growth = Growth(4, 32)
    limits = drive(growth, lambda at_once: rng.uniform(0.001, 1) * at_once, 50 * SETTLED_WINDOWS)
    assert 4 <= min(limits) <= max(limits) <= 32


def test_no_more_work_at_once_than_the_limit_says() -> None:
    pool = AdaptivePool(2, 8)
    lock = threading.Lock()
    working = most = 0

    def work(number: int) -> int:
        nonlocal working, most
        with lock:
            working += 1
            most = max(most, working)
            assert working <= 8
        time.sleep(0.005)
        with lock:
            working -= 1
        return number

    futures = [pool.submit(10**6, work, number) for number in range(200)]
    assert [future.result() for future in futures] == list(range(200))
    pool.shutdown()
    assert 2 < most <= 8, "sleeping costs nothing together, so it grew"


def test_what_fails_raises_where_it_is_waited_for_and_frees_its_place() -> None:
    pool = AdaptivePool(1, 1)

    def fail() -> None:
        raise OSError("broken")

    broken = pool.submit(1, fail)
    after = pool.submit(1, lambda: "well")
    with pytest.raises(OSError, match="broken"):
        broken.result()
    assert after.result() == "well"
    pool.shutdown()
