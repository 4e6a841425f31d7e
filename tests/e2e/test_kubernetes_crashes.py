"""The flow is killed, or an answer is lost, at each step of a run whose job is on a real cluster, also while the Job is taken away.

Each case asserts one Job, ever, for each attempt; no epoch trained twice by one; a verified model, or for a run that was stopped a
receipt, no pod and no Job. The same command again goes on where the first one was killed; a lost answer the flow bears by itself.
The steps are those of `test_crash_matrix.py`, which kills on this machine, and those that only such a job has. The whole matrix:

    pytest -m full tests/e2e/test_kubernetes_crashes.py -s

prints its table. A plain run takes a sample: a flow that dies when its Job has just been created, and comes back when the Job has
been removed; and a Job whose creation is not confirmed, cancelled while the answers to that are lost as well.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal
from uuid import uuid4

import pytest

from blocks.naming import job_name, run_id_of_key
from blocks.providers.kubernetes_objects import is_alive
from blocks.record import CancelRequest, RunRecord
from tests.cluster.cluster import Cluster
from tests.cluster.programs import kubernetes_program
from tests.crash import CrashPlan, sitecustomize as crash
from tests.docker_registry import running_registry
from tests.e2e.test_command_line import TINY
from tests.faults import Fault, FaultProxy, running_proxy
from tests.kubernetes_images import push_host_image
from tests.kubernetes_jobs import host_settings
from tests.kubernetes_runs import KubernetesRuns, kubernetes_runs
from tests.kubernetes_trainer import kubeconfig_through
from tests.rig import KnownAccess
from tests.stack import Stack, stop, wait_for
from tests.stores import StoreServer
from trainer.contract import ExitCode

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]

EPOCHS = 4
LANES = 4  # runs of the whole matrix at a time: each waits more than it works
PATIENCE_SECONDS = 900.0  # of a step, on a machine that has other things to do as well
WHO = "tester"
Removed = Literal["", "by time", "by hand"]

# Requests whose answers get lost, by what they ask.
ASKED_OF_THE_CLUSTER = {
    "create": ("POST", r"/jobs(?!.*dryRun)"),
    "get": ("GET", r"/jobs/ty-"),
    "pods": ("GET", r"/pods\?"),
    "suspend": ("PATCH", r"/jobs/ty-"),
    "delete": ("DELETE", r"/jobs/ty-"),
}


@dataclass(frozen=True)
class Case:
    """At `moment` the flow is killed, or held while answers are planned to get lost and the Job, perhaps, is removed.

    `lost` are requests to the cluster, and objects of the attempt (without ``.json``) when they are written.
    """

    moment: str
    lost: tuple[str, ...] = ()
    removed: Removed = ""
    cancelled: bool = False

    def __str__(self) -> str:
        what = f"lost: {' '.join(self.lost)}" if self.lost else "killed"
        return f"{self.moment:16} {what:28} {self.removed:8} {'cancelled' if self.cancelled else '':10}"


# Before those nothing has been asked of the cluster, and nobody has been told after them.
BEFORE_THE_CLUSTER = ("check", "dataset", "stage", "open", "mark")
STEPS = [step for step in (*crash.STEPS, *crash.NOTE_STEPS) if step not in BEFORE_THE_CLUSTER]
KILLED = [Case(f"{when} {step}") for when in ("after", "before") for step in STEPS]
STOPPED = [Case(f"{when} {step}", cancelled=True) for when in ("after", "before") for step in (*crash.CANCEL_STEPS, "outcome")]
LOST = [
    Case("before plan", lost=("plan",)),
    *(Case("before submit", lost=(name,)) for name in ("get", "submission", "create", "ref")),
    Case("before launch", lost=("create", "get")),
    *(Case("before poll", lost=(name,)) for name in ("get", "pods")),
    *(Case("before collect", lost=(name,)) for name in ("get", "pods", "outcome")),
    *(Case("before cancel", lost=(name,), cancelled=True) for name in ("get", "stop", "suspend", "receipt", "outcome")),
    Case("before remove", lost=("delete",), cancelled=True),
]
GONE = [
    *(Case(f"after {step}", removed="by time") for step in ("launch", "submit", "ref", "poll", "collect", "outcome")),
    Case("before collect", removed="by time"),
    Case("before collect", lost=("get",), removed="by time"),
    *(Case(f"after {step}", removed="by hand") for step in ("launch", "ref", "poll")),
    Case("after cancel", removed="by hand", cancelled=True),
]
MATRIX = [*GONE, *STOPPED, *LOST, *KILLED]
SAMPLE = [Case("after launch", removed="by time"), Case("before launch", lost=("create", "suspend", "delete"), cancelled=True)]


@dataclass(frozen=True)
class Lane:
    """For one run at a time, whose requests pass proxies, before the API server and before the store, and whose command dies by plan."""

    runs: KubernetesRuns
    api: FaultProxy
    plan: CrashPlan
    record_access: KnownAccess

    @property
    def profile(self) -> str:
        return self.plan.path.stem

    def record(self, run_id: str) -> RunRecord:
        return RunRecord(f"{self.runs.bucket}/runs", run_id, self.record_access)

    def start(self, words: list[str], case: Case) -> subprocess.Popen[bytes]:
        self.plan.write(case.moment, ("pause",) if case.lost else ("flow",))
        environment = {**self.runs.stack.environment, **self.plan.environment, "TRAINYARD_CRASH_COMMAND": "1"}
        return replace(self.runs.stack, environment=environment).spawn("trainyard", *words, log=f"{self.profile}.log")

    def lose(self, run_id: str, names: tuple[str, ...]) -> list[Fault]:
        api = [Fault("lose", *ASKED_OF_THE_CLUSTER[name]) for name in names if name in ASKED_OF_THE_CLUSTER]
        store = [Fault("lose", "PUT", f"/{run_id}/attempts/1/{name}.json") for name in names if name not in ASKED_OF_THE_CLUSTER]
        self.api.add(*api)
        self.runs.store.add(*store)
        return [*api, *store]

    def remove(self, run_id: str, how: Removed, *, cancelled: bool) -> None:
        namespace = ("--namespace", self.runs.namespace)
        if how == "by time":
            patch = json.dumps({"spec": {"ttlSecondsAfterFinished": 1}})  # sooner than a profile may say
            self.runs.cluster.kubectl("patch", "job", job_name(run_id, 1), *namespace, "--patch", patch)
        if how == "by hand":
            wait_for("a pod of the Job that is not stopped", lambda: self.runs.pods(run_id) or cancelled, PATIENCE_SECONDS)
            self.runs.cluster.kubectl("delete", "job", job_name(run_id, 1), *namespace, "--wait=false")
        if how:
            wait_for("the Job to be removed", lambda: not self.runs.jobs(run_id), PATIENCE_SECONDS)

    def ask_to_cancel(self, run_id: str) -> None:
        """As the command line and Prefect do first."""
        wait_for("the training", lambda: self.runs.epochs(run_id), PATIENCE_SECONDS)
        self.record(run_id).request_cancel(CancelRequest(attempt=1, asked_by=WHO, why="a test"))

    def clean_up(self, run_id: str) -> None:
        """What a case that failed left running would slow those after it."""
        for job in self.runs.jobs(run_id) if any(map(is_alive, self.runs.pods(run_id))) else []:
            self.runs.cluster.kubectl("delete", "job", job, "--namespace", self.runs.namespace, "--wait=false")

    @contextmanager
    def created(self, run_id: str) -> Iterator[dict[str, set[str]]]:
        """All Jobs of the run that there have been since, by name; filled at the end."""
        found: dict[str, set[str]] = {}
        log = self.runs.stack.folder / f"{run_id}.jobs"
        where = ["--namespace", self.runs.namespace, "--selector", f"trainyard.io/run-id={run_id}"]
        columns = ["--no-headers", "--output", "custom-columns=N:.metadata.name,U:.metadata.uid"]
        command = [kubernetes_program("kubectl"), "--kubeconfig", str(self.runs.cluster.admin), "get", "jobs", "--watch", *where, *columns]
        with log.open("wb") as out:
            watching = subprocess.Popen(command, stdout=out, stderr=subprocess.DEVNULL)
        try:
            yield found
            assert watching.poll() is None, "kubectl watches to the end"
        finally:
            stop(watching)
        for name, uid in map(str.split, log.read_text().splitlines()):
            found.setdefault(name, set()).add(uid)


@pytest.fixture(scope="module")
def lanes(stack: Stack, cluster: Cluster, s3: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Lane]]:
    folder = tmp_path_factory.mktemp("crashes")
    with kubernetes_runs(stack, cluster, s3, folder) as runs, running_registry(folder / "registry") as registry, ExitStack() as proxies:
        host = host_settings(cluster, runs.namespace, s3)
        fields = {name: host[name] for name in ("grace_seconds", "instance_classes", "pod_patch")}
        fields |= {"image": push_host_image(registry.host)}
        made: list[Lane] = []
        profiles: dict[str, dict[str, Any]] = {}
        for number in range(LANES):
            api = proxies.enter_context(running_proxy(cluster.server, cluster.certificate))
            lane = Lane(runs, api, CrashPlan(folder / f"crashes-{number}.json"), KnownAccess(s3.address))
            login = kubeconfig_through(api, cluster, runs.namespace)
            profiles[lane.profile] = {**fields, "kubeconfig": login}
            made.append(lane)
        runs.save_profiles(**profiles)
        yield made


@dataclass(frozen=True)
class Row:
    case: Case
    outcomes: list[str]
    created: dict[str, set[str]]
    pods: int
    seconds: float

    def __str__(self) -> str:
        jobs = " ".join(f"{name.rpartition('-')[2]}:{len(uids)}" for name, uids in sorted(self.created.items()))
        return f"{self.case} {' '.join(self.outcomes):18} {jobs:9} {self.pods:4} {self.seconds:7.1f}"


HEADER = f"{'moment':16} {'what':28} {'removed':8} {'':10} {'attempts':18} {'Jobs':9} {'pods':4} {'seconds':>7}"


def run_case(lane: Lane, shapes: Path, case: Case) -> Row:
    began = time.monotonic()
    runs, key = lane.runs, uuid4().hex
    run_id = run_id_of_key(key)
    epochs = 5000 if case.cancelled else EPOCHS  # more than it can do before it is stopped, however slow that is
    words = ["train", str(shapes), "--profile", lane.profile, *TINY, "--epochs", str(epochs), "--run-key", key, "--json"]
    with lane.created(run_id) as created:
        first = lane.start(words, case)
        try:
            code = go_through(lane, case, run_id, first, words)
            wait_for("no trainer to be left", lambda: not any(map(is_alive, runs.pods(run_id))), PATIENCE_SECONDS)
        finally:
            stop(first)
            lane.api.heal()
            lane.clean_up(run_id)
    assert code == (ExitCode.CANCELLED if case.cancelled else ExitCode.OK), (runs.stack.folder / f"{lane.profile}.log").read_text()[-3000:]
    record = lane.record(run_id)
    outcomes = [outcome.state.value for number in record.attempts() if (outcome := record.outcome(number))]
    check_case(runs, record, case, outcomes)
    assert {name: len(uids) for name, uids in created.items()} == {job_name(run_id, number): 1 for number in record.attempts()}
    return Row(case, outcomes, created, len(runs.pods(run_id)), time.monotonic() - began)


def go_through(lane: Lane, case: Case, run_id: str, first: subprocess.Popen[bytes], words: list[str]) -> int:
    """The exit code of the command that came to the run's end."""
    in_stop = case.cancelled and case.moment.split()[1] in (*crash.CANCEL_STEPS, "outcome")
    if in_stop:
        lane.ask_to_cancel(run_id)
    wait_for(f"the flow at its moment {case.moment}", lambda: lane.plan.fired() or first.poll() is not None, PATIENCE_SECONDS)
    assert lane.plan.fired(), f"the command ended before: {first.returncode}"
    if not case.lost:
        assert first.wait(30) == -signal.SIGKILL
        lane.remove(run_id, case.removed, cancelled=case.cancelled)
        return lane.runs.stack.spawn("trainyard", *words, log=f"{lane.profile}.log").wait(PATIENCE_SECONDS)
    faults = lane.lose(run_id, case.lost)
    lane.remove(run_id, case.removed, cancelled=case.cancelled)
    lane.plan.go_on()
    if case.cancelled and not in_stop:
        lane.ask_to_cancel(run_id)
    code = first.wait(PATIENCE_SECONDS)
    assert not [fault for fault in faults if fault.times], "every answer that was to be lost was"
    return code


def check_case(runs: KubernetesRuns, record: RunRecord, case: Case, outcomes: list[str]) -> None:
    run_id, last = record.run_id, len(outcomes)
    for number in record.attempts():
        epochs = runs.epochs(run_id, number)
        assert epochs == sorted(set(epochs)), "one trainer, that never began anew"
    if case.cancelled:
        assert outcomes == ["cancelled"]
        receipt = record.receipt(1)
        assert receipt is not None
        assert (receipt.asked_by, receipt.state.value, receipt.native_id) == (WHO, "cancelled", job_name(run_id, 1))
        wait_for("no pod to be left", lambda: not runs.pods(run_id), 60)
        assert runs.jobs(run_id) == []
        return
    assert outcomes == (["failed", "succeeded"] if case.removed == "by hand" else ["succeeded"])
    assert runs.verified(run_id, last).epochs == EPOCHS
    if last == 1:
        assert runs.epochs(run_id) == list(range(1, EPOCHS + 1))


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: " ".join(str(case).split()))
def test_sample_of_crashes(lanes: list[Lane], shapes: Path, case: Case) -> None:
    print(f"\n{HEADER}\n{run_case(lanes[0], shapes, case)}")


@pytest.mark.full
def test_all_crashes(lanes: list[Lane], shapes: Path) -> None:
    print(f"\n{HEADER}", flush=True)
    free = SimpleQueue[Lane]()
    for lane in lanes:
        free.put(lane)

    def failure_of(case: Case) -> str:
        lane = free.get()
        try:
            print(run_case(lane, shapes, case), flush=True)
        except (AssertionError, subprocess.TimeoutExpired) as exc:
            print(f"{case} FAILED {exc}", flush=True)
            return f"{case}: {exc}"
        finally:
            free.put(lane)
        return ""

    with ThreadPoolExecutor(LANES) as pool:
        failures = [failure for failure in pool.map(failure_of, MATRIX) if failure]
    assert not failures, "\n".join(failures)
