"""A small API server with state, by HTTP, for what a real cluster cannot be brought to do at will: forget a login, change its labels.

It keeps Jobs, one object each by namespace and name, and the pods that a test gives it. What it does not know it refuses.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.serving import in_thread
from trainer.contract import utc_now

Object = dict[str, Any]


def status_of(code: int, reason: str, message: str) -> tuple[int, Object]:
    return code, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": message}


@dataclass
class KubernetesApi:
    """``jobs`` by namespace and name; ``refusal``: what a Job that is to be created meets in place of its creation."""

    address: str = ""
    jobs: dict[tuple[str, str], Object] = field(default_factory=dict[tuple[str, str], Object])
    pods: list[Object] = field(default_factory=list[Object])
    created: list[str] = field(default_factory=list[str])
    refusal: tuple[int, Object] | None = None
    strips_annotations: bool = False

    def answer(self, method: str, path: str, query: dict[str, str], body: Object) -> tuple[int, Object]:
        match path.strip("/").split("/"):
            case ["apis", "batch", "v1", "namespaces", namespace, "jobs"] if method == "POST":
                return self.create(namespace, body, dry_run="dryRun" in query)
            case ["apis", "batch", "v1", "namespaces", namespace, "jobs", name]:
                return self.act(method, (namespace, name), body)
            case ["api", "v1", "namespaces", namespace, "pods"] if method == "GET":
                label, _, value = query["labelSelector"].partition("=")
                metadata = (pod["metadata"] for pod in self.pods)
                fits = [one["namespace"] == namespace and one["labels"].get(label) == value for one in metadata]
                return 200, {"items": [pod for pod, chosen in zip(self.pods, fits, strict=True) if chosen]}
            case ["api", "v1", "namespaces", _, "pods", name, "log"] if method == "GET":
                return status_of(400, "BadRequest", f'container "trainer" in pod "{name}" is waiting to start')
            case ["api", "v1", "namespaces", _, "events"] if method == "GET":
                return 200, {"items": []}
            case _:
                return status_of(501, "NotImplemented", f"{method} {path}")

    def create(self, namespace: str, body: Object, *, dry_run: bool) -> tuple[int, Object]:
        metadata = body["metadata"]
        if self.refusal is not None:
            return self.refusal
        if metadata["namespace"] != namespace:
            return status_of(400, "BadRequest", "the namespace of the object does not match the namespace on the request")
        key = namespace, metadata["name"]
        if key in self.jobs:
            return status_of(409, "AlreadyExists", f"jobs.batch {key[1]!r} already exists")
        if dry_run:
            return 201, body
        if self.strips_annotations:
            metadata["annotations"] = {}
        self.jobs[key] = {**body, "metadata": {**metadata, "creationTimestamp": f"{utc_now():%Y-%m-%dT%H:%M:%SZ}"}, "status": {}}
        self.created.append("/".join(key))
        return 201, self.jobs[key]

    def act(self, method: str, key: tuple[str, str], body: Object) -> tuple[int, Object]:
        job = self.jobs.get(key)
        if job is None:
            return status_of(404, "NotFound", f'jobs.batch "{key[1]}" not found')
        if method == "DELETE":
            return 200, self.jobs.pop(key)
        if method == "PATCH":
            job["metadata"]["annotations"].update(body["metadata"]["annotations"])
            job["spec"].update(body["spec"])
        return 200, job


def _make_answering(api: KubernetesApi) -> type[BaseHTTPRequestHandler]:
    lock = threading.Lock()

    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """What is asked is not told."""

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            with lock:
                status, answer = api.answer(self.command, url.path, query, json.loads(body or b"{}"))
                content = json.dumps(answer).encode()
            self.send_response_only(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

    return Answering


@contextmanager
def running_api() -> Iterator[KubernetesApi]:
    api = KubernetesApi()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _make_answering(api))
    server.block_on_close = False
    with in_thread(server) as api.address:
        yield api
