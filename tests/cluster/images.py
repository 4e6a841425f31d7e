"""What containerd keeps: the one small image of the rig, and the big ones that were pulled once."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

from tests.cluster.programs import debian_file

SMALL_IMAGE = "trainyard.test/busybox:1"
# With no command it does what a pod's pause container does: wait, and leave when told to.
PAUSE = ["/bin/sh", "-c", "trap 'exit 0' TERM INT; while true; do sleep 3600 & wait; done"]
KEPT_OF_EACH = 3


def add_file(archive: tarfile.TarFile, name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, target: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size, member.mode = kind, target, len(content), 0o755
    archive.addfile(member, io.BytesIO(content))


def small_image(architecture: str = "amd64") -> bytes:
    """Of Debian's static busybox, as `docker save` would write it."""
    busybox = debian_file("bin/busybox")
    commands = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as archive:
        add_file(archive, "bin", kind=tarfile.DIRTYPE)
        add_file(archive, "tmp", kind=tarfile.DIRTYPE)
        add_file(archive, "bin/busybox", busybox.read_bytes())
        for command in commands:
            if command != "busybox":
                add_file(archive, f"bin/{command}", kind=tarfile.SYMTYPE, target="busybox")
    config = {
        "os": "linux",
        "architecture": architecture,
        "config": {"Env": ["PATH=/bin"], "Cmd": PAUSE},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.getvalue()).hexdigest()}"]},
    }
    manifest = [{"Config": "config.json", "RepoTags": [SMALL_IMAGE], "Layers": ["layer.tar"]}]
    image = io.BytesIO()
    with tarfile.open(fileobj=image, mode="w") as archive:
        add_file(archive, "layer.tar", layer.getvalue())
        add_file(archive, "config.json", json.dumps(config).encode())
        add_file(archive, "manifest.json", json.dumps(manifest).encode())
    return image.getvalue()


def ctr(socket: Path, *argv: str, stdin: bytes | None = None, check: bool = True) -> str:
    """Containerd's own client, in the kubelet's part of it."""
    command = [str(debian_file("usr/bin/ctr")), "--address", str(socket), "--namespace", "k8s.io", *argv]
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=300, check=False)
    assert not check or done.returncode == 0, f"ctr {' '.join(argv)}: {done.stderr.decode()[-2000:]}"
    return done.stdout.decode()


def repository(name: str) -> str:
    """Without the host: a registry on loopback has another port every day."""
    return name.partition("/")[2].partition("@")[0].partition(":")[0]


def surplus(names: list[str]) -> list[str]:
    """Of the images' names, oldest first, those to forget: all but the last few of each repository."""
    later = Counter[str]()
    gone = list[str]()
    for name in reversed(names):
        later[repository(name)] += 1
        if later[repository(name)] > KEPT_OF_EACH:
            gone.append(name)
    return gone


def listed(socket: Path) -> dict[str, str]:
    """The digest that each name means. Containerd has each image a second time, by its configuration's digest."""
    lines = (line.split() for line in ctr(socket, "images", "list").splitlines()[1:])
    return {words[0]: words[2] for words in lines}


def prune(socket: Path, record: Path) -> None:
    """Forgets old images; the layers that no other image has go with them. `record` says in which order they came."""
    digests = listed(socket)
    before: list[str] = json.loads(record.read_text()) if record.is_file() else []
    names = [name for name in before if name in digests]
    names += [name for name in digests if name not in names and not name.startswith("sha256:")]
    gone = surplus(names)
    kept = {digests[name] for name in names if name not in gone}
    for name in [*gone, *(name for name in digests if name.startswith("sha256:") and digests[name] not in kept)]:
        ctr(socket, "images", "remove", name)
    record.write_text(json.dumps([name for name in names if name not in gone]))
