"""The pods of one Job without a cluster: containers of one attempt as processes, each with a disk of its own, and the bucket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.fit_rig import make_attempt, make_dataset
from tests.stack import wait_for
from trainer.contract import AttemptLayout, ExitRecord, Progress, ResultManifest, TrainJob
from trainer.fencing import Owner
from trainer.progress import read_lines
from trainer.storage import ObjectFolder

ROOT = Path(__file__).parents[1]
# As a pod with a read-only root file system, a user that nobody knows, and what shared memory a container has by default. The one
# capability is for Python itself, which lies in a home on some machines.
STRICT = """
mount -t tmpfs -o size=64m tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs "$TMPDIR"
mount -o remount,bind,ro /
exec setpriv --reuid 54321 --regid 54321 --clear-groups --inh-caps +dac_read_search --ambient-caps +dac_read_search "$@"
"""
STRICT_COMMAND = ("unshare", "--mount", "sh", "-euc", STRICT, "sh")


@dataclass
class Pod:
    """One container: the supervisor as its first process. What it says is in a file."""

    process: subprocess.Popen[bytes]
    scratch: Path
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait(self, seconds: float = 240) -> int:
        return self.process.wait(seconds)

    def processes(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        return []

    def evict(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def freeze(self) -> None:
        for process in self.processes():
            process.suspend()

    def thaw(self) -> None:
        for process in self.processes():
            process.resume()

    def lose(self) -> None:
        """The node goes away: nobody gets a word in."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def attempt(self, number: int = 1) -> AttemptLayout:
        return AttemptLayout(next(self.scratch.glob("trainyard-*")) / "run/attempts" / str(number))

    def progress(self) -> str:
        return "".join(path.read_text() for path in self.scratch.glob(f"trainyard-*/run/attempts/*/{AttemptLayout.PROGRESS}"))

    def epochs(self) -> list[int]:
        """Finished on this disk."""
        return [line.epoch for line in read_lines(self.attempt() / AttemptLayout.PROGRESS_LINES)]


@dataclass
class PodJob:
    """A Job's attempt, and the pods that it got one after another."""

    base: Path
    uri: str
    environment: dict[str, str]
    job: TrainJob
    pods: list[Pod] = field(default_factory=list[Pod])

    @property
    def run(self) -> ObjectFolder:
        return ObjectFolder(f"{self.uri}/run")

    @property
    def attempt(self) -> ObjectFolder:
        return self.run.child(f"attempts/{self.job.attempt}")

    def start(self, *arguments: str, strict: bool = False, **variables: str) -> Pod:
        number = len(self.pods) + 1
        scratch = self.base / f"disk-{number}"
        scratch.mkdir()
        log = self.base / f"pod-{number}.log"
        named = {"TRAINYARD_POD": f"job-{number}", "TRAINYARD_NODE": f"node-{number}", "TRAINYARD_PLATFORM": "kubernetes"}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TRAINYARD_") and name != "HOME"}
        config = f"{self.uri}/run/attempts/{self.job.attempt}/{AttemptLayout.CONFIG}"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*(STRICT_COMMAND if strict else ()), sys.executable, "-P", "-m", "trainer", "--config", config, *arguments],
                env={**kept, **self.environment, **named, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT), **variables},
                stdout=out,
                stderr=out,
            )
        self.pods.append(Pod(process, scratch, log))
        return self.pods[-1]

    def wait_for(self, what: str, condition: Callable[[], Any], seconds: float = 240) -> Any:
        """While the newest pod lives."""

        def alive() -> Any:
            found = condition()
            assert found or self.pods[-1].process.poll() is None, self.pods[-1].output
            return found

        return wait_for(what, alive, seconds, 0.1)

    def saved(self) -> int:
        """The epoch of the newest checkpoint in the bucket that has its record."""
        names = [name for name in self.attempt.names(AttemptLayout.CHECKPOINTS) if name.endswith(".json")]
        return max((int(name[len("epoch-") :].removesuffix(".json")) for name in names), default=0)

    def wait_saved(self, epoch: int) -> int:
        return self.wait_for(f"the checkpoint of epoch {epoch}", lambda: (found := self.saved()) >= epoch and found)

    def end(self) -> ExitRecord:
        return ExitRecord.model_validate_json(self.attempt.get(AttemptLayout.EXIT) or b"")

    def owner(self) -> Owner:
        return Owner.from_json(self.attempt.get(AttemptLayout.OWNER) or b"")

    def log(self) -> str:
        return (self.attempt.get(AttemptLayout.LOG) or b"").decode()

    def lines(self) -> list[Progress]:
        text = (self.attempt.get(AttemptLayout.PROGRESS_LINES) or b"").decode()
        return [Progress.model_validate_json(line) for line in text.splitlines()]

    def verified(self) -> ResultManifest:
        """The result in the bucket, every file compared."""
        manifest = ResultManifest.model_validate_json(self.attempt.get(AttemptLayout.MANIFEST) or b"")
        assert {name: self.attempt.sha256(name) for name in manifest.files} == {name: file.sha256 for name, file in manifest.files.items()}
        return manifest

    def objects(self) -> dict[str, str | None]:
        names = ["", AttemptLayout.CHECKPOINTS, "model", AttemptLayout.SAMPLES, AttemptLayout.LOGS]
        paths = [f"{folder}/{name}".lstrip("/") for folder in names for name in self.attempt.names(folder)]
        return {path: digest for path in paths if (digest := self.attempt.sha256(path))}

    def clean_up(self) -> None:
        for pod in self.pods:
            pod.thaw()
            pod.lose()


def make_job(base: Path, uri: str, environment: dict[str, str], *, train: int = 48, **config: Any) -> PodJob:
    """A job whose config lies in its record, in the bucket; the dataset is mounted."""
    layout = make_attempt(base / "made", data=make_dataset(base / "made/data", train=train), **config)
    job = TrainJob.model_validate_json((layout / AttemptLayout.CONFIG).read_bytes())
    made = PodJob(base, uri, environment, job.model_copy(update={"output_uri": f"{uri}/run"}))
    made.attempt.put(AttemptLayout.CONFIG, made.job.model_dump_json().encode())
    return made
