"""`docker build` with BuildKit: its command, its progress, what its failure means. By command, since docker's SDK has no BuildKit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blocks.errors import ConfigError, ProviderError, QuotaError, ServiceUnavailable, TerminalError
from blocks.image_source import DOCKERFILE, BuildInput, declared_arguments, find_revision
from trainer.contract_version import CONTRACT_VERSION
from trainer.errors import ExitCode

LABEL_SOURCE = "io.trainyard.source-hash"
LABEL_CONTRACT = "io.trainyard.contract-version"
LABEL_VERSION = "org.opencontainers.image.version"
LABEL_REVISION = "org.opencontainers.image.revision"
STEP = re.compile(r"#\d+ \[(?:(?P<stage>\S+) +)?(?P<number>\d+)/(?P<count>\d+)\] (?P<what>.+)")
USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
KEPT_LINES = 400
NO_NETWORK = ("temporary failure in name resolution", "connection refused", "network is unreachable", "network bridge not found")
SHOWN_LINES = 12
SHOWN_WIDTH = 300
LAST_WORDS = ("error: ", "failed to solve", "executor failed running")  # of newer and older BuildKit
DAEMON_HINT = "start Docker (Docker Desktop, or: sudo systemctl start docker), or point DOCKER_HOST at one that runs"
INSTALL_HINT = "install Docker Engine with buildx, or build elsewhere and name the image's digest in the profile"


@dataclass(frozen=True)
class BuildStep:
    """What the build does now, step `number` of `count` of a stage."""

    number: int
    count: int
    what: str
    stage: str = ""


OnStep = Callable[[BuildStep, float], None]


def image_labels(source_hash: str, revision: str = "") -> dict[str, str]:
    """Not in the hash, and no layer is made of them: that they change costs nothing."""
    import importlib.metadata

    version = importlib.metadata.version("trainyard")
    labels = {LABEL_SOURCE: source_hash, LABEL_CONTRACT: str(CONTRACT_VERSION), LABEL_VERSION: version}
    return {**labels, LABEL_REVISION: revision} if revision else labels


def build_command(
    source: BuildInput,
    source_hash: str,
    name: str,
    id_file: Path,
    *,
    ca_bundle: str = "",
    network: str = "",
    revision: str = "",
    pull: bool = False,
) -> list[str]:
    """Pure but for the Dockerfile, whose own label arguments are filled where it takes them."""
    command = ["docker", "build", "--file", str(source.root / DOCKERFILE), "--tag", name, "--iidfile", str(id_file)]
    command += ["--platform", source.platform, "--progress", "plain"]
    labels = image_labels(source_hash, revision)
    told = {"VERSION": labels[LABEL_VERSION], "SOURCE_HASH": source_hash, "CONTRACT_VERSION": labels[LABEL_CONTRACT], "REVISION": revision}
    declared = declared_arguments((source.root / DOCKERFILE).read_text())
    arguments = {**source.build_arguments(), **{key: value for key, value in told.items() if key in declared}}
    for key, value in sorted(arguments.items()):
        command += ["--build-arg", f"{key}={value}"]
    for key, value in labels.items():
        command += ["--label", f"{key}={value}"]
    if ca_bundle:
        command += ["--secret", f"id=ca,src={ca_bundle}"]
    if network:
        command += ["--network", network]
    if pull:
        command.append("--pull")
    return [*command, str(source.root)]


def host_ca_bundle() -> str:
    """Of a company whose proxy looks into TLS: the build's pip must trust it, too."""
    bundle = os.environ.get("SSL_CERT_FILE") or os.environ.get("REQUESTS_CA_BUNDLE") or ""
    if bundle and not Path(bundle).is_file():
        raise ConfigError(f"there is no CA bundle at {bundle}", hint="mend SSL_CERT_FILE (or REQUESTS_CA_BUNDLE), or unset it")
    return bundle


def parse_step(line: str) -> BuildStep | None:
    found = STEP.fullmatch(line.strip())
    return BuildStep(int(found["number"]), int(found["count"]), found["what"], found["stage"] or "") if found else None


def run_build(source: BuildInput, source_hash: str, name: str, on_step: OnStep, *, network: str = "", pull: bool = False) -> str:
    """Builds, and returns the image's id. Raises ConfigError with the last lines that matter where a step fails."""
    if shutil.which("docker") is None:
        raise TerminalError("docker is not installed here", hint=INSTALL_HINT, code=ExitCode.UNAVAILABLE)
    environment = {**os.environ, "DOCKER_BUILDKIT": "1", "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}  # one manifest, no index around it
    with tempfile.TemporaryDirectory() as folder:
        id_file = Path(folder) / "id"
        told = {"ca_bundle": host_ca_bundle(), "network": network, "revision": find_revision(source.root)}
        command = build_command(source, source_hash, name, id_file, **told, pull=pull)
        with subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process:
            try:
                lines = _follow(process, on_step)
            except BaseException:  # Ctrl-C, say: no build goes on behind us
                process.terminate()
                raise
        if process.returncode != 0:
            raise explain_build_failure(lines, source)
        return id_file.read_text().strip()


def _follow(process: subprocess.Popen[str], on_step: OnStep) -> list[str]:
    assert process.stdout is not None
    started = time.monotonic()
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    for line in process.stdout:
        lines.append(line.rstrip())
        if (step := parse_step(line)) is not None:
            on_step(step, time.monotonic() - started)
    process.wait()
    return list(lines)


def explain_build_failure(lines: Sequence[str], source: BuildInput) -> ProviderError:
    """By what docker and pip print: they have no codes for it."""
    text = "\n".join(lines)
    lower = text.lower()
    if "buildx component is missing" in lower or "buildkit is enabled but" in lower:
        return TerminalError(
            "this docker client has no BuildKit",
            hint="install its buildx plugin (package docker-buildx-plugin or docker-buildx), or use a client of Docker 20.10",
            code=ExitCode.UNAVAILABLE,
        )
    if "cannot connect to the docker daemon" in lower or "error during connect" in lower:
        return TerminalError("the Docker daemon does not run", hint=DAEMON_HINT, code=ExitCode.UNAVAILABLE)
    if "permission denied while trying to connect" in lower:
        return TerminalError(
            "this user may not use Docker", hint="join the group docker, or run Docker in rootless mode", code=ExitCode.PERMISSION
        )
    if "no space left on device" in lower:
        return QuotaError("docker has no disk space left for the build", hint="docker system prune, or a bigger disk; then build again")
    base = source.base or "the Dockerfile's base"
    if re.search(r"> \[internal\] load metadata for|failed to (?:resolve source metadata|load cache key)|pull access denied", lower):
        return ConfigError(
            f"the base image cannot be had: {base}\n{shown_lines(lines)}", hint="check its name and digest, and `docker login`"
        )
    if "do not match the hashes" in lower or "hashes are required" in lower:
        return ConfigError(
            f"a package is not the one that the requirements pin by hash\n{shown_lines(lines)}",
            hint="an index or proxy serves other files: use another, or renew docker/trainer-requirements.txt",
        )
    if "certificate_verify_failed" in lower or "certificate verify failed" in lower:
        return ConfigError(
            f"the build does not trust your network's certificate\n{shown_lines(lines)}",
            hint="set SSL_CERT_FILE to your network's CA bundle; it goes into the build as a secret, into no layer",
        )
    if any(word in lower for word in NO_NETWORK):
        return ServiceUnavailable(f"the build has no network\n{shown_lines(lines)}", hint="check the network, or build with --network host")
    return ConfigError(f"a step of the build failed\n{shown_lines(lines)}", hint="mend what it says, then build again")


def shown_lines(lines: Sequence[str]) -> str:
    """The last lines of the step that failed, as BuildKit repeats them at the end; a password in an address left out."""
    rules = [number for number, line in enumerate(lines) if line.strip() == "------"]
    kept = list(lines[rules[-2] + 1 : rules[-1]]) if len(rules) >= 2 else [line for line in lines if line.strip()]
    last = [line for line in lines if line.lower().startswith(LAST_WORDS)][-1:]
    chosen = [*kept[-SHOWN_LINES:], *(line for line in last if line not in kept[-SHOWN_LINES:])]
    return "\n".join(f"  {_shorten(USER_IN_URL.sub('***@', line))}" for line in chosen)


def _shorten(line: str) -> str:
    """Of a long line the end, too: first it repeats the command, then it says what is wrong."""
    return line if len(line) <= SHOWN_WIDTH else f"{line[: SHOWN_WIDTH // 2]} ... {line[-SHOWN_WIDTH // 2 :]}"
