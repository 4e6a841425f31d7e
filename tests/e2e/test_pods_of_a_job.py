"""A Job of one attempt runs several pods, one after another and sometimes two at a time: real processes, and a bucket of moto's.

All of it, with `pytest -m 'full or not full'`, takes a quarter of an hour on two busy cores; a plain run leaves three cases out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.faults import ALWAYS, Fault, FaultProxy, running_proxy
from tests.pods import Pod, PodJob, make_job
from tests.stores import StoreServer, new_store, no_cloud, s3
from trainer.contract import AttemptLayout, ExitCode, FailureReason, RunLayout

__all__ = ["no_cloud", "s3"]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(find_spec("ultralytics") is None, reason="needs the extra `train`: uv sync --extra train"),
]
LOOK_SECONDS = 5.0  # of the trainer at its record

MakeJob = Callable[..., PodJob]


@pytest.fixture
def make(tmp_path: Path, s3: StoreServer, no_cloud: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeJob]:
    made: list[PodJob] = []

    def making(address: str | None = None, **config: Any) -> PodJob:
        uri = new_store(s3, monkeypatch)
        made.append(make_job(tmp_path, uri, s3.settings(address), **config))
        return made[-1]

    yield making
    for job in made:
        job.clean_up()


def resumed_after(pod: Pod) -> int:
    found = re.search(r"resuming after epoch (\d+)", pod.output)
    return int(found[1]) if found else 0


def expect_whole(job: PodJob, epochs: int) -> None:
    assert job.verified().epochs == epochs
    assert [line.epoch for line in job.lines()] == list(range(1, epochs + 1))
    assert job.end().exit_code == ExitCode.OK


def test_evicted_then_lost_with_its_node_it_goes_on_each_time(make: MakeJob) -> None:
    job = make(epochs=14)
    evicted = job.start()
    job.wait_saved(2)
    asked = time.monotonic()
    evicted.evict()
    assert evicted.wait() == ExitCode.PREEMPTED, evicted.output
    assert time.monotonic() - asked < 8, "what its grace is by default"
    end, first = job.end(), evicted.output
    assert (end.reason, end.exit_code) == (FailureReason.PREEMPTED, ExitCode.PREEMPTED)
    assert re.search(r"checkpoint of epoch \d+ saved", end.message)
    assert end.hint
    saved = job.saved()

    lost = job.start()
    job.wait_saved(saved + 3)
    lost.lose()
    done = lost.epochs()
    assert resumed_after(lost) == saved, "nothing is lost where there is time to stop"

    last = job.start()
    assert last.wait() == ExitCode.OK, last.output
    assert done[-1] - resumed_after(last) <= 1
    expect_whole(job, 14)
    assert (job.owner().generation, job.owner().pod, job.owner().node) == (3, "job-3", "node-3")
    log = job.log()
    assert log.startswith(first.strip()[:200])
    places = [log.index(f"number {number} of attempt 1") for number in (1, 2, 3)]
    assert places == sorted(places)
    assert not list(last.scratch.iterdir())


def expect_fenced(job: PodJob, old: Pod, new: Pod) -> None:
    assert old.wait(30) == ExitCode.SUPERSEDED, old.output
    assert "another container (job-2 on node-2) has had this attempt since" in old.output
    assert "Traceback" not in old.output
    assert new.process.poll() is None


def test_of_two_pods_alive_the_older_one_stops_and_writes_no_more(make: MakeJob) -> None:
    job = make(epochs=400)
    old = job.start()
    job.wait_saved(1)
    new = job.start()
    job.wait_for("the second one takes over", lambda: job.owner().generation == 2)
    taken = time.monotonic()
    expect_fenced(job, old, new)
    assert time.monotonic() - taken < LOOK_SECONDS + 5
    assert not job.attempt.get(AttemptLayout.EXIT), "the older one has no word in how the attempt ended"
    resumed = job.wait_for("the second one to train", lambda: resumed_after(new))
    job.wait_saved(resumed + 1)
    new.evict()
    assert new.wait() == ExitCode.PREEMPTED, new.output
    epochs = [line.epoch for line in job.lines()]
    assert epochs == list(range(1, len(epochs) + 1))


def test_a_pod_that_slept_through_its_replacement_changes_nothing(make: MakeJob) -> None:
    """Its machine stood still or was cut off; it wakes when the other one has finished, and has a whole result, too."""
    job = make(epochs=3)
    old = job.start()
    job.wait_for("its last epoch", lambda: "evaluating" in old.progress())
    old.freeze()
    new = job.start()
    assert new.wait() == ExitCode.OK, new.output
    expect_whole(job, 3)
    before = job.objects()
    old.thaw()
    assert old.wait(60) == ExitCode.SUPERSEDED, old.output
    assert job.objects() == before
    job.verified()


@pytest.mark.full
def test_a_newer_attempt_ends_an_older_one_that_still_trains(make: MakeJob) -> None:
    job = make(epochs=400)
    old = job.start()
    job.wait_saved(1)
    job.run.put("attempts/2/plan.json", b"{}")
    assert old.wait(30) == ExitCode.OCCUPIED, old.output
    end = job.end()
    assert "a newer attempt exists (2)" in end.message
    assert job.attempt.get(AttemptLayout.MANIFEST) is None


def test_a_cancel_in_the_record_saves_and_ends_it_and_no_other_pod_begins(make: MakeJob) -> None:
    job = make(epochs=400)
    pod = job.start()
    job.wait_saved(1)
    job.run.put(RunLayout.CANCEL, json.dumps({"attempt": 7, "asked_by": "of another attempt"}).encode())
    ask_to_cancel(job)
    assert pod.wait(60) == ExitCode.CANCELLED, pod.output
    end = job.end()
    assert (end.cancelled, end.reason) == (True, None)
    assert f"epoch {job.saved()} saved" in end.message
    assert job.lines()[-1].epoch == job.saved()
    again = job.start()
    assert again.wait(60) == ExitCode.CANCELLED, again.output
    assert "resuming" not in again.output
    assert job.end().cancelled


def ask_to_cancel(job: PodJob) -> None:
    job.run.put(RunLayout.CANCEL, json.dumps({"attempt": 1, "asked_by": "me"}).encode())


@pytest.mark.full
def test_a_signal_that_follows_a_cancel_is_told_as_one(make: MakeJob) -> None:
    """A Job is suspended right after the request is written, before the next look at the record."""
    job = make(epochs=400)
    pod = job.start()
    job.wait_saved(1)
    ask_to_cancel(job)
    pod.evict()
    assert pod.wait(60) == ExitCode.CANCELLED, pod.output
    assert job.end().cancelled


def can_be_strict() -> bool:
    return subprocess.run(["unshare", "--mount", "true"], check=False, capture_output=True).returncode == 0 and os.getuid() == 0


@pytest.mark.skipif(not can_be_strict(), reason="only root can make a root file system that is read-only")
def test_a_user_without_a_name_trains_on_a_read_only_root(make: MakeJob) -> None:
    job = make(epochs=1, train=16, workers=None, image_size=640, batch_size=16)
    pod = job.start(strict=True)
    assert pod.wait() == ExitCode.OK, pod.output
    expect_whole(job, 1)
    assert re.search(r"0 data-loading processes, not \d+: /dev/shm has \d+ MB free", pod.output)
    assert "Read-only file system" not in pod.output
    assert "Permission denied" not in pod.output


# --- The store goes away ---------------------------------------------------------------------------------


@pytest.fixture
def proxy(s3: StoreServer) -> Iterator[FaultProxy]:
    with running_proxy(s3.address) as running:
        yield running


@pytest.mark.full
def test_a_store_away_for_a_while_stops_no_training(make: MakeJob, proxy: FaultProxy) -> None:
    job = make(proxy.address, epochs=40)
    pod = job.start()
    job.wait_saved(1)
    proxy.add(Fault("drop", times=ALWAYS))
    trained = len(pod.epochs())
    time.sleep(30)
    assert job.saved() < len(pod.epochs()) > trained + 1, "it trains on"
    proxy.heal()
    assert pod.wait() == ExitCode.OK, pod.output
    expect_whole(job, 40)
    assert proxy.met("drop")


@pytest.mark.full
def test_a_store_that_stays_away_ends_it_with_the_cause_and_where_the_result_is(make: MakeJob, proxy: FaultProxy) -> None:
    job = make(proxy.address, epochs=3)
    pod = job.start("--patience-seconds", "1")
    job.wait_saved(1)
    proxy.add(Fault("refuse", times=ALWAYS, status=503))
    assert pod.wait(300) == ExitCode.UNAVAILABLE, pod.output
    told = re.search(r"the result is not in the record: (.+); it is kept in (\S+?)\. Next: ", pod.output)
    assert told, pod.output
    kept = AttemptLayout(Path(told[2]))
    assert (kept / AttemptLayout.MANIFEST).is_file()
    assert (kept / AttemptLayout.MODEL).is_file()
    proxy.heal()
    again = job.start()
    assert again.wait() == ExitCode.OK, again.output
    expect_whole(job, 3)


def test_stopped_while_the_store_is_away_it_ends_within_its_grace(make: MakeJob, proxy: FaultProxy) -> None:
    job = make(proxy.address, epochs=400)
    pod = job.start("--grace-seconds", "6")
    job.wait_saved(1)
    proxy.add(Fault("stall", times=ALWAYS))
    time.sleep(6)
    asked = time.monotonic()
    pod.evict()
    assert pod.wait(20) == ExitCode.PREEMPTED, pod.output
    assert time.monotonic() - asked < 10
    assert "the record lacks the last of this attempt" in pod.output
