"""Images of the trainer's contract that are small: the cluster's busybox with another entry point, put into a registry by HTTP."""

from __future__ import annotations

import gzip
import io
import json
import tarfile

from tests.cluster import images
from tests.images import OCI, Uploader, trainer_labels


def push_image(host: str, repository: str, entrypoint: list[str], environment: list[str], user: tuple[str, str] | None = None) -> str:
    """Its name by digest. A launcher takes it for a trainer's, by its labels."""
    with tarfile.open(fileobj=io.BytesIO(images.small_image())) as archive:
        parts = {name: archive.extractfile(name).read() for name in archive.getnames()}  # type: ignore[union-attr]
    config = json.loads(parts["config.json"])
    # A kubelet keeps with which credentials it pulled a configuration's digest, and asks for them whatever the image is called next.
    labels = {**trainer_labels(), "trainyard.test/repository": repository}
    config["config"] = {"Env": environment, "Entrypoint": entrypoint, "Labels": labels}
    blobs = [
        (f"{OCI}.config.v1+json", json.dumps(config).encode()),
        (f"{OCI}.layer.v1.tar+gzip", gzip.compress(parts["layer.tar"], mtime=0)),
    ]
    uploader = Uploader(host, repository, user)
    described = [{"mediaType": kind, "digest": uploader.blob(data), "size": len(data)} for kind, data in blobs]
    manifest = {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": described[0], "layers": described[1:]}
    return f"{host}/{repository}@{uploader.manifest(manifest)}"
