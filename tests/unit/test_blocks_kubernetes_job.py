"""When a Job that was told to stop is removed: by a cluster that is a dict, since only what is asked of it matters here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blocks.job import JobRef
from blocks.providers.kubernetes_client import Cluster
from blocks.providers.kubernetes_job import KubernetesProvider
from tests.unit.test_blocks_kubernetes_status import job
from trainer.contract import AttemptLayout


@pytest.mark.parametrize("proof", [AttemptLayout.RECEIPT, AttemptLayout.OUTCOME])
def test_a_job_that_was_told_to_stop_goes_once_its_end_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proof: str) -> None:
    """One that is suspended never finishes, so that no time to live removes it."""
    path = "/apis/batch/v1/namespaces/n/jobs/ty-r-1"
    objects = {path: job(("Suspended", "JobSuspended"), suspend=True, cancelled=True), "/api/v1/namespaces/n/pods": {"items": []}}

    def call(_: Cluster, method: str, path: str, **_options: Any) -> Any:
        return {"GET": objects.get, "DELETE": objects.pop}[method](path)

    monkeypatch.setattr(Cluster, "call", call)
    provider = KubernetesProvider.from_settings({"namespace": "n"})
    ref = JobRef(provider="kubernetes", native_id="ty-r-1", run_id="r", attempt=1, scope="n", output_uri=tmp_path.as_uri(), fingerprint="f")
    provider.cancel(ref)
    assert path in objects, "whoever watches it has not read it yet"
    provider.objects(ref.output_uri).put(proof, b"{}")
    provider.cancel(ref)
    assert path not in objects
