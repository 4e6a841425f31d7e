from __future__ import annotations

import os
import signal
import threading

import pytest

from trainer.contract import ENV_SUPERVISOR_PID
from trainer.stopping import Stopper, StopRequested


def test_a_fit_without_its_supervisor_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_SUPERVISOR_PID, str(os.getppid()))
    Stopper().check()
    monkeypatch.setenv(ENV_SUPERVISOR_PID, str(os.getpid()))
    with pytest.raises(StopRequested, match="the supervisor is gone"):
        Stopper().check()


def test_a_signal_waits_for_the_end_of_a_deferral() -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        stopper = Stopper()
        stopper.install()
        reached: list[bool] = []

        def save() -> None:
            with stopper.deferred():
                signal.raise_signal(signal.SIGTERM)
                reached.append(True)

        with pytest.raises(StopRequested):
            save()
        assert reached
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stopper_installs_nothing_outside_the_main_thread() -> None:
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=Stopper().install)
    thread.start()
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
