"""Runs of which nothing lies on this machine: record, data and results are in a bucket, and the job is in a container's place."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest

from tests.e2e.test_command_line import TINY, told
from tests.stack import REPOSITORY, Stack, stop, wait_for
from tests.stores import CLOUD_PREFIXES, RunsBucket, StoreServer, s3, s3_client
from trainer.contract import ExitCode

__all__ = ["s3"]

pytestmark = pytest.mark.e2e


@dataclass
class Remote(RunsBucket):
    """The stack's server, a bucket that only the saved credentials open, and a cluster whose jobs have an identity of their own."""

    stack: Stack
    cluster: Path

    def command(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tests.remote", *arguments],
            cwd=REPOSITORY,
            env=self.stack.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def spawn(self, *arguments: str, log: str) -> subprocess.Popen[bytes]:
        with (self.stack.folder / log).open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.remote", *arguments],
                cwd=REPOSITORY,
                env=self.stack.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def jobs(self, run_id: str) -> list[str]:
        return sorted(path.stem for path in self.cluster.glob("*.json") if run_id in path.stem)

    def wait_until_training(self, run_id: str) -> None:
        wait_for(f"run {run_id} trains", lambda: self.objects(f"runs/{run_id}/attempts/1/progress.jsonl"), 180)


@pytest.fixture(scope="module")
def remote(stack: Stack, s3: StoreServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    folder = tmp_path_factory.mktemp("remote")
    cluster = folder / "cluster"
    cluster.mkdir()
    (cluster / "identity").write_text(json.dumps(s3.environment))
    environment = {name: value for name, value in stack.environment.items() if not name.startswith(CLOUD_PREFIXES)}
    environment |= {"TRAINYARD_HOME": str(folder / "home"), "SECRET": "made-up-51c0"}
    own = replace(stack, environment=environment, folder=folder, workers=[])
    made = Remote(s3.make_bucket(), s3_client(s3.address), own, cluster)
    fields = (f"store={made.bucket}/data", f"output={made.bucket}/runs", f"store_endpoint={s3.address}", f"cluster={cluster}")
    saved = made.command("save-profile", "remote", *fields, "key=AKIDOFTHEBLOCK")
    assert saved.returncode == 0, saved.stderr
    yield made
    for run_id in made.run_ids():
        made.command("cancel", run_id)


def train(remote: Remote, shapes: Path, *arguments: str) -> dict[str, Any]:
    done = remote.command("train", str(shapes), "--profile", "remote", *TINY, *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_a_run_whose_record_is_in_a_bucket(remote: Remote, shapes: Path) -> None:
    checked = remote.command("check", "remote")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{remote.bucket}/runs can be written and read" in checked.stdout
    planned = remote.command("plan", str(shapes), "--profile", "remote", *TINY, "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert (plan["provider"], plan["spec"]["output_uri"]) == ("remote", f"{remote.bucket}/runs")
    assert plan["spec"]["dataset"]["store_uri"] == f"{remote.bucket}/data"
    assert not remote.run_ids()

    row = train(remote, shapes, "--epochs", "2")
    run_id, record = row["run_id"], f"runs/{row['run_id']}"
    assert row["state"] == "succeeded"
    assert row["model_uri"] == f"{remote.bucket}/{record}/attempts/1/model/model.pt"
    assert remote.jobs(run_id) == [f"ty-{run_id}-1"]
    assert f"`{row['model_uri']}`" in remote.read(f"{record}/report.md").decode()
    assert remote.json(f"{record}/attempts/1/outcome.json")["state"] == "succeeded"
    assert not remote.objects(f"{record}/drivers/")
    assert not remote.objects("runs/.driven/")
    assert not list(Path(remote.stack.environment["TRAINYARD_HOME"]).glob("runs/*")), "nothing of it is here"

    log = remote.command("logs", run_id)
    assert len(log.stdout.splitlines()) == len(remote.read(f"{record}/attempts/1/logs/trainer.log").splitlines())
    assert "done: " in log.stdout
    status = remote.command("status", run_id, "--json")
    assert json.loads(status.stdout)["metrics"] == row["metrics"]
    listed = json.loads(remote.command("runs", "--json").stdout)
    assert [(one["run_id"], one["provider"], one["state"]) for one in listed] == [(run_id, "remote", "succeeded")]


def test_another_machine_finds_the_runs_and_brings_a_model(remote: Remote, shapes: Path, tmp_path: Path) -> None:
    row = train(remote, shapes, "--epochs", "1", "--name", "brought")
    elsewhere = replace(remote, stack=replace(remote.stack, environment={**remote.stack.environment, "TRAINYARD_HOME": str(tmp_path)}))
    unknown = elsewhere.command("collect", row["run_id"])
    assert unknown.returncode == ExitCode.NOT_FOUND
    assert "runs --profile" in told(unknown)
    listed = json.loads(elsewhere.command("runs", "--profile", "remote", "--name", "brought", "--json").stdout)
    assert [one["run_id"] for one in listed] == [row["run_id"]]

    place = tmp_path / "models"
    brought = elsewhere.command("collect", row["run_id"], "--to", str(place), "--json")
    assert brought.returncode == 0, brought.stderr
    manifest = remote.json(f"runs/{row['run_id']}/attempts/1/manifest.json")
    for name, file in manifest["files"].items():
        assert (place / name).stat().st_size == file["bytes"]
    assert json.loads(brought.stdout)["model"] == str(place / "model/model.pt")
    (place / "model/model.pt").write_bytes(b"cut")
    assert elsewhere.command("collect", row["run_id"], "--to", str(place)).returncode == 0
    assert (place / "model/model.pt").stat().st_size == manifest["files"]["model/model.pt"]["bytes"]
    remote.client.put_object(
        Bucket=urlsplit(remote.bucket).netloc, Key=f"runs/{row['run_id']}/attempts/1/model/model.pt", Body=b"somebody's"
    )
    refused = elsewhere.command("collect", row["run_id"], "--to", str(tmp_path / "other"))
    assert refused.returncode == ExitCode.RESULT_MISSING
    assert "model/model.pt in the store is not the file that is wanted" in told(refused)


def test_cancelled_while_it_is_watched(remote: Remote, shapes: Path) -> None:
    before = remote.run_ids()
    training = remote.spawn("train", str(shapes), "--profile", "remote", *TINY, "--epochs", "500", "--new", log="cancelled.log")
    [run_id] = wait_for("the run's record", lambda: remote.run_ids() - before, 120)
    remote.wait_until_training(run_id)
    cancelled = remote.command("cancel", run_id, "--why", "a test", "--json")
    assert cancelled.returncode in (ExitCode.OK, ExitCode.UNAVAILABLE), (
        cancelled.stdout + cancelled.stderr
    )  # on a busy machine it takes longer
    assert training.wait(120) == ExitCode.CANCELLED
    assert json.loads(remote.command("status", run_id, "--json").stdout)["state"] == "cancelled"
    record = f"runs/{run_id}"
    assert remote.json(f"{record}/attempts/1/receipt.json")["why"] == "a test"
    assert remote.json(f"{record}/attempts/1/outcome.json")["result"]["outcome"] == "partial"
    assert remote.jobs(run_id) == [f"ty-{run_id}-1"]


@pytest.mark.full
def test_the_flow_is_killed_and_the_command_goes_on(remote: Remote, shapes: Path) -> None:
    before = remote.run_ids()
    arguments = ("train", str(shapes), "--profile", "remote", *TINY, "--epochs", "30", "--seed", str(uuid4().int % 1000))
    first = remote.spawn(*arguments, log="killed.log")
    [run_id] = wait_for("the run's record", lambda: remote.run_ids() - before, 120)
    remote.wait_until_training(run_id)
    stop(first)
    assert remote.objects(f"runs/{run_id}/drivers/")
    assert list(remote.objects("runs/.driven/")) == [f"runs/.driven/{run_id}"]
    again = remote.command(*arguments, "--json")
    assert again.returncode == 0, again.stderr
    assert f"attaches to the open run {run_id}" in " ".join(again.stderr.split())
    assert json.loads(again.stdout)["run_id"] == run_id
    assert remote.jobs(run_id) == [f"ty-{run_id}-1"]
    assert remote.run_ids() - before == {run_id}


@pytest.mark.full
def test_a_lost_pod_is_replaced_and_cleaned_away_at_the_end(remote: Remote, shapes: Path) -> None:
    import psutil

    before = remote.run_ids()
    training = remote.spawn("train", str(shapes), "--profile", "remote", *TINY, "--epochs", "40", "--new", log="lost.log")
    [run_id] = wait_for("the run's record", lambda: remote.run_ids() - before, 120)
    remote.wait_until_training(run_id)
    wait_for("a checkpoint", lambda: remote.objects(f"runs/{run_id}/attempts/1/checkpoints/epoch-"), 60)
    for process in [one for one in psutil.process_iter(["cmdline"]) if run_id in " ".join(one.info["cmdline"] or [])]:
        process.kill()
    assert training.wait(180) == 0, (remote.stack.folder / "lost.log").read_text()
    epochs = [
        [json.loads(line)["epoch"] for line in remote.read(f"runs/{run_id}/attempts/{number}/progress.jsonl").splitlines()]
        for number in (1, 2)
    ]
    assert epochs[1][0] > 1, "it went on from the checkpoint"
    assert epochs[1][-1] == 40
    assert remote.jobs(run_id) == [f"ty-{run_id}-1", f"ty-{run_id}-2"]

    pruned = remote.command("runs", "prune", "--yes")
    assert pruned.returncode == 0, pruned.stderr
    assert not [key for key in remote.objects(f"runs/{run_id}/") if "/checkpoints/" in key]
    assert remote.objects(f"runs/{run_id}/attempts/2/model/model.pt")
    removed = remote.command("runs", "rm", run_id, "--yes")
    assert removed.returncode == 0, removed.stderr
    assert not remote.objects(f"runs/{run_id}/")


def test_a_bucket_that_does_not_answer_hides_no_other(remote: Remote, shapes: Path, tmp_path: Path) -> None:
    [run_id, *_] = sorted(remote.run_ids())
    (Path(remote.stack.environment["TRAINYARD_HOME"]) / "outputs/gone").write_text(
        json.dumps({"uri": "s3://gone/runs", "endpoint": "http://127.0.0.1:9", "credentials": None})
    )
    listed = remote.command("runs", "--json")
    assert listed.returncode == 0, listed.stderr
    assert run_id in {one["run_id"] for one in json.loads(listed.stdout)}
    assert "not looked at: s3://gone/runs" in listed.stderr
    status = remote.command("status", run_id)
    assert status.returncode == 0, status.stderr
    missing = remote.command("status", "zzzz")
    assert missing.returncode == ExitCode.UNAVAILABLE
    assert "s3://gone/runs was not looked at" in told(missing)


def test_no_secret_is_written_and_what_is_local_is_refused(remote: Remote, shapes: Path, tmp_path: Path) -> None:
    home = Path(remote.stack.environment["TRAINYARD_HOME"])
    texts = [path.read_bytes() for path in home.rglob("*") if path.is_file()]
    texts += [remote.read(key) for key in remote.objects("runs/") if key.endswith(".json")]
    assert len(texts) > 20
    assert not [text for text in texts if b"made-up-51c0" in text]
    weights = tmp_path / "mine.pt"
    weights.touch()
    refused = remote.command("plan", str(shapes), "--profile", "remote", "--weights", str(weights), *TINY)
    assert refused.returncode == ExitCode.CONFIG
    assert "is on this machine, out of reach of remote" in told(refused)
    folder = remote.command("plan", str(shapes), "--profile", "remote", "--output", str(tmp_path), *TINY)
    assert folder.returncode == ExitCode.CONFIG
    assert "the job runs elsewhere" in told(folder)
