"""What orchestration costs: the flow `train`, from entry to return, beside the same training called directly.

    uv run python -m tests.benchmarks.bench_overhead [--pairs 5] [--epochs 25]

Starts a Prefect server of its own, then runs interleaved pairs, each run in a fresh process. Imports are excluded on
both sides: the direct run imports the framework before its clock starts; of the flow's time, the seconds that the
trainer's process spent importing are taken off. Limit: 3 s + 2 % (median difference). Exits with 1 above it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.stack import Stack, running_stack
from trainer.shapes import write_shapes

DIRECT = """
import json, sys, time
from pathlib import Path
import torch, ultralytics, ultralytics.models.yolo.detect
from blocks.job import JobSpec
from blocks.providers.local_process import LocalProvider, LocalSettings, build_job
from blocks.record import RunRecord
from trainer.contract import AttemptLayout, DatasetRef, TrainConfig
from trainer.dataset import check_dataset
from trainer.files import write_json
from trainer.task import fit
request = json.loads(sys.argv[1])
config = TrainConfig.model_validate(request["config"])
run_id = request["run_id"]
started = time.perf_counter()
record = RunRecord(request["output"], run_id)
index = check_dataset(Path(request["dataset"]))
uri = record.write_dataset(index)
dataset = DatasetRef(root=index.root, index_uri=uri, version=index.version, name=index.name, image_count=len(index.images))
spec = JobSpec(run_id=run_id, name="direct", config=config, dataset=dataset, output_uri=record.output_uri, max_runtime_seconds=3600)
attempt = AttemptLayout(Path(request["output"]) / run_id / "attempts" / "1")
write_json(attempt / AttemptLayout.CONFIG, build_job(LocalProvider(LocalSettings()).plan(spec)))
fit(attempt)
print(json.dumps({"seconds": time.perf_counter() - started}))
"""
FLOW = """
import json, sys, time
from pathlib import Path
from flows import prefect_settings
prefect_settings.apply_defaults()
from flows.train import train
from trainer.contract import TrainConfig
from trainer.storage import to_path
request = json.loads(sys.argv[1])
config = TrainConfig.model_validate(request["config"])
started = time.perf_counter()
summary = train(dataset=request["dataset"], config=config, output=request["output"], run_id=request["run_id"])
seconds = time.perf_counter() - started
ended = json.loads((to_path(summary["manifest_uri"]).parent / "exit.json").read_text())
print(json.dumps({"seconds": seconds - ended["phase_seconds"]["importing"], "importing": ended["phase_seconds"]["importing"]}))
"""
CONFIG = {"model": "yolo11-pico", "batch_size": 8, "image_size": 96, "learning_rate": 0.008, "workers": 0, "device": "cpu"}


def measure(stack: Stack, script: str, number: int, kind: str, dataset: Path, epochs: int) -> float:
    request = {
        "dataset": str(dataset),
        "output": str(stack.folder / "runs"),
        "run_id": f"{kind}{number:04}",
        "config": CONFIG | {"epochs": epochs, "model_params": {"mosaic": 0.0, "warmup_epochs": 0.5}},
    }
    ran = subprocess.run(
        [sys.executable, "-P", "-c", script, json.dumps(request)], env=stack.environment, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{kind} run failed:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    return json.loads(ran.stdout.splitlines()[-1])["seconds"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=25)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, running_stack(Path(name)) as stack:
        dataset = write_shapes(stack.folder / "shapes")
        pairs = [
            (
                measure(stack, DIRECT, number, "direct", dataset, options.epochs),
                measure(stack, FLOW, number, "flow", dataset, options.epochs),
            )
            for number in range(options.pairs)
        ]
    return report(pairs)


def report(pairs: list[tuple[float, float]]) -> int:
    print("pair   direct s   flow s   difference s")
    for number, (direct, flow) in enumerate(pairs):
        print(f"{number:4} {direct:10.1f} {flow:8.1f} {flow - direct:14.2f}")
    direct = statistics.median(pair[0] for pair in pairs)
    difference = statistics.median(flow - plain for plain, flow in pairs)
    limit = 3.0 + 0.02 * direct
    print(f"median direct {direct:.1f} s, difference {difference:.2f} s (x{1 + difference / direct:.3f}), limit {limit:.2f} s")
    return int(difference > limit)


if __name__ == "__main__":
    raise SystemExit(main())
