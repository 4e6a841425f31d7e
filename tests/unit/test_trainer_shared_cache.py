"""One cache of datasets for pods whose users have nothing in common but the volume's group, as `fsGroup` gives it to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.staged_store import write_store

ROOT = Path(__file__).parents[2]
GROUP = 23_456
pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="only root can start processes of other users")

# Everything is imported before the user changes, who may not read where Python lies.
FETCH = """
import json, os, sys
from pathlib import Path
from trainer.dataset_cache import dataset_folder

store, version, cache, scratch, uid, group, limit = sys.argv[1:]
def fetch(cache, scratch):
    options = {"limit_bytes": int(limit) or None, "scratch": Path(scratch), "on_message": print}
    with dataset_folder(store, version, cache=cache, **options) as found:
        return found
fetch(None, scratch)
os.setgroups([int(group)])
os.setgid(int(uid))
os.setuid(int(uid))
os.umask(0o002)
sys.stdin.readline()
try:
    found = fetch(Path(cache), scratch)
    print(json.dumps({"place": found.place, "bytes": found.bytes, "fetched": found.fetched_bytes}))
except Exception as exc:
    print(json.dumps({"error": str(exc)}))
"""


class Volume:
    def __init__(self, base: Path) -> None:
        self.base = base
        base.chmod(0o755)
        self.cache = base / "cache"
        self.cache.mkdir()
        os.chown(self.cache, 0, GROUP)
        self.cache.chmod(0o2775)

    def store(self, name: str, size: int) -> str:
        return write_store(self.base / name, {f"images/{number}.jpg": os.urandom(size) for number in range(40)})

    def start(self, store: str, version: str, uid: int, *, group: int = GROUP, limit: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", FETCH, str(self.base / store), version, str(self.cache), str(self.base / f"own-{uid}")]
        return subprocess.Popen(
            [*command, str(uid), str(group), str(limit)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def fetch(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return answer(self.start(*arguments, **options))


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, _ = process.communicate("go\n", timeout=120)
    return json.loads(output.splitlines()[-1])


@pytest.fixture
def volume() -> Iterator[Volume]:
    with tempfile.TemporaryDirectory(prefix="trainyard-test-") as base:
        yield Volume(Path(base))


def test_two_at_once_fetch_once_and_the_third_fetches_no_byte(volume: Volume) -> None:
    version = volume.store("store", 200_000)
    both = [volume.start("store", version, uid) for uid in (10_001, 10_002)]
    for process in both:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [answer(process) for process in both]
    assert [one["place"] for one in found] == ["cache", "cache"]
    assert sum(one["fetched"] for one in found) == found[0]["bytes"] == 40 * 200_000
    third = volume.fetch("store", version, 10_003)
    assert (third["place"], third["fetched"]) == ("cache", 0)


def test_one_mends_and_deletes_what_another_user_left(volume: Volume) -> None:
    version, other = volume.store("store", 1000), volume.store("other", 1000)
    assert volume.fetch("store", version, 10_001)["fetched"] == 40_000
    damaged = volume.cache / version / "data/images/7.jpg"
    damaged.write_bytes(b"")
    assert volume.fetch("store", version, 10_002)["fetched"] == 1000
    assert damaged.stat().st_size == 1000
    assert volume.fetch("other", other, 10_003, limit=50_000)["fetched"] == 40_000
    assert not (volume.cache / version).exists()


def test_a_user_outside_the_group_is_told_which_folder_it_cannot_write(volume: Volume) -> None:
    version = volume.store("store", 1000)
    found = volume.fetch("store", version, 10_009, group=10_009)
    assert str(volume.cache) in found["error"]
    assert "Permission denied" in found["error"]
    assert "Next: mend its permissions" in found["error"]
