from __future__ import annotations

import os

import pytest

from blocks.places import user_name


def test_a_user_without_a_name_is_told_by_number_or_as_the_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, whose user no file knows."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert user_name() == "uid-54321"
    monkeypatch.setenv("USER", "ana")
    assert user_name() == "ana"
