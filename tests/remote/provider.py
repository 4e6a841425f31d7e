"""A provider whose jobs share nothing with the flow but a bucket: the real trainer, in container mode, as processes of this machine.

A folder stands in for the cluster's API: a job is a file in it, made once. It takes the place that a cloud has in production,
so that the flow is tested whole where no cloud is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import psutil
from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, JsonValue

from blocks import load_provider
from blocks.attempt_objects import PHASE_STATES, build_container_job, parse_exit, read_exit, read_log, read_progress, write_job
from blocks.errors import JobNotFound
from blocks.job import Capabilities, CheckReport, FailureReason, JobRef, JobSpec, JobState, JobStatus, LogBatch, Plan
from blocks.naming import job_name
from blocks.profiles import Profile
from blocks.provider import AlreadyExists, Provider
from blocks.store_check import check_store
from trainer.contract import AttemptLayout, UserInput

ROOT = Path(__file__).parents[2]
# As a kubelet: starts the container, and keeps its process id and its exit code.
KUBELET = 'echo $$ > "$0.kubelet"; "$@" & echo $! > "$0.pid"; wait $!; echo $? > "$0.exit"'
NOBODYS_CHILD = ("sh", "-c", '"$@" &', "sh")


class RemoteSettings(UserInput):
    cluster: Path


class RemoteProvider(Provider[RemoteSettings]):
    NAME: ClassVar[str] = "remote"
    SETTINGS: ClassVar[type[UserInput]] = RemoteSettings
    CAPABILITIES: ClassVar[Capabilities] = Capabilities(
        spot=False, nodes=1, needs_image=False, max_runtime_seconds=86_400, poll_seconds=(0.5, 2.0)
    )

    def check(self, output_uri: str = "") -> CheckReport:
        return CheckReport(provider=self.NAME, lines=(check_store(self.objects(output_uri)),))

    def poll(self, ref: JobRef) -> JobStatus:
        job = self._job(ref.native_id)
        if not job.exists():
            raise JobNotFound(f"there is no job {ref.native_id}", provider=self.NAME, run_id=ref.run_id)
        # Its life before its end, and that before what it left: what is asked later is then all there.
        alive = self._is_alive(job)
        ended = job.with_suffix(".exit").exists()
        objects = self.objects(ref.output_uri)
        progress, cancelled = read_progress(objects), job.with_suffix(".cancelled").exists()
        if ended:
            record = read_exit(objects)
            if record is not None:
                status = parse_exit(record, progress)
                return status.model_copy(update={"state": JobState.CANCELLED}) if cancelled and record.exit_code else status
        if ended or not alive:
            reason = FailureReason.INFRASTRUCTURE
            return JobStatus(state=JobState.FAILED, native_state="gone", reason=reason, message="its pod is gone", progress=progress)
        state = JobState.STOPPING if cancelled else PHASE_STATES[progress.phase] if progress else JobState.STARTING
        return JobStatus(state=state, native_state="Running", progress=progress, started_at=ref.submitted_at)

    def list_jobs(self) -> Iterator[tuple[JobRef, JobStatus]]:
        for path in sorted(self.settings.cluster.glob("*.json")):
            ref = JobRef.model_validate_json(path.read_bytes())
            yield ref, self.poll(ref)

    def logs(self, ref: JobRef, cursor: str = "") -> LogBatch:
        ended = self.poll(ref).state.is_terminal
        return read_log(self.objects(ref.output_uri), cursor, ended=ended)

    def cancel(self, ref: JobRef) -> None:
        job = self._job(ref.native_id)
        if job.exists() and not job.with_suffix(".exit").exists():
            job.with_suffix(".cancelled").touch()
            with suppress(FileNotFoundError, ProcessLookupError):
                os.kill(int(job.with_suffix(".pid").read_text()), signal.SIGTERM)

    def _build(self, spec: JobSpec) -> tuple[dict[str, JsonValue], str, str]:
        job = build_container_job(spec).model_dump(mode="json", exclude={"fingerprint"})
        return {"job": job, "endpoint": spec.output_endpoint, "max_runtime_seconds": spec.max_runtime_seconds}, "process", "here"

    def _find(self, plan: Plan) -> JobRef | None:
        job = self._job(job_name(plan.spec.run_id, plan.spec.attempt))
        return JobRef.model_validate_json(job.read_bytes()) if job.exists() else None

    def _create(self, plan: Plan) -> JobRef:
        spec = plan.spec
        write_job(self.objects(spec.attempt_uri), build_container_job(spec, plan.fingerprint))
        name = job_name(spec.run_id, spec.attempt)
        ref = JobRef(
            provider=self.NAME,
            native_id=name,
            run_id=spec.run_id,
            attempt=spec.attempt,
            output_uri=spec.attempt_uri,
            fingerprint=plan.fingerprint,
        )
        job = self._job(name)
        made = job.with_suffix(f".{os.getpid()}.new")
        made.write_text(ref.model_dump_json())
        try:
            os.link(made, job)
        except FileExistsError as exc:
            raise AlreadyExists(name) from exc
        finally:
            made.unlink()
        self.start(job, plan)
        return ref

    def start(self, job: Path, plan: Plan) -> None:
        identity: dict[str, str] = json.loads((self.settings.cluster / "identity").read_text())
        hidden = ("AWS_", "AZURE_", "PREFECT_", "TRAINYARD_", "PYTHON")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        endpoint = {"AWS_ENDPOINT_URL": plan.spec.output_endpoint} if plan.spec.output_endpoint else {}
        scratch = job.with_suffix(".scratch")
        scratch.mkdir()
        trainer = [
            *(sys.executable, "-P", "-m", "trainer", "train"),
            *("--config", f"{plan.spec.attempt_uri}/{AttemptLayout.CONFIG}"),
            *("--max-runtime-seconds", str(plan.spec.max_runtime_seconds)),
        ]
        with job.with_suffix(".log").open("ab") as output:
            subprocess.run(
                [*NOBODYS_CHILD, "sh", "-c", KUBELET, str(job.with_suffix("")), *trainer],
                cwd=scratch,
                env={**environment, **identity, **endpoint, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "HOME": str(scratch)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                check=True,
            )

    def _job(self, name: str) -> Path:
        return self.settings.cluster / f"{name}.json"

    @staticmethod
    def _is_alive(job: Path) -> bool:
        """Not yet started counts as alive."""
        try:
            process = psutil.Process(int(job.with_suffix(".kubelet").read_text()))
            return process.status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, ValueError):
            return True
        except psutil.NoSuchProcess:
            return False


class RemoteProfile(Profile, Block):
    """Train where nothing but the bucket is shared."""

    _block_type_slug = "trainyard-remote-test"
    model_config = ConfigDict(extra="forbid")

    cluster: str = Field(min_length=1)

    def provider(self) -> Provider[Any]:
        return load_provider("remote", {"cluster": self.cluster}, self.access)
