"""The one real node: containerd, kubelet and the traces that they leave on a machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from tests.cluster import cgroups, images
from tests.cluster.place import NODE, Place
from tests.cluster.programs import debian_file, kubernetes_program
from tests.docker_engine import mounts_below
from tests.stack import wait_for

PODS_MOST = 200
CONTAINER_LINKS = Path("/var/log/containers")  # the kubelet asks nobody
# What a kubelet and the pods' network set for their machine, put back at the end.
SYSTEM_SETTINGS = ("vm/overcommit_memory", "vm/panic_on_oom", "kernel/panic", "kernel/panic_on_oops", "net/ipv4/ip_forward")
CONTAINERD_CONFIG = """\
version = 2
root = "{store}"
state = "{run}/containerd"
oom_score = 0
disabled_plugins = [
  "io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
]
[grpc]
address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
disable_apparmor = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".containerd]
discard_unpacked_layers = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{cni}"
conf_dir = "{run}/cni"
"""


def socket(place: Place) -> Path:
    return place.run / "containerd.sock"


def network(place: Place) -> dict[str, object]:
    """Each pod's own end of a cable to this machine, and no way out. Servers on loopback are reached on the host's network only, as
    users with RDMA ask for it. The addresses are those kept for benchmarks, which no real network has."""
    subnet = f"198.18.{int(place.cgroup[-2:], 16)}.0/24"
    addresses = {"type": "host-local", "ranges": [[{"subnet": subnet}]], "dataDir": str(place.run / "addresses")}
    return {"cniVersion": "0.4.0", "name": "pods", "plugins": [{"type": "ptp", "ipam": addresses}]}


def start_containerd(place: Place) -> None:
    (place.run / "cni").mkdir(exist_ok=True)
    (place.run / "cni/pods.conflist").write_text(json.dumps(network(place)))
    config = place.run / "containerd.toml"
    folders = {"store": place.store, "run": place.run, "socket": socket(place), "cni": debian_file("usr/lib/cni/loopback").parent}
    config.write_text(CONTAINERD_CONFIG.format(pause=images.SMALL_IMAGE, **folders))
    program, runc = debian_file("usr/bin/containerd"), debian_file("usr/sbin/runc")
    path = os.pathsep.join([str(program.parent), str(runc.parent), os.environ["PATH"]])
    place.start("containerd", [str(program)], {"config": config}, {"PATH": path})

    def ready() -> bool:
        assert place.pid("containerd"), place.log("containerd").read_text()[-4000:]
        return socket(place).exists() and "ok" in images.ctr(socket(place), "plugins", "list", check=False)

    wait_for("containerd", ready, 30)
    images.ctr(socket(place), "images", "import", "-", stdin=images.small_image())
    images.prune(socket(place), place.store / "images.json")


def kubelet_config(place: Place) -> dict[str, object]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": "127.0.0.1",
        "port": place.ports["kubelet"],
        "healthzPort": 0,
        # Open, but on loopback; no certificate of a client needs to be made.
        "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
        "authorization": {"mode": "AlwaysAllow"},
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{place.cgroup}",
        "failCgroupV1": False,
        "failSwapOn": False,
        "oomScoreAdj": 0,
        "makeIPTablesUtilChains": False,
        "containerRuntimeEndpoint": f"unix://{socket(place)}",
        "resolvConf": "",
        "podLogsDir": str(place.run / "pod-logs"),
        "volumePluginDir": str(place.run / "volume-plugins"),
        "nodeStatusUpdateFrequency": "2s",
        "nodeLeaseDurationSeconds": 8,
        "maxPods": PODS_MOST,
        "serializeImagePulls": False,
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,  # the rig prunes by itself
        # Else an image that the rig brought is pulled, in vain, once the same configuration was pulled under another name.
        "imagePullCredentialsVerificationPolicy": "NeverVerify",
    }


def start_kubelet(place: Place) -> None:
    cgroups.make(place.cgroup)
    config = place.run / "kubelet.json"
    config.write_text(json.dumps(kubelet_config(place)))
    options = {
        "kubeconfig": place.kubeconfig("kubelet"),
        "config": config,
        "hostname-override": NODE,
        "root-dir": place.run / "kubelet",
        "cert-dir": place.run / "kubelet-certificates",
    }
    place.start("kubelet", [kubernetes_program("kubelet")], options)


def remember_system(place: Place) -> None:
    settings = {name: Path("/proc/sys", name).read_text() for name in SYSTEM_SETTINGS}
    (place.run / "system.json").write_text(json.dumps(settings))


def restore_system(place: Place) -> None:
    with suppress(FileNotFoundError):
        for name, value in json.loads((place.run / "system.json").read_text()).items():
            Path("/proc/sys", name).write_text(value)
    if CONTAINER_LINKS.is_dir():
        for link in CONTAINER_LINKS.iterdir():
            if link.is_symlink() and link.readlink().is_relative_to(place.run):
                link.unlink()


def shims(place: Place) -> list[psutil.Process]:
    """Those processes of this containerd that outlive it, each the parent of a container."""
    found = list[psutil.Process]()
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if words and Path(words[0]).name == "containerd-shim-runc-v2" and str(socket(place)) in words:
            found.append(process)
    return found


def stop_pods(place: Place) -> None:
    """Without their grace: nobody needs what they would still write."""
    cgroups.kill(place.cgroup)
    if place.pid("containerd"):
        for container in images.ctr(socket(place), "containers", "list", "--quiet").split():
            images.ctr(socket(place), "tasks", "remove", "--force", container, check=False)  # some have ended
            images.ctr(socket(place), "containers", "remove", container)
    for shim in shims(place):
        with suppress(psutil.NoSuchProcess):
            shim.kill()
            shim.wait(10)


def stop_node(place: Place) -> None:
    place.stop("kubelet")
    stop_pods(place)
    if place.pid("containerd"):
        images.prune(socket(place), place.store / "images.json")
    place.stop("containerd")
    for mounted in mounts_below(Path(place.folder)):
        subprocess.run(["umount", mounted], check=True, capture_output=True)
    wait_for("the last process of a pod to end", lambda: not cgroups.processes(place.cgroup), 10)
    cgroups.remove(place.cgroup)
    restore_system(place)


def remove_run(place: Place) -> None:
    """Only once nothing is mounted there: else a volume's files would go, too."""
    left = mounts_below(place.run)
    assert not left, left
    shutil.rmtree(place.run)
