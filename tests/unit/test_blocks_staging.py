from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Queue

import pytest

from blocks.counting import Counts
from blocks.reading import TAKE_BYTES, Read, read_all, read_file, take_read
from blocks.scanning import Stat
from blocks.sending import put_file
from blocks.staging import stage_folder
from blocks.stat_cache import StatCache
from trainer.errors import TrainerError
from trainer.packs import BLOCK
from trainer.storage import open_store
from trainer.verifying import verify_version


def done(*paths: str) -> Future[list[Read]]:
    future = Future[list[Read]]()
    future.set_result([Read(path, Stat(1, 2, 3, 4), b"digest", b"x", 5) for path in paths])
    return future


def test_what_has_been_read_is_taken_together_in_its_order() -> None:
    unread = Future[list[Read]]()
    ahead: deque[tuple[Future[list[Read]] | str, int]] = deque([(done("a", "b"), 2), (done("c"), 1), (unread, 1), (done("d"), 1)])
    found, size = take_read(ahead)
    assert [read.path for read in found if isinstance(read, Read)] == ["a", "b", "c"]
    assert size == 3
    assert ahead[0][0] is unread


def test_a_path_that_is_gone_is_taken_by_itself_and_ends_what_is_taken_before_it() -> None:
    ahead: deque[tuple[Future[list[Read]] | str, int]] = deque([(done("a"), 1), ("gone", 0), (done("b"), 1)])
    assert [read.path for read in take_read(ahead)[0] if isinstance(read, Read)] == ["a"]
    assert take_read(ahead) == ("gone", 0)
    assert len(ahead) == 1


def test_no_more_is_taken_than_memory_is_meant_for() -> None:
    ahead: deque[tuple[Future[list[Read]] | str, int]] = deque([(done("a"), TAKE_BYTES), (done("b"), TAKE_BYTES)])
    assert take_read(ahead)[1] == TAKE_BYTES


def test_what_failed_is_raised_where_it_is_taken() -> None:
    failed = Future[list[Read]]()
    failed.set_exception(OSError("broken"))
    ahead: deque[tuple[Future[list[Read]] | str, int]] = deque([(failed, 1)])
    with pytest.raises(OSError, match="broken"):
        take_read(ahead)


def test_a_store_within_the_folder_is_left_out_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.jpg").write_bytes(b"image")
    (tmp_path / "link").symlink_to(tmp_path / "set")
    first = stage_folder(tmp_path / "set", str(tmp_path / "link/our store"))
    again = stage_folder(tmp_path / "set", str(tmp_path / "set/our store"))
    assert (first.files, again.files, again.version) == (1, 1, first.version)
    assert again.left_out["the store itself"][0] == 1
    with pytest.raises(TrainerError, match="is the store itself"):
        stage_folder(tmp_path / "set", str(tmp_path / "link"))


def test_a_large_file_that_goes_away_meanwhile_is_told_as_gone(tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    store = open_store((tmp_path / "store").as_uri())
    with pytest.raises(TrainerError, match="vanished while the folder was staged"):
        put_file(store, "files/ab/cd", file, bytes(32), 100)


def test_a_large_file_that_changes_meanwhile_leaves_the_object_of_another_dataset(tmp_path: Path) -> None:
    file = tmp_path / "large.bin"
    content = os.urandom(20 * 2**20)
    file.write_bytes(content)
    digest = hashlib.sha256(content).digest()
    store = open_store((tmp_path / "store").as_uri())
    put_file(store, "files/ab/cd", file, digest, len(content))
    file.write_bytes(content[:-1] + b"?")
    for key in ("files/ab/cd", "files/ab/other"):
        with pytest.raises(TrainerError, match="changed while it was staged"):
            put_file(store, key, file, digest, len(content))
    assert {path.name: path.read_bytes() == content for path in (tmp_path / "store").rglob("*") if path.is_file()} == {"cd": True}


@pytest.mark.parametrize("other", ["folder", "name"])
def test_whoever_stages_the_folder_or_the_dataset_already_is_waited_for_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    for name in ("set", "other set"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"image")
    store_uri = (tmp_path / "store").as_uri()
    root, name = (tmp_path / "set", "another") if other == "folder" else (tmp_path / "other set", "one")
    heard: Queue[str] = Queue()
    with ThreadPoolExecutor() as pool:
        with StatCache(tmp_path / "set", store_uri, "one"):
            staging = pool.submit(stage_folder, root, store_uri, name, on_silence=heard.put)
            assert re.fullmatch(
                rf"waiting for process {os.getpid()} on \S+, which stages this folder or dataset: .*", heard.get(timeout=20)
            )
            assert not staging.done()
        assert staging.result(timeout=20).files == 1


def test_how_much_there_is_in_all_is_counted_for_whoever_watches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("blocks.counting.COUNT_AFTER_SECONDS", 0.0)
    (tmp_path / "set").mkdir()
    for number in range(300):
        (tmp_path / f"set/{number}").write_bytes(b"%d" % (number // 2))  # each content twice
    told: list[Counts] = []

    def look(counts: Counts) -> None:
        while not counts.total_files:
            time.sleep(0.001)
        told.append(replace(counts))

    staged = stage_folder(tmp_path / "set", str(tmp_path / "store"), on_progress=look)
    last = told[-1]
    assert (last.done_files, last.done_bytes) == (last.total_files, last.total_bytes) == (staged.files, staged.bytes) == (300, 680)
    assert last.reused_bytes == 680 / 2
    os.utime(tmp_path / "set/7", (1e9, 1e9))
    stage_folder(tmp_path / "set", str(tmp_path / "store"), on_progress=look)
    assert (told[-1].done_files, told[-1].reused_bytes, told[-1].sent_bytes) == (300, 680, 0)


def test_a_file_that_vanishes_before_it_is_read_is_told_as_gone(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="vanished while the folder was staged"):
        read_file(str(tmp_path / "gone.jpg"), "gone.jpg")


def test_a_file_that_is_rewritten_in_place_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is as long as it was: what was read may be half of each."""
    file = tmp_path / "label.txt"
    file.write_bytes(b"before")
    os.utime(file, (1e9, 1e9))

    def torn(descriptor: int, size: int) -> bytes:
        content = os.read(descriptor, size // 2)
        file.write_bytes(b"behind")
        return content + read_all(descriptor, size - len(content))

    monkeypatch.setattr("blocks.reading.read_all", torn)
    with pytest.raises(TrainerError, match="changed while it was staged"):
        read_file(str(file), file.name)


def test_a_file_written_just_before_it_was_read_is_read_again_however_long_it_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has been read waits for the store: by then the file looks old, but one more write in the same tick would not show."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.txt").write_bytes(b"written just now")
    now = time.time_ns

    def late(ahead: deque[tuple[Future[list[Read]] | str, int]]) -> tuple[list[Read] | str, int]:
        taken = take_read(ahead)
        monkeypatch.setattr(time, "time_ns", lambda: now() + 60 * 10**9)
        return taken

    monkeypatch.setattr("blocks.staging.take_read", late)
    for _ in range(2):
        assert stage_folder(tmp_path / "set", str(tmp_path / "store")).changed_files == 1


# --- A store that is not as the cache remembers it -------------------------------------------------------


def write_numbers(root: Path, numbers: Iterable[int]) -> None:
    root.mkdir(exist_ok=True)
    for place, number in enumerate(numbers):
        (root / f"{place:02d}.txt").write_bytes(b"%d" % number * 100)
        os.utime(root / f"{place:02d}.txt", (1e9, 1e9 + number))


@pytest.mark.parametrize("change", ["little", "much"])
@pytest.mark.parametrize("store_now", ["staged from another home", "restored from a copy", "without what no ref needs"])
def test_a_store_that_has_the_same_version_and_other_packs_gets_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store_now: str, change: str
) -> None:
    """The ref is as it was, the packs are not: what the manifest names is there all the same, and the version whole."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    root, store = tmp_path / "set", tmp_path / "store"
    numbers = list(range(20))
    write_numbers(root, numbers)
    first = stage_folder(root, str(store))
    shutil.copytree(store, tmp_path / "copy")
    before = set(store.rglob("*.tar"))
    changed = [100, *numbers[1:]] if change == "little" else [*range(100, 110), *numbers[10:]]
    write_numbers(root, changed)
    second = stage_folder(root, str(store))
    write_numbers(root, numbers)
    assert stage_folder(root, str(store)).version == first.version
    if store_now == "restored from a copy":
        shutil.rmtree(store)
        shutil.copytree(tmp_path / "copy", store)
    elif store_now == "staged from another home":
        shutil.rmtree(store)
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("TRAINYARD_HOME", str(tmp_path / "other home"))
            elsewhere.setattr("blocks.uploads.PACK_BYTES", 2000)
            assert stage_folder(root, str(store)).version == first.version
    else:
        for pack in set(store.rglob("*.tar")) - before:
            pack.unlink()
        (store / f"manifests/{second.version}.jsonl.gz").unlink()
    write_numbers(root, changed)
    again = stage_folder(root, str(store))
    assert again.version == second.version
    assert verify_version(str(store), again.version).files == 20
    assert stage_folder(root, str(store)).changed_files == 0


def damage_first_file(pack: Path) -> None:
    content = pack.read_bytes()
    pack.write_bytes(content[:BLOCK] + bytes([content[BLOCK] ^ 1]) + content[BLOCK + 1 :])


@pytest.mark.parametrize("mended_from", ["this home", "another home"])
def test_a_version_that_lies_in_a_damaged_pack_names_what_was_sent_anew_once_it_is_staged_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mended_from: str
) -> None:
    """As a training stages some files of a folder, and the mend that is hinted at stages all: another version, and another pack."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    root, store = tmp_path / "set", tmp_path / "store"
    write_numbers(root, range(20))
    wanted = sorted(path.name for path in root.iterdir())
    (root / "notes.txt").write_bytes(b"nobody trains on this")
    used = stage_folder(root, str(store), only=wanted)
    [pack] = store.rglob("*.tar")
    damage_first_file(pack)
    with monkeypatch.context() as elsewhere:
        if mended_from == "another home":
            elsewhere.setenv("TRAINYARD_HOME", str(tmp_path / "other home"))
        assert stage_folder(root, str(store), again=True).files == 21
    assert stage_folder(root, str(store), only=wanted).version == used.version
    assert verify_version(str(store), used.version).files == 20


def test_a_manifest_that_was_mended_from_another_home_is_kept_and_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This home remembers of the version the pack that is damaged since."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    root, store = tmp_path / "set", tmp_path / "store"
    write_numbers(root, range(20))
    first = stage_folder(root, str(store))
    [pack] = store.rglob("*.tar")
    write_numbers(root, range(100, 120))
    stage_folder(root, str(store))
    damage_first_file(pack)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("TRAINYARD_HOME", str(tmp_path / "other home"))
        elsewhere.setattr("blocks.uploads.PACK_BYTES", 2000)
        for numbers in (range(20), range(100, 120)):
            write_numbers(root, numbers)
            stage_folder(root, str(store), again=numbers.start == 0)
    for numbers in ([*range(20)], [*range(10), *range(200, 210)]):
        write_numbers(root, numbers)
        assert verify_version(str(store), stage_folder(root, str(store)).version).files == 20
    assert verify_version(str(store), first.version).files == 20


def damage_page(path: Path, content: bytes) -> None:
    """The page of SQLite's that has the content."""
    start = path.read_bytes().index(content) // 4096 * 4096
    with path.open("r+b") as file:
        file.seek(start)
        file.write(b"\xa5" * 4096)


@pytest.mark.parametrize("damage", ["a page", "all of it"])
def test_a_damaged_cache_is_put_aside_and_told_and_nothing_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    (tmp_path / "set").mkdir()
    for number in range(2000):
        image = tmp_path / f"set/an image with a long name {number:06}.jpg"
        image.write_bytes(b"%d" % number)
        os.utime(image, (1e9, 1e9))
    first = stage_folder(tmp_path / "set", str(tmp_path / "store"))
    [cache] = (tmp_path / "home/staging").glob("*.sqlite")
    damage_page(cache, b"name 001000") if damage == "a page" else cache.write_bytes(b"no database at all" * 1000)
    broken = cache.read_bytes()
    told: list[str] = []
    again = stage_folder(tmp_path / "set", str(tmp_path / "store"), on_silence=told.append)
    assert (again.version, again.sent_bytes, again.changed_files) == (first.version, 0, 2000)
    [line] = told
    assert "is damaged, and put aside as" in line
    assert str(cache) in line
    assert cache.with_name(f"{cache.name}.damaged").read_bytes() == broken
    unchanged = stage_folder(tmp_path / "set", str(tmp_path / "store"), on_silence=told.append)
    assert (unchanged.version, unchanged.changed_files, len(told)) == (first.version, 0, 1)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_change_of_a_version_whose_older_manifest_is_lost_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    """As a bucket's own rule drops what is old; the newest manifest says what differs from it."""
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    root, store = tmp_path / "set", tmp_path / "store"
    numbers = list(range(20))
    write_numbers(root, numbers)
    oldest = store / f"manifests/{stage_folder(root, str(store)).version}.jsonl.gz"
    write_numbers(root, [100, *numbers[1:]])
    stage_folder(root, str(store))
    oldest.unlink() if damage == "gone" else oldest.write_bytes(oldest.read_bytes()[:-9])
    write_numbers(root, [101, *numbers[1:]])
    assert verify_version(str(store), stage_folder(root, str(store)).version).files == 20


def test_a_folder_that_is_not_there_leaves_no_empty_store(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="is not a folder"):
        stage_folder(tmp_path / "none", str(tmp_path / "store"), "set")
    assert not (tmp_path / "store").exists()
