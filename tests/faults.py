"""A proxy before a server that does by plan what networks and busy servers do: refuse, lose an answer, cut, stall, be slow."""

from __future__ import annotations

import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import unquote, urlsplit

from tests.serving import in_thread

PIECE_BYTES = 16 * 2**10
ALWAYS = 10**9


Action = Literal["refuse", "lose", "cut_up", "cut_down", "drop", "stall"]


@dataclass
class Fault:
    """What happens to the next `times` requests of a kind. ``path`` is searched for in the unquoted path and query.

    One that stalls is answered after `seconds`, if such are given, and else never.
    """

    action: Action
    method: str = r"GET|PUT|POST|HEAD|DELETE|PATCH"
    path: str = ""
    times: int = 1
    status: int = 503
    seconds: float | None = None

    def fits(self, method: str, path: str) -> bool:
        return self.times > 0 and re.fullmatch(self.method, method) is not None and re.search(self.path, unquote(path)) is not None


class Request(NamedTuple):
    """``fault`` is the action that it met. Bytes are those of bodies. ``authorization`` is the header, which names who signed."""

    method: str
    path: str
    fault: str | None
    bytes_up: int
    authorization: str


class Answer(NamedTuple):
    """What the store sent back, whether or not it arrived. Bytes are those of the body."""

    request: Request
    bytes_down: int


@dataclass
class FaultProxy:
    """``address`` stands in for the server's. Plan with `add`; a plan that is used up does nothing more."""

    upstream: str
    certificate: Path | None = None  # that signs the server's, if it speaks https
    address: str = ""
    bytes_per_second: float | None = None
    faults: list[Fault] = field(default_factory=list[Fault])
    requests: list[Request] = field(default_factory=list[Request])
    answers: list[Answer] = field(default_factory=list[Answer])
    closing: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _free_at: float = 0.0

    def add(self, *faults: Fault) -> None:
        with self._lock:
            self.faults.extend(faults)

    def heal(self) -> None:
        with self._lock:
            self.faults.clear()

    def connect(self) -> http.client.HTTPConnection:
        """To the server, for one request."""
        address = urlsplit(self.upstream)
        if address.scheme == "https":
            context = ssl.create_default_context(cafile=self.certificate)
            return http.client.HTTPSConnection(address.netloc, timeout=60, context=context)
        return http.client.HTTPConnection(address.netloc, timeout=60)

    def met(self, action: Action) -> int:
        """How many requests met this fault."""
        return sum(request.fault == action for request in self.requests)

    def bytes_up(self) -> int:
        return sum(request.bytes_up for request in self.requests)

    def take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            found = next((fault for fault in self.faults if fault.fits(method, path)), None)
            if found is not None:
                found.times -= 1
            return found

    def pace(self, size: int) -> None:
        """Waits until the link, which all connections share, has carried so many bytes."""
        if self.bytes_per_second is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self.bytes_per_second
            wait = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait))


def _make_answering(proxy: FaultProxy) -> type[BaseHTTPRequestHandler]:
    class Answering(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            """Requests are kept in ``proxy.requests``."""

        def answer(self) -> None:
            fault = proxy.take(self.command, self.path)
            action = fault.action if fault else None
            length = int(self.headers.get("Content-Length", 0))
            body = self.read_body(length // 2 if action == "cut_up" else length)
            request = Request(self.command, self.path, action, len(body), self.headers.get("Authorization", ""))
            proxy.requests.append(request)
            stalled = fault is not None and action == "stall" and (proxy.closing.wait(fault.seconds) or fault.seconds is None)
            if stalled or action in ("cut_up", "drop"):
                return self.hang_up()
            if fault is not None and action == "refuse":
                return self.send(fault.status, {}, b"<Error><Code>Planned</Code></Error>")
            status, headers, content = self.forward(body)
            proxy.answers.append(Answer(request, len(content)))
            if action == "lose":
                return self.hang_up()
            return self.send(status, headers, content, cut=action == "cut_down")

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = do_PATCH = answer

        def read_body(self, length: int) -> bytes:
            pieces: list[bytes] = []
            while length > 0 and (piece := self.rfile.read(min(length, PIECE_BYTES))):
                proxy.pace(len(piece))
                pieces.append(piece)
                length -= len(piece)
            return b"".join(pieces)

        def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = proxy.connect()
            try:
                connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body or None)
                response = connection.getresponse()
                return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
            finally:
                connection.close()

        def send(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            # To a HEAD the answer has the length of what is not sent.
            length = headers.get("content-length", "0") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length)
            self.end_headers()
            content = content[: len(content) // 2] if cut else content
            for start in range(0, len(content), PIECE_BYTES):
                piece = content[start : start + PIECE_BYTES]
                proxy.pace(len(piece))
                self.wfile.write(piece)
            if cut:
                self.hang_up()

        def hang_up(self) -> None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    return Answering


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """The client's end of a connection that was cut says nothing new."""


@contextmanager
def running_proxy(upstream: str, certificate: Path | None = None) -> Iterator[FaultProxy]:
    """Speaks plain HTTP, also before a server that does not."""
    proxy = FaultProxy(upstream, certificate)
    with in_thread(_Server(("127.0.0.1", 0), _make_answering(proxy))) as proxy.address:
        try:
            yield proxy
        finally:
            proxy.closing.set()
