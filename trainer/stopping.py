"""How a fit learns that it must stop, and where it may be interrupted.

SIGTERM raises ``StopRequested`` at once, wherever the process is (an import, a download), except
inside ``deferred()``: there the code asks ``check()`` at points where stopping leaves no damage.
``StopRequested`` is a BaseException because libraries catch Exception broadly.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from trainer.contract import ENV_SUPERVISOR_PID


class StopRequested(BaseException):
    """The fit was told to stop, or its supervisor is gone."""


class Stopper:
    def __init__(self) -> None:
        self.reason = ""
        self._deferrals = 0
        pid = os.environ.get(ENV_SUPERVISOR_PID, "")
        self._supervisor = int(pid) if pid.isdigit() else None

    def install(self) -> None:
        """Handles SIGTERM from now on. Only in the main thread of a process that is ours."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        first = not self.reason
        self.reason = "told to stop (SIGTERM)"
        if first and not self._deferrals:
            raise StopRequested(self.reason)

    def check(self) -> None:
        """Raises StopRequested where a signal came, or where the supervisor died and nobody would collect the result."""
        if not self.reason and self._supervisor is not None and os.getppid() != self._supervisor:
            self.reason = "the supervisor is gone"
        if self.reason:
            raise StopRequested(self.reason)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for the next `check()`; a signal that came meanwhile is raised at the end."""
        self._deferrals += 1
        try:
            yield
        finally:
            self._deferrals -= 1
        if not self._deferrals:
            self.check()
