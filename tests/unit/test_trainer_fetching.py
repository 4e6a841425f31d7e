from __future__ import annotations

import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.components import skip_or_fail
from tests.staged_store import read_tree, write, write_store
from trainer import fetching
from trainer.contract import ExitCode, TrainerError
from trainer.fetch_index import PART_BYTES
from trainer.fetching import fetch_version, read_header, read_version
from trainer.file_tree import FileTree, NameRules, open_root
from trainer.packs import ManifestHeader, file_key, manifest_key, write_manifest
from trainer.ranges import FEWEST_STREAMS, MOST_STREAMS, next_streams
from trainer.storage import open_store
from trainer.verifying import verify_version

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"a/1.txt": b"one", "a/2.txt": b"two", "b/copy of 1": b"one", "empty": b""}
LARGE = random.Random(1).randbytes(2 * PART_BYTES + 12345)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Ranges of objects that were read."""
    import obstore

    real = obstore.get_range
    seen: list[tuple[str, int, int]] = []

    def counted(store: Any, path: str, *, start: int, end: int) -> Any:
        seen.append((path, start, end))
        return real(store, path, start=start, end=end)

    monkeypatch.setattr(obstore, "get_range", counted)
    return seen


def partial(to: Path, version: str) -> Path:
    return to.with_name(f"{to.name}.partial-{version[:12]}")


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("copy"))


# --- Files ---------------------------------------------------------------------------------------------


def test_files_of_all_kinds_arrive(store: Path, tmp_path: Path) -> None:
    """Also one that is larger than a read and yet in a pack, and copies of it."""
    packed = {**SMALL, "large in a pack": LARGE, "large again": LARGE}
    alone = {"c/large": LARGE[1:], "copy of large": LARGE[1:], "no longer than a read": LARGE[:PART_BYTES], "short": b"x"}
    version = write_store(store, packed, alone)
    progress: list[tuple[int, int]] = []
    fetched = fetch_version(str(store), version, tmp_path / "copy", lambda done, total: progress.append((done, total)))
    assert read_tree(tmp_path / "copy") == {**packed, **alone}
    assert fetched.fetched_bytes == fetched.bytes == sum(map(len, [*packed.values(), *alone.values()]))
    assert fetched.fetched_files == fetched.files == len(packed) + len(alone)
    assert progress[-1] == (fetched.bytes, fetched.bytes)
    assert left(tmp_path) == ["copy"], "neither lock nor index nor half a folder"
    with pytest.raises(TrainerError, match="no dataset version"):
        fetch_version(str(store), "0" * 64, tmp_path / "copy of none")
    assert left(tmp_path) == ["copy"], "what is refused leaves no lock either"
    assert read_header(str(store), version).bytes == fetched.bytes
    assert verify_version(str(store), version).files == fetched.files


def test_a_large_file_goes_on_from_the_bytes_that_are_there(store: Path, tmp_path: Path, reads: list[tuple[str, int, int]]) -> None:
    version = write_store(store, SMALL, {"large": LARGE})
    kept = 2 * PART_BYTES
    write(partial(tmp_path / "copy", version) / "large", LARGE[:kept])
    fetched = fetch_version(str(store), version, tmp_path / "copy")
    assert [(start, end) for key, start, end in reads if key.startswith("files/")] == [(kept, len(LARGE))]
    assert fetched.fetched_bytes == fetched.bytes - kept
    assert read_tree(tmp_path / "copy") == {**SMALL, "large": LARGE}


@pytest.mark.parametrize("there", [b"", b"something else", LARGE + b"longer", b"\0" * len(LARGE)])
def test_a_large_file_that_is_not_the_beginning_is_fetched_anew(store: Path, tmp_path: Path, there: bytes) -> None:
    version = write_store(store, SMALL, {"large": LARGE})
    write(partial(tmp_path / "copy", version) / "large", there)
    progress: list[int] = []
    fetched = fetch_version(str(store), version, tmp_path / "copy", lambda done, _: progress.append(done))
    assert read_tree(tmp_path / "copy") == {**SMALL, "large": LARGE}
    assert progress[-1] == fetched.fetched_bytes == fetched.bytes


def test_a_copy_that_is_there_is_not_fetched_again(store: Path, tmp_path: Path, reads: list[tuple[str, int, int]]) -> None:
    version = write_store(store, SMALL, {"large": LARGE, "large too": LARGE})
    write(partial(tmp_path / "copy", version) / "large too", LARGE)
    fetch_version(str(store), version, tmp_path / "copy")
    assert [key for key, _, _ in reads if key.startswith("files/")] == []
    assert read_tree(tmp_path / "copy") == {**SMALL, "large": LARGE, "large too": LARGE}


def test_what_a_fetch_of_another_version_left_is_gone_on_with(store: Path, tmp_path: Path, reads: list[tuple[str, int, int]]) -> None:
    """A name may mean a newer version when a fetch that was cut is repeated."""
    old, older = (partial(tmp_path / "copy", letter * 64) for letter in "ab")
    write(old / "large", LARGE)
    write(old / "gone.txt", b"of the older version")
    write(old / "a/1.txt", b"two")
    write(older / "large", LARGE[1:])
    os.utime(older, (1e9, 1e9))
    write(tmp_path / "copy.partial-of mine/1", b"nobody else's")
    fetch_version(str(store), write_store(store, SMALL, {"large": LARGE}), tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == {**SMALL, "large": LARGE}
    assert [key for key, _, _ in reads if key.startswith("files/")] == [], "the large file was there"
    assert left(tmp_path) == ["copy", "copy.partial-of mine"]


def test_what_is_not_of_the_version_does_not_come_along(store: Path, tmp_path: Path) -> None:
    version = write_store(store, SMALL)
    folder = partial(tmp_path / "copy", version)
    write(folder / "x/y/other.jpg", b"not of the version")
    (folder / "x/link").symlink_to(tmp_path)
    fetch_version(str(store), version, tmp_path / "copy")
    assert read_tree(tmp_path / "copy") == SMALL
    assert not (tmp_path / "copy/x").exists()


@pytest.mark.parametrize("cut", ["files/", "packs/"])
def test_an_object_that_is_too_short_is_told_as_damage(store: Path, tmp_path: Path, cut: str) -> None:
    version = write_store(store, SMALL, {"large": LARGE})
    [path] = (path for path in (store / cut).rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(TrainerError, match="is damaged: it ends before") as refused:
        fetch_version(str(store), version, tmp_path / "copy")
    assert refused.value.code is ExitCode.DATA


# --- What is there already -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/1.txt", "large"])
def test_a_file_that_was_damaged_since_is_found_though_its_size_is_right(store: Path, tmp_path: Path, name: str) -> None:
    """Also with its old time: a write leaves another trace. Nothing of a folder that may be somebody's own is overwritten."""
    version, to, verified = write_store(store, SMALL, {"large": LARGE}), tmp_path / "copy", tmp_path / "memory/of copy"
    fetch_version(str(store), version, to, verified=verified)
    before = (to / name).stat()
    damaged = b"\0" + (to / name).read_bytes()[1:]
    (to / name).write_bytes(damaged)
    os.utime(to / name, ns=(before.st_atime_ns, before.st_mtime_ns))
    for memory in (verified, None):
        with pytest.raises(TrainerError, match=f"{name} is not as it was staged") as refused:
            fetch_version(str(store), version, to, verified=memory)
        assert refused.value.code is ExitCode.OCCUPIED
    assert (to / name).read_bytes() == damaged
    assert fetch_version(str(store), version, to, verified=verified, repair=lambda *_: None).fetched_files == 1
    assert read_tree(to) == {**SMALL, "large": LARGE}
    assert fetch_version(str(store), version, to).fetched_files == 0


def test_what_was_verified_is_not_read_again_until_it_changes(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version, to, verified = write_store(store, SMALL), tmp_path / "copy", tmp_path / "memory"
    hashed: list[str] = []
    real = FileTree.holds

    def holds(tree: FileTree, path: str, size: int, digest: bytes) -> bool:
        hashed.append(path)
        return real(tree, path, size, digest)

    monkeypatch.setattr(FileTree, "holds", holds)
    fetch_version(str(store), version, to, verified=verified)
    assert fetch_version(str(store), version, to, verified=verified).fetched_files == 0
    assert hashed == []
    os.utime(to / "b/copy of 1", (1e9, 1e9))
    for _ in range(2):
        assert fetch_version(str(store), version, to, verified=verified).fetched_files == 0
    assert sorted(hashed) == sorted(SMALL), "once, as all of it was right"
    assert fetch_version(str(store), version, to, verified=Path("/proc/none/memory")).fetched_files == 0, "it is only a memory"


def test_a_link_to_an_empty_folder_is_where_the_files_come_to(store: Path, tmp_path: Path) -> None:
    version = write_store(store, SMALL)
    (tmp_path / "disk/room").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk/room")
    fetch_version(str(store), version, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert read_tree(tmp_path / "disk/room") == SMALL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "store"]


@pytest.mark.parametrize("to", [".", "../here", "/"])
def test_a_folder_that_cannot_be_replaced_is_refused_before_any_byte(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[tuple[str, int, int]], to: str
) -> None:
    """The current one, after which a shell would stand in one that is gone, and the root."""
    version = write_store(store, SMALL)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(TrainerError) as refused:
        fetch_version(str(store), version, Path(to))
    assert refused.value.code is ExitCode.OCCUPIED
    assert "folder" in refused.value.hint
    assert reads == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "store"]


MOUNTED = """
import sys
from pathlib import Path
import obstore
from trainer.fetching import fetch_version
obstore.get_range = lambda *_, **__: sys.exit("a byte was read")
fetch_version(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mounts in a namespace of its own, which only Linux has")
@pytest.mark.parametrize("mount", ["-t tmpfs tmpfs", "--bind other"])
def test_a_mount_point_is_refused_before_any_byte(store: Path, tmp_path: Path, mount: str) -> None:
    version = write_store(store, SMALL)
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
    if shutil.which("unshare") is None:
        skip_or_fail("not here: unshare (apt-get install util-linux)")
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'mount {mount} data || exit 99; exec "$@"', "sh"]
    paths = (str(store), version, str(tmp_path / "data"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [*command, sys.executable, "-c", MOUNTED, *paths]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 99 or "unshare failed" in done.stderr:
        skip_or_fail(f"nothing can be mounted here: {done.stderr}")
    assert "TrainerError" in done.stderr.splitlines()[-1]
    assert f"something is mounted at {tmp_path / 'data'}" in done.stderr
    assert f"{tmp_path / 'data'}/{version[:12]}" in done.stderr, "the hint names a folder that works"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "other", "store"]


# --- Hostile stores and folders ------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "a"])
def test_a_prepared_link_to_a_folder_is_refused(store: Path, tmp_path: Path, where: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    version = write_store(store, SMALL)
    link = partial(tmp_path / "copy", version) / where
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(outside)
    with pytest.raises(TrainerError, match="is a link or a file, and should be a folder") as refused:
        fetch_version(str(store), version, tmp_path / "copy")
    assert refused.value.code is ExitCode.OCCUPIED
    assert list(outside.iterdir()) == []
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("name", ["a/1.txt", "large"])
def test_a_prepared_link_to_a_file_is_replaced(store: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"precious")
    version = write_store(store, SMALL, {"large": LARGE})
    link = partial(tmp_path / "copy", version) / name
    link.parent.mkdir(parents=True)
    link.symlink_to(outside)
    fetch_version(str(store), version, tmp_path / "copy")
    assert outside.read_bytes() == b"precious"
    assert not (tmp_path / "copy" / name).is_symlink()
    assert read_tree(tmp_path / "copy") == {**SMALL, "large": LARGE}


def test_a_link_that_appears_meanwhile_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "root/a").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    with open_root(tmp_path / "root") as root, FileTree(root, tmp_path / "root") as tree:
        tree.write("b/1", memoryview(b"x"))
        (tmp_path / "root/a").rmdir()
        (tmp_path / "root/a").symlink_to(tmp_path / "outside")
        with pytest.raises(TrainerError, match="is a link"):
            tree.write("a/1", memoryview(b"x"))
    assert list((tmp_path / "outside").iterdir()) == []


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_path_that_is_file_and_folder_is_refused(store: Path, tmp_path: Path, names: tuple[str, str]) -> None:
    version = write_store(store, {name: name.encode() for name in names})
    with pytest.raises(TrainerError, match="as a file and as a folder") as refused:
        fetch_version(str(store), version, tmp_path / "copy")
    assert refused.value.code is ExitCode.DATA
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("promised", [{"bytes": 2**60}, {"files": 2**50}])
def test_a_version_that_does_not_fit_is_refused_before_anything_is_written(store: Path, tmp_path: Path, promised: dict[str, int]) -> None:
    version = write_store(store, SMALL, None, **promised)
    with pytest.raises(TrainerError) as refused:
        fetch_version(str(store), version, tmp_path / "copy")
    assert refused.value.code in (ExitCode.DISK_FULL, ExitCode.DATA)
    assert read_tree(partial(tmp_path / "copy", version)) == {}


def test_a_manifest_without_end_is_not_read_into_memory(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_MANIFEST_BYTES", 100)
    with pytest.raises(TrainerError, match="have more than"):
        fetch_version(str(store), write_store(store, SMALL), tmp_path / "copy")


def plant_chain(store: Path, length: int, **header: Any) -> str:
    """A version whose manifest is the first of so many, each of which says nothing but the next."""
    versions = [f"{number:064x}" for number in range(length)]
    for version, base in zip(versions, [*versions[1:], None], strict=True):
        out = io.BytesIO()
        write_manifest(out, ManifestHeader(version=version, base=base, files=1, bytes=1, packs=(), **header), [])
        write(store / manifest_key(version), out.getvalue())
    return versions[0]


@pytest.mark.parametrize(("length", "header"), [(17, {}), (16, {"sources": ("x" * 2**20,) * 5})])
def test_what_a_chain_of_manifests_says_in_all_has_a_limit(store: Path, tmp_path: Path, length: int, header: dict[str, Any]) -> None:
    """Each of these may be read by itself; their headers stay in memory together."""
    with pytest.raises(TrainerError, match=r"the manifests of version .* name ") as refused:
        read_version(open_store(str(store)), plant_chain(store, length, **header))
    assert refused.value.code is ExitCode.DATA
    assert read_version(open_store(str(store)), plant_chain(store, 16))[0].files == 1


@pytest.mark.parametrize(
    ("rules", "names"),
    [
        (NameRules(ignores_case=True, composes=False), ("Cat.jpg", "cat.jpg")),
        (NameRules(ignores_case=True, composes=False), ("Cat/1.jpg", "cat/2.jpg")),
        (NameRules(ignores_case=True, composes=True), ("STRASSE", "straße")),
        (NameRules(ignores_case=False, composes=True), ("caf\u00e9.jpg", "cafe\u0301.jpg")),
    ],
)
def test_names_that_the_file_system_takes_for_one_are_refused(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: NameRules, names: tuple[str, str]
) -> None:
    version = write_store(store, {**SMALL, **{name: name.encode() for name in names}})
    fetch_version(str(store), version, tmp_path / "a file system that tells them apart")
    monkeypatch.setattr(fetching, "probe_names", lambda root: rules)
    with pytest.raises(TrainerError, match=r"takes .* for one name") as refused:
        fetch_version(str(store), version, tmp_path / "copy")
    assert refused.value.code is ExitCode.CONFIG
    assert all(repr(name.split("/")[0]) in str(refused.value) for name in names)
    fetch_version(str(store), write_store(store, SMALL), tmp_path / "no two names are one")


def test_a_second_file_of_the_same_name_is_refused_in_any_case(tmp_path: Path) -> None:
    with open_root(tmp_path) as root, FileTree(root, tmp_path) as tree:
        tree.write("a", memoryview(b"first"))
        with pytest.raises(TrainerError, match="takes two names for one"):
            tree.write("a", memoryview(b"second"))
    assert (tmp_path / "a").read_bytes() == b"first"


# --- Pace, and what is missing ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("streams", "reading", "writing", "then"),
    [
        (8, 0.05, 0.01, 9),  # the way takes the time
        (8, 0.01, 0.05, 8),  # the disk does
        (8, 3.0, 0.01, 8),  # the link is full
        (8, 20.0, 0.01, 7),  # and parts come close to their time limit
        (MOST_STREAMS, 0.05, 0.01, MOST_STREAMS),
        (FEWEST_STREAMS, 20.0, 0.01, FEWEST_STREAMS),
    ],
)
def test_streams_follow_what_takes_the_time(streams: int, reading: float, writing: float, then: int) -> None:
    assert next_streams(streams, reading, writing) == then


def test_a_missing_large_file_is_told(store: Path, tmp_path: Path) -> None:
    version = write_store(store, SMALL, {"large": LARGE})
    (store / file_key(hashlib.sha256(LARGE).digest())).unlink()
    with pytest.raises(TrainerError, match="the store lacks files/"):
        fetch_version(str(store), version, tmp_path / "copy")


@pytest.mark.parametrize("read", ["fetch", "verify"])
def test_the_hint_of_a_damaged_object_names_the_store(store: Path, tmp_path: Path, read: str) -> None:
    version = write_store(store, SMALL)
    [path] = (path for path in (store / "packs").rglob("*") if path.is_file())
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(TrainerError, match="is damaged") as refused:
        fetch_version(str(store), version, tmp_path / "copy") if read == "fetch" else verify_version(str(store), version)
    assert f"--store {store} --again" in str(refused.value.hint)
