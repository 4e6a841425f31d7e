from __future__ import annotations

from pathlib import Path

import pytest

from blocks.registering import register_uri
from trainer.errors import TrainerError
from trainer.fetching import fetch_version
from trainer.storage import open_store


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))
    folder = tmp_path / "images"
    for name in ("a.jpg", "b #2.jpg", "set#1/c.jpg", "raw/d.jpg", "raw/e.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def files_of(images: Path, tmp_path: Path) -> list[str]:
    store, copy = (tmp_path / "store").as_uri(), tmp_path / "copy"
    registered = register_uri(images.as_uri(), store)
    fetch_version(store, registered.version, copy)
    return sorted(path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file())


def test_a_folder_in_place_is_what_a_stage_of_it_would_be(images: Path, tmp_path: Path) -> None:
    """Also with a link to a folder above, which has no end, and one out of it, which nobody asked for."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other/secret.jpg").touch()
    (images / "out").symlink_to(tmp_path / "other")
    (images / "loop").symlink_to("..")
    (images / ".trainyardignore").write_text("raw/\n.trainyardignore\n")
    registered = register_uri(images.as_uri(), (tmp_path / "store").as_uri())
    assert registered.left_out == {"links out of the folder or to folders": (2, "loop")}
    assert files_of(images, tmp_path) == ["a.jpg", "b #2.jpg", "set#1/c.jpg"]


def test_the_ignore_file_of_a_bucket_counts(images: Path) -> None:
    """The listing of a bucket, here of a folder: the rest of it is in the contract suite."""
    import obstore

    from blocks.listing import ignored_in

    store = open_store(images.as_uri())
    assert ignored_in(store, "s3://bucket") is None
    obstore.put(store, ".trainyardignore", b"raw/\n")
    is_ignored = ignored_in(store, "s3://bucket")
    assert is_ignored is not None
    assert (is_ignored("raw/d.jpg"), is_ignored("a.jpg")) == (True, False)
    obstore.put(store, ".trainyardignore", b"[\n")
    with pytest.raises(TrainerError, match=r"s3://bucket/.trainyardignore, line 1: '\[' is no pattern"):
        ignored_in(store, "s3://bucket")


def test_a_name_that_no_object_of_a_folder_can_have_is_told(images: Path, tmp_path: Path) -> None:
    """The library takes it for a part of an upload that is under way, so nobody could read it."""
    (images / "image.jpg#1").write_bytes(b"x")
    registered = register_uri(images.as_uri(), (tmp_path / "store").as_uri())
    [(kind, found)] = registered.left_out.items()
    assert "end with # and a number" in kind
    assert found == (1, "image.jpg#1")
    (images / "two\nlines.jpg").write_bytes(b"x")
    with pytest.raises(TrainerError, match=r"'two\\nlines.jpg' has a character") as refused:
        register_uri(images.as_uri(), (tmp_path / "store").as_uri())
    assert "rename" in refused.value.hint
