from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import pytest

from blocks.scanning import Scan
from trainer.contract import ExitCode, TrainerError


def write(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return root


def paths(root: Path) -> list[str]:
    return [path for path, _ in Scan(root).files()]


def test_files_come_in_the_order_of_their_paths(tmp_path: Path) -> None:
    names = ["a/b.jpg", "a-b/c.jpg", "a.jpg", "a/ü 日本 x.jpg", "z", "Z", f"long/{'n' * 200}.txt"]
    assert paths(write(tmp_path, *names)) == sorted(names)


def test_what_is_no_data_is_left_out(tmp_path: Path) -> None:
    names = [
        ".git/config",
        "sub/__pycache__/a.pyc",
        "labels.cache",
        ".DS_Store",
        "env/pyvenv.cfg",
        "env/lib/x.py",
        "keep/a.jpg",
        ".hidden.txt",
    ]
    assert paths(write(tmp_path, *names)) == [".hidden.txt", "keep/a.jpg"]


def test_the_ignore_file_follows_the_rules_of_gitignore(tmp_path: Path) -> None:
    write(tmp_path, "raw/a.jpg", "sub/raw/b.jpg", "x.tmp", "keep.tmp", "c.jpg")
    (tmp_path / ".trainyardignore").write_text("# drafts\nraw/\n*.tmp\n!keep.tmp\n.trainyardignore\n")
    assert paths(tmp_path) == ["c.jpg", "keep.tmp"]


def test_links_are_followed_within_the_folder_only(tmp_path: Path) -> None:
    root = write(tmp_path / "root", "a.jpg", "folder/b.jpg")
    write(tmp_path, "secret")
    (root / "out.jpg").symlink_to(tmp_path / "secret")
    (root / "in.jpg").symlink_to("folder/b.jpg")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    scan = Scan(root)
    assert [(path, stat.size) for path, stat in scan.files()] == [("a.jpg", 5), ("folder/b.jpg", 12), ("in.jpg", 12)]
    assert scan.left_out == {"links out of the folder or to folders": (2, "loop"), "neither file nor folder": (1, "pipe")}


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"bad\xff.jpg")).touch()
    with pytest.raises(TrainerError, match="rename the file") as refused:
        paths(tmp_path)
    assert refused.value.code == ExitCode.DATA
    assert refused.value.message == f"the name of {tmp_path}/bad\\xff.jpg is not UTF-8 text"
    (tmp_path / ".trainyardignore").write_text("bad*.jpg\n")
    assert paths(tmp_path) == [".trainyardignore"]


def test_folders_in_folders_end_somewhere(tmp_path: Path) -> None:
    """As deep as a manifest can say, and no deeper: a folder without end would take all that a process may open."""
    deepest = "a/" * 127 + "1.jpg"
    assert paths(write(tmp_path, deepest)) == [deepest]
    (tmp_path / ("a/" * 127) / "a").mkdir()
    with pytest.raises(TrainerError, match="deeper than 128 folders") as refused:
        paths(tmp_path)
    assert refused.value.code is ExitCode.DATA


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="not a folder"):
        paths(tmp_path / "none")


@pytest.mark.parametrize("pattern", ["!", "a\\", "[z-a]", "[", "raw/[a-z", "[]", "[!]"])
def test_a_line_that_is_no_pattern_is_named(tmp_path: Path, pattern: str) -> None:
    write(tmp_path, "a.jpg")
    (tmp_path / ".trainyardignore").write_text(f"*.log\n{pattern}\n")
    with pytest.raises(TrainerError, match=r"line 2: .* is no pattern") as refused:
        paths(tmp_path)
    assert refused.value.code == ExitCode.DATA


def test_brackets_that_are_closed_or_escaped_or_of_a_comment_are_none_to_complain_of(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "b.jpg", "]", "[c.jpg")
    (tmp_path / ".trainyardignore").write_text("# [not closed\n[a]*\n[]]\n\\[c.jpg\n.trainyardignore\n")
    assert paths(tmp_path) == ["b.jpg"]


@pytest.mark.parametrize("gone", ["a/2.txt", "b"])
def test_what_vanishes_during_the_walk_is_told_as_gone(tmp_path: Path, gone: str) -> None:
    for name in ("a/1.txt", "a/2.txt", "b/1.txt", "b/2.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = Scan(tmp_path).files()
    assert next(found)[0] == "a/1.txt"
    victim = tmp_path / gone
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    with pytest.raises(TrainerError, match=f"{gone} vanished while the folder was staged") as told:
        list(found)
    assert (told.value.code, "run it again" in (told.value.hint or "")) == (ExitCode.DATA, True)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), folder)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        paths(tmp_path)


def open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def test_a_walk_that_ends_early_leaves_no_folder_open(tmp_path: Path) -> None:
    write(tmp_path, "a/b/1.txt", "a/b/2.txt")
    before = open_files()
    found = Scan(tmp_path).files()
    assert next(found)[0] == "a/b/1.txt"
    assert open_files() > before
    del found
    assert open_files() == before
