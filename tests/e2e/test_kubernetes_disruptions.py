"""What a cluster does to a training: pods deleted and evicted, machines that go, or live on unseen, and a cancel in the middle.

All of it, with `pytest -m 'full or not full'`, takes some ten minutes; a plain run has the deleted pod alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.cluster.another_machine import another_machine, exit_code, output
from tests.cluster.cluster import Cluster
from tests.docker_registry import running_registry
from tests.e2e.test_command_line import TINY
from tests.kubernetes_images import push_host_image
from tests.kubernetes_jobs import host_settings
from tests.kubernetes_runs import KubernetesRuns, job_names, kubernetes_runs
from tests.stack import Stack, wait_for
from tests.stores import StoreServer
from trainer.contract import AttemptLayout, ExitCode
from trainer.progress import read_lines

pytestmark = [pytest.mark.cluster, pytest.mark.e2e]
RESUMED = re.compile(r"resuming after epoch (\d+)")
HOURLY_USD = 1.0
EPOCH = re.compile(r"epoch (\d+) of \d+: ")


@pytest.fixture(scope="module")
def runs(stack: Stack, cluster: Cluster, s3: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KubernetesRuns]:
    """This environment's trainer, which needs no image of gigabytes: a machine that is replaced gets it in a second."""
    folder = tmp_path_factory.mktemp("disruptions")
    with running_registry(folder / "registry") as registry, kubernetes_runs(stack, cluster, s3, folder) as made:
        settings = host_settings(cluster, made.namespace, s3)
        own = {name: settings[name] for name in ("grace_seconds", "pod_patch")}
        own["instance_classes"] = {"small": {"cpus": 0.1, "memory_gib": 3, "usd_per_hour": HOURLY_USD}}
        made.save_profiles(disrupted={**own, "image": push_host_image(registry.host)})
        yield made


@dataclass
class Training:
    """A run that `trainyard train` watches in a process of its own, from the moment that it has a checkpoint."""

    runs: KubernetesRuns
    process: subprocess.Popen[bytes]
    log_file: Path
    run_id: str
    epochs: int

    @property
    def told(self) -> str:
        return self.log_file.read_text()

    def saved(self) -> int:
        """The epoch of the newest checkpoint in the bucket that has its record."""
        keys = self.runs.objects(f"runs/{self.run_id}/attempts/1/{AttemptLayout.CHECKPOINTS}/")
        return max((int(found[1]) for key in keys if (found := re.search(r"epoch-(\d+)\.json$", key))), default=0)

    def wait_saved(self, epoch: int, seconds: float = 240) -> int:
        def saved() -> int:
            assert self.process.poll() is None, self.told
            return (found := self.saved()) >= epoch and found

        return wait_for(f"the checkpoint of epoch {epoch}", saved, seconds)

    def pod(self) -> dict[str, Any]:
        [pod] = self.runs.pods(self.run_id)
        return pod

    def end(self, seconds: float = 400) -> int:
        return self.process.wait(seconds)

    def epochs_on_disk(self, uid: str) -> list[int]:
        """Those that the pod has finished, as its machine's disk has them, whoever has heard of it."""
        disk = self.runs.cluster.place.run / f"kubelet/pods/{uid}/volumes/kubernetes.io~empty-dir/tmp"
        [lines] = disk.glob(f"trainyard-*/{self.run_id}/attempts/*/{AttemptLayout.PROGRESS_LINES}")
        return [line.epoch for line in read_lines(lines)]

    def expect_whole(self, attempts: int = 1) -> None:
        """All epochs are in the record, each once, and the model is what its manifest says."""
        assert self.runs.jobs(self.run_id) == job_names(self.run_id, attempts)
        epochs = [epoch for number in range(1, attempts + 1) for epoch in self.runs.epochs(self.run_id, number)]
        assert sorted(set(epochs)) == list(range(1, self.epochs + 1))
        assert len(epochs) <= self.epochs + attempts - 1
        assert self.runs.verified(self.run_id, attempts).epochs == self.epochs
        assert self.runs.attempt(self.run_id, attempts, AttemptLayout.OUTCOME)["state"] == "succeeded"


@pytest.fixture
def start(runs: KubernetesRuns, shapes: Path) -> Iterator[Any]:
    processes: list[subprocess.Popen[bytes]] = []
    made: list[Training] = []

    def starting(epochs: int, *options: str) -> Training:
        before, log = runs.run_ids(), runs.stack.folder / f"train-{uuid4().hex[:8]}.log"
        words = ("train", str(shapes), "--profile", "disrupted", *TINY, *options, "--epochs", str(epochs), "--new")
        process = runs.stack.spawn("trainyard", *words, log=log.name)
        processes.append(process)

        def begun() -> set[str]:
            assert process.poll() is None, log.read_text()
            return runs.run_ids() - before

        [run_id] = wait_for("the run's record", begun, 240)
        made.append(Training(runs, process, log, run_id, epochs))
        made[-1].wait_saved(2)
        return made[-1]

    yield starting
    for training in made:
        if training.process.poll() is None:
            runs.stack.command("trainyard", "cancel", training.run_id)
    for process in processes:
        process.kill()
        process.wait()


def resumed_after(log: str) -> list[int]:
    return [int(epoch) for epoch in RESUMED.findall(log)]


def expect_little_lost(log: str) -> None:
    """A pod that is given time saves: of the epochs that were finished none was trained twice, but for one at most."""
    trained = [int(epoch) for epoch in EPOCH.findall(log)]
    assert len(trained) - len(set(trained)) <= 1, trained


def delete_pod(runs: KubernetesRuns, name: str) -> None:
    runs.cluster.kubectl("delete", "pod", name, "--namespace", runs.namespace, "--wait=false")


def evict_pod(runs: KubernetesRuns, name: str) -> None:
    """As `kubectl drain` does it."""
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": runs.namespace}}
    path = f"/api/v1/namespaces/{runs.namespace}/pods/{name}/eviction"
    runs.cluster.kubectl("create", "--raw", path, "--filename", "-", stdin=json.dumps(body))


@pytest.mark.parametrize("take_away", [delete_pod, pytest.param(evict_pod, marks=pytest.mark.full)])
def test_a_pod_that_is_taken_away_is_followed_by_one_that_goes_on(runs: KubernetesRuns, start: Any, take_away: Any) -> None:
    training = start(epochs=30)
    first = training.pod()["metadata"]
    take_away(runs, first["name"])
    assert training.end() == ExitCode.OK, training.told
    training.expect_whole()
    log = runs.log(training.run_id)
    expect_little_lost(log)
    assert len(resumed_after(log)) == 1
    assert first["name"] not in {pod["metadata"]["name"] for pod in runs.pods(training.run_id) if pod["status"]["phase"] == "Succeeded"}
    owner = runs.attempt(training.run_id, 1, AttemptLayout.OWNER)
    assert (owner["generation"], owner["node"]) == (2, "localhost")


def lose_machine(runs: KubernetesRuns, training: Training) -> list[int]:
    """Nobody gets a word in. The epochs that were finished by then."""
    pod = training.pod()["metadata"]
    runs.cluster.stop_kubelet()
    assert runs.cluster.kill_pod(runs.namespace, pod["name"])
    return training.epochs_on_disk(pod["uid"])


def wait_until_given_up(runs: KubernetesRuns, run_id: str, pod: str) -> None:
    """By the cluster itself, which waits a minute for a Node object to come back."""
    wait_for("the pod to be given up", lambda: pod not in {one["metadata"]["name"] for one in runs.pods(run_id)}, 150)


@pytest.mark.full
@pytest.mark.parametrize("back", ["at once", "when its pods were given up"])
def test_a_machine_that_is_gone_costs_one_epoch_at_most(runs: KubernetesRuns, start: Any, back: str) -> None:
    """One that is back at once tells that the container was killed, which may be its own fault: a new attempt goes on, by a new Job.

    Its epochs take seconds, as an upload does on a machine under load: an epoch of a quarter of one is over before the last one has come.
    """
    training = start(15, "--image-size", "320")
    first = training.pod()["metadata"]["name"]
    try:
        done = lose_machine(runs, training)
        runs.cluster.delete_node()
        if back != "at once":
            wait_until_given_up(runs, training.run_id, first)
    finally:
        runs.cluster.start_kubelet()
    assert training.end() == ExitCode.OK, training.told
    attempts = 2 if back == "at once" else 1
    training.expect_whole(attempts)
    [resumed] = resumed_after(runs.log(training.run_id, attempts))
    assert 0 <= done[-1] - resumed <= 1


@pytest.mark.full
def test_a_container_that_lives_on_unseen_is_fenced_and_the_model_is_the_others(runs: KubernetesRuns, start: Any) -> None:
    """Its machine is cut off from the cluster, and not from the bucket."""
    cluster, training = runs.cluster, start(epochs=400)
    pod = training.pod()
    old, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
    old_code = partial(exit_code, cluster.place, pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://"))
    cluster.stop_kubelet()
    try:
        cluster.delete_node()
        before = training.saved()
        wait_until_given_up(runs, training.run_id, old)
        assert old_code() is None
        assert training.saved() > before
    except BaseException:
        cluster.start_kubelet()
        raise
    with another_machine(cluster):
        code = wait_for("the old container to end", lambda: (found := old_code()) is not None and (found,), 120)
        new = training.pod()["metadata"]["name"]
        assert code == (ExitCode.SUPERSEDED,)
        assert f"another container ({new} on localhost) has had this attempt since" in output(cluster.place, uid)
        assert training.end(1200) == ExitCode.OK, training.told
        training.expect_whole()
        owner = runs.attempt(training.run_id, 1, AttemptLayout.OWNER)
        assert (owner["generation"], owner["pod"]) == (2, new)
        assert runs.attempt(training.run_id, 1, AttemptLayout.EXIT)["exit_code"] == ExitCode.OK


@pytest.mark.full
def test_cancelled_in_the_middle_no_pod_is_left_and_the_receipt_tells_the_cost(runs: KubernetesRuns, start: Any) -> None:
    began = time.monotonic()
    training = start(epochs=2000)
    done = runs.stack.command("trainyard", "cancel", training.run_id, "--why", "a test", "--json")
    assert done.returncode == ExitCode.OK, done.stdout + done.stderr
    held = time.monotonic() - began
    assert training.end(120) == ExitCode.CANCELLED, training.told
    receipt = runs.attempt(training.run_id, 1, AttemptLayout.RECEIPT)
    assert (receipt["state"], receipt["why"], receipt["native_id"]) == ("cancelled", "a test", job_names(training.run_id)[0])
    assert receipt["ended_at"] >= receipt["asked_at"]
    assert 0 < receipt["cost_usd"] < held / 3600 * HOURLY_USD + 0.0001
    told = json.loads(runs.stack.command("trainyard", "status", training.run_id, "--json").stdout)
    assert (told["state"], told["cost_usd"]) == ("cancelled", receipt["cost_usd"])
    outcome = runs.attempt(training.run_id, 1, AttemptLayout.OUTCOME)
    assert (outcome["result"]["outcome"], outcome["epoch"]) == ("partial", training.saved())
    wait_for("no pod to be left", lambda: not runs.pods(training.run_id), 30)
    assert runs.jobs(training.run_id) == []
