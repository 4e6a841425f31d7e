"""Small images for tests, put into a registry by its HTTP interface alone, and a project's folder to build from."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from blocks.image_build import LABEL_CONTRACT, LABEL_SOURCE
from trainer.contract import CONTRACT_VERSION

OCI = "application/vnd.oci.image"
DOCKERFILE = """\
ARG BASE_IMAGE=scratch
FROM ${BASE_IMAGE}
ARG VERSION
COPY docker/trainer-requirements.txt /requirements.txt
COPY trainer /trainer
"""
# The command, for a project elsewhere; at its end the last line says what it had to import of what takes long.
COMMAND = """
import atexit, pathlib, sys
root = pathlib.Path(sys.argv[1])
import blocks.image as image
image.find_root = lambda: root
from flows.cli import main
atexit.register(lambda: print("imported:", *({"docker", "prefect", "pydantic"} & set(sys.modules)), file=sys.stderr))
sys.argv = ["trainyard", "image", "build", *sys.argv[2:]]
main()
"""


@dataclass(frozen=True)
class Uploader:
    """With no code of the project."""

    host: str
    repository: str
    user: tuple[str, str] | None = None

    def url(self, path: str) -> str:
        return f"http://{self.host}/v2/{self.repository}/{path}"

    def blob(self, data: bytes) -> str:
        digest = sha256(data)
        with httpx.Client(auth=self.user, trust_env=False) as client:
            place = client.post(self.url("blobs/uploads/")).raise_for_status().headers["Location"]
            client.put(f"{place}&digest={digest}", content=data).raise_for_status()
        return digest

    def manifest(self, content: dict[str, Any], tag: str = "") -> str:
        body = json.dumps(content, indent=3).encode()  # not as anybody would write it again
        headers = {"Content-Type": content["mediaType"]}
        httpx.put(self.url(f"manifests/{tag or sha256(body)}"), content=body, headers=headers, auth=self.user).raise_for_status()
        return sha256(body)

    def image(
        self, tag: str = "", *, platform: str = "linux/amd64", payload: bytes = b"model", labels: dict[str, str] | None = None
    ) -> str:
        """Puts an image with one layer of one file; returns its digest."""
        layer = make_layer(payload)
        system, architecture = platform.split("/")
        config = json.dumps(
            {
                "os": system,
                "architecture": architecture,
                "created": "2026-11-24T12:00:00Z",
                "config": {"Labels": labels or {}},
                "rootfs": {"type": "layers", "diff_ids": [sha256(gzip.decompress(layer))]},
            }
        ).encode()
        parts = [(f"{OCI}.config.v1+json", config), (f"{OCI}.layer.v1.tar+gzip", layer)]
        described = [{"mediaType": kind, "digest": self.blob(data), "size": len(data)} for kind, data in parts]
        manifest = {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": described[0], "layers": described[1:]}
        return self.manifest(manifest, tag)

    def index(self, tag: str, **digests: str) -> str:
        """`digests` by architecture."""
        size = {name: len(httpx.get(self.url(f"manifests/{digest}"), headers=ACCEPT).content) for name, digest in digests.items()}
        entries = [
            {
                "mediaType": f"{OCI}.manifest.v1+json",
                "digest": digest,
                "size": size[name],
                "platform": {"os": "linux", "architecture": name},
            }
            for name, digest in digests.items()
        ]
        return self.manifest({"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": entries}, tag)


ACCEPT = {"Accept": f"{OCI}.manifest.v1+json"}


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def make_layer(payload: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        entry = tarfile.TarInfo("payload")
        entry.size = len(payload)
        archive.addfile(entry, io.BytesIO(payload))
    return gzip.compress(packed.getvalue(), mtime=0)


def trainer_labels(source_hash: str = "", contract: int = CONTRACT_VERSION) -> dict[str, str]:
    return {LABEL_CONTRACT: str(contract), **({LABEL_SOURCE: source_hash} if source_hash else {})}


def write_project(root: Path) -> Path:
    """What the trainer image is made of, small, and beside it what it is not."""
    files = {
        "docker/trainer.Dockerfile": DOCKERFILE,
        "docker/trainer-requirements.txt": "pydantic==2.14.3\n",
        "docker/flow-runner.Dockerfile": "FROM scratch\n",
        ".dockerignore": "**/__pycache__\n",
        "trainer/__init__.py": "",
        "trainer/task.py": "print('trains')\n",
        "flows/train.py": "# a flow\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def image_command(root: Path, *options: str) -> list[str]:
    """`trainyard image build`, of that project."""
    return [sys.executable, "-c", COMMAND, str(root), *options]


def run_image_command(root: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = image_command(root, *options)
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False)
