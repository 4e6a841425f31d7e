"""The programs of the cluster: Kubernetes' own, built once per machine from the Go module beside this file, and Debian's containerd."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from tests.components import cache_folder, skip_or_fail

HERE = Path(__file__).resolve().parent
VERSION = re.findall(r"^\tk8s.io/kubernetes (v\S+)$", (HERE / "go.mod").read_text(), re.MULTILINE)[0]
KUBERNETES = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl")
PACKAGES = {"etcd": "go.etcd.io/etcd/server/v3", **{name: f"k8s.io/kubernetes/cmd/{name}" for name in KUBERNETES}}
DEBIAN_PACKAGES = "containerd runc containernetworking-plugins busybox-static"
DEBIAN_FILES = ("usr/bin/containerd", "usr/bin/ctr", "usr/sbin/runc", "usr/lib/cni/loopback", "bin/busybox")
BUILD = "uv run python -m tests.cluster build"


def binaries() -> Path:
    return cache_folder("cluster") / VERSION / "bin"


def found(name: str) -> Path | None:
    """Where `KUBEBUILDER_ASSETS` has it, as for other tests of Kubernetes programs; else what was built here."""
    folders = [Path(folder) for folder in [os.environ.get("KUBEBUILDER_ASSETS")] if folder]
    return next((folder / name for folder in [*folders, binaries()] if (folder / name).is_file()), None)


def kubernetes_program(name: str) -> str:
    if (program := found(name)) is None:
        skip_or_fail(f"not here: {name} ({BUILD}: eight minutes, once; it needs Go {go_version()})")
    return str(program)


def debian_file(name: str) -> Path:
    """A file of the Debian packages that `.ci/run` unpacks, once per machine."""
    folder = cache_folder("debian")
    if not (folder / name).is_file():
        unpack = f"mkdir -p {folder} && cd {folder} && apt-get download {DEBIAN_PACKAGES} && for p in *.deb; do dpkg-deb -x $p .; done"
        skip_or_fail(f"not here: {name} ({unpack})")
    return folder / name


def require_programs() -> None:
    for name in PACKAGES:
        kubernetes_program(name)
    for name in DEBIAN_FILES:
        debian_file(name)


def go_version() -> str:
    return re.findall(r"^go (\d+\.\d+)", (HERE / "go.mod").read_text(), re.MULTILINE)[0]


def build() -> None:
    """What is not here yet. All in one command, since they share most of what is compiled; Go's own caches keep the rest."""
    missing = [name for name in PACKAGES if found(name) is None]
    if not missing:
        return
    if (go := shutil.which("go")) is None:
        raise SystemExit(f"`go` is not on PATH: the cluster's programs need Go {go_version()} or newer to be built")
    fresh = binaries().with_name(f"bin.{os.getpid()}")
    fresh.mkdir(parents=True)
    _, major, minor, _ = re.split(r"[v.]", VERSION)
    flags = {"gitVersion": VERSION, "gitMajor": major, "gitMinor": minor}  # else the server calls itself v0.0.0
    linker = " ".join(["-s -w", *(f"-X k8s.io/component-base/version.{name}={value}" for name, value in flags.items())])
    try:
        subprocess.run(
            [go, "build", "-trimpath", "-ldflags", linker, "-o", f"{fresh}{os.sep}", *(PACKAGES[name] for name in missing)],
            cwd=HERE,
            env={**os.environ, "CGO_ENABLED": "0"},
            check=True,
        )
        binaries().mkdir(exist_ok=True)
        for program in fresh.iterdir():
            program.replace(binaries() / ("etcd" if program.name == "server" else program.name))
    finally:
        shutil.rmtree(fresh)
