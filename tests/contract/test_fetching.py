"""Fetching over connections that break, from a server that breaks them, and from S3 (moto's server)."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest

from tests.serving import in_thread
from tests.staged_store import read_tree, write, write_store
from trainer import ranges
from trainer.contract import ExitCode, TrainerError
from trainer.fetch_index import PART_BYTES
from trainer.fetching import fetch_version, read_header
from trainer.storage import list_paths, open_store
from trainer.verifying import verify_version

SMALL = {f"d{number % 3}/{number}.jpg": random.Random(number).randbytes(5000) for number in range(200)}
LARGE = {"large": random.Random(1).randbytes(3 * PART_BYTES + 5)}


class BreakingServer(ThreadingHTTPServer):
    """Answers GET and HEAD of the files below a folder as S3 does. `is_cut` says which request's body ends in its middle."""

    daemon_threads = True

    def __init__(self, root: Path, is_cut: Callable[[int], bool], etag: str) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.is_cut, self.etag = root, is_cut, etag
        self.lock = threading.Lock()
        self.ranges: list[tuple[int, int]] = []


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: BreakingServer

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.server.root / self.path.split("/", 2)[2]
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = path.read_bytes()
        wanted = self.headers.get("Range")
        start, end = (int(number) for number in wanted[6:].split("-")) if wanted else (0, len(content) - 1)
        end = min(end, len(content) - 1)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(end - start + 1))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(content)}")
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = content[start : end + 1]
        if not path.match("manifests/*"):
            with self.server.lock:
                self.server.ranges.append((start, end + 1))
                cut = self.server.is_cut(len(self.server.ranges))
            if cut:
                self.close_connection = True
                body = body[: len(body) // 2]
        self.wfile.write(body)


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_REGION", "us-east-1")


@contextlib.contextmanager
def serving(root: Path, is_cut: Callable[[int], bool], etag: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BreakingServer]:
    server = BreakingServer(root, is_cut, etag)
    with in_thread(server) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield server


@pytest.mark.parametrize("etag", ['"x"', ""])
def test_a_body_that_breaks_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: None, etag: str) -> None:
    """The library goes on where a body broke if there is an ETag; without one, the part is read anew."""
    monkeypatch.setattr(ranges, "PAUSE_SECONDS", 0.01)
    version = write_store(tmp_path / "store", SMALL, LARGE)
    with serving(tmp_path / "store", lambda number: number in (1, 3, 4), etag, monkeypatch) as server:
        fetch_version("s3://bucket", version, tmp_path / "copy")
        assert len(server.ranges) >= 5 + 3
    assert read_tree(tmp_path / "copy") == {**SMALL, **LARGE}


def test_a_store_that_always_breaks_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: None) -> None:
    monkeypatch.setattr(ranges, "PAUSE_SECONDS", 0.01)
    version = write_store(tmp_path / "store", SMALL, LARGE)
    with serving(tmp_path / "store", lambda number: True, "", monkeypatch) as server:
        with pytest.raises(TrainerError) as refused:
            fetch_version("s3://bucket", version, tmp_path / "copy")
        assert len(server.ranges) <= ranges.TRIES * 5
    assert refused.value.code is ExitCode.UNAVAILABLE
    assert not (tmp_path / "copy").exists()


def test_what_a_broken_fetch_left_is_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: None) -> None:
    monkeypatch.setattr(ranges, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(ranges, "FIRST_STREAMS", 1)
    monkeypatch.setattr(ranges, "MOST_STREAMS", 1)
    version = write_store(tmp_path / "store", SMALL, LARGE)
    with serving(tmp_path / "store", lambda number: number > 3, "", monkeypatch), pytest.raises(TrainerError):
        fetch_version("s3://bucket", version, tmp_path / "copy")
    with serving(tmp_path / "store", lambda number: False, "", monkeypatch) as server:
        fetch_version("s3://bucket", version, tmp_path / "copy")
        assert sum(end - start for start, end in server.ranges) < len(LARGE["large"])
    assert read_tree(tmp_path / "copy") == {**SMALL, **LARGE}


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, credentials: None) -> Iterator[str]:
    """A prefix of a new bucket in moto's server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    name = f"data-{uuid4().hex[:12]}"
    boto3.client("s3").create_bucket(Bucket=name)
    try:
        yield f"s3://{name}/some/prefix"
    finally:
        server.stop()


def test_from_s3_in_ranges(bucket: str, tmp_path: Path) -> None:
    import obstore

    version = write_store(tmp_path / "store", SMALL, {**LARGE, "copy": LARGE["large"]})
    store = open_store(bucket)
    for name in list_paths(open_store(str(tmp_path / "store")), ""):
        obstore.put(store, name, (tmp_path / "store" / name).read_bytes())
    assert read_header(bucket, version).files == len(SMALL) + 2
    write(tmp_path / f"copy.partial-{version[:12]}/copy", LARGE["large"][: 2 * PART_BYTES])
    fetched = fetch_version(bucket, version, tmp_path / "copy")
    assert fetched.fetched_bytes == fetched.bytes - 2 * PART_BYTES
    assert read_tree(tmp_path / "copy") == {**SMALL, **LARGE, "copy": LARGE["large"]}
    assert verify_version(bucket, version).bytes == fetched.bytes
    with pytest.raises(TrainerError) as refused:
        read_header(bucket, "0" * 64)
    assert refused.value.code is ExitCode.NOT_FOUND


def test_from_s3_damage_is_told(bucket: str, tmp_path: Path) -> None:
    import obstore

    version = write_store(tmp_path / "store", SMALL, LARGE)
    store = open_store(bucket)
    for name in list_paths(open_store(str(tmp_path / "store")), ""):
        content = (tmp_path / "store" / name).read_bytes()
        obstore.put(store, name, content[:-5000] if name.startswith("packs/") else content)
    with pytest.raises(TrainerError, match="is damaged: it ends before byte") as refused:
        verify_version(bucket, version)
    assert refused.value.code is ExitCode.DATA
