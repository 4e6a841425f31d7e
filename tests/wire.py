"""A wire before a server: it carries bytes as they are, counts them, and breaks after so many. Knows no protocol, unlike `tests.faults`."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from tests.serving import in_thread

PIECE_BYTES = 64 * 2**10


@dataclass
class Wire:
    """``host`` stands in for the server's. Once ``breaks_after`` bytes went up, every connection is cut, until `mend`."""

    upstream: str
    host: str = ""
    up: int = 0
    down: int = 0
    breaks_after: int | None = None
    cut: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        with self._lock:
            self.up = self.down = 0

    def mend(self) -> None:
        with self._lock:
            self.breaks_after = None

    def carry(self, size: int, *, upward: bool) -> bool:
        """Whether it holds."""
        with self._lock:
            holds = self.breaks_after is None or self.up < self.breaks_after
            self.cut += not holds
            if holds and upward:
                self.up += size
            elif holds:
                self.down += size
            return holds


class _Carrying(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        wire: Wire = self.server.wire  # type: ignore[attr-defined]
        if not wire.carry(0, upward=True):
            return
        address, _, port = wire.upstream.rpartition(":")
        with socket.create_connection((address, int(port))) as server:
            back = threading.Thread(target=_pass_on, args=(wire, server, self.request, False), daemon=True)
            back.start()
            _pass_on(wire, self.request, server, True)
            back.join()


def _pass_on(wire: Wire, source: socket.socket, target: socket.socket, upward: bool) -> None:
    """To the end of what comes; both connections end at once where the wire breaks."""
    with suppress(OSError):  # one end hung up, or the wire broke on the other way
        while (piece := source.recv(PIECE_BYTES)) and wire.carry(len(piece), upward=upward):
            target.sendall(piece)
        if not piece:
            target.shutdown(socket.SHUT_WR)
            return
    for broken in (source, target):
        with suppress(OSError):
            broken.shutdown(socket.SHUT_RDWR)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    wire: Wire


@contextmanager
def running_wire(upstream: str) -> Iterator[Wire]:
    server = _Server(("127.0.0.1", 0), _Carrying)
    server.wire = Wire(upstream, f"127.0.0.1:{server.server_address[1]}")
    with in_thread(server):
        yield server.wire
