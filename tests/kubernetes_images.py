"""Images of the trainer's contract that are small: the cluster's busybox with another entry point, on the node or in a registry."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile

from tests.cluster import images, node
from tests.cluster.cluster import Cluster
from tests.images import OCI, Uploader, trainer_labels
from tests.stack import REPOSITORY
from trainer.contract import CONTRACT_VERSION


def build_image(entrypoint: list[str], environment: list[str], name: str) -> tuple[bytes, bytes]:
    """Its configuration and its layer. A launcher takes it for a trainer's, by its labels."""
    with tarfile.open(fileobj=io.BytesIO(images.small_image())) as archive:
        parts = {part: archive.extractfile(part).read() for part in archive.getnames()}  # type: ignore[union-attr]
    config = json.loads(parts["config.json"])
    # A kubelet keeps with which credentials it pulled a configuration's digest, and asks for them whatever the image is called next.
    config["config"] = {"Env": environment, "Entrypoint": entrypoint, "Labels": {**trainer_labels(), "trainyard.test/name": name}}
    return json.dumps(config).encode(), parts["layer.tar"]


def import_image(cluster: Cluster, name: str, entrypoint: list[str], environment: list[str]) -> str:
    """Onto the node, as `docker save` would write it. Its name by digest, as a run's image is named."""
    socket, tag = node.socket(cluster.place), f"{name}:1"
    if not cluster.has_image(tag):
        config, layer = build_image(entrypoint, environment, name)
        manifest = [{"Config": "config.json", "RepoTags": [tag], "Layers": ["layer.tar"]}]
        saved = io.BytesIO()
        with tarfile.open(fileobj=saved, mode="w") as archive:
            for part, content in (("layer.tar", layer), ("config.json", config), ("manifest.json", json.dumps(manifest).encode())):
                images.add_file(archive, part, content)
        cluster.import_image(saved.getvalue())
    reference = f"{name}@{images.listed(socket)[tag]}"
    if not cluster.has_image(reference):
        images.ctr(socket, "images", "tag", tag, reference)
    return reference


def push_image(host: str, repository: str, entrypoint: list[str], environment: list[str], user: tuple[str, str] | None = None) -> str:
    """Into a registry, by HTTP, from where any machine gets it. Its name by digest."""
    config, layer = build_image(entrypoint, environment, repository)
    blobs = [(f"{OCI}.config.v1+json", config), (f"{OCI}.layer.v1.tar+gzip", gzip.compress(layer, mtime=0))]
    uploader = Uploader(host, repository, user)
    described = [{"mediaType": kind, "digest": uploader.blob(data), "size": len(data)} for kind, data in blobs]
    manifest = {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": described[0], "layers": described[1:]}
    return f"{host}/{repository}@{uploader.manifest(manifest)}"


# --- The trainer of this environment, without an image of gigabytes: a pod that has `host_settings` has its folders ----------------

HOST_ENTRYPOINT = [sys.executable, "-P", "-m", "trainer"]
HOST_VARIABLES = [f"PATH={sys.prefix}/bin:/usr/bin:/bin", f"PYTHONPATH={REPOSITORY}", "PYTHONDONTWRITEBYTECODE=1"]


def import_host_image(cluster: Cluster) -> str:
    environment = hashlib.sha256(f"{sys.prefix} {CONTRACT_VERSION}".encode()).hexdigest()[:8]
    return import_image(cluster, f"trainyard.test/host-{environment}", HOST_ENTRYPOINT, HOST_VARIABLES)


def push_host_image(host: str) -> str:
    return push_image(host, "trainyard-test/host", HOST_ENTRYPOINT, HOST_VARIABLES)
