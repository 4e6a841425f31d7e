from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import obstore
import pytest

from trainer.contract import ExitCode, TrainerError
from trainer.in_place import Sources, fetch_in_place, find_identity, verify_in_place
from trainer.packs import InPlace, ManifestHeader, StagedFile, object_key, open_manifest, write_manifest
from trainer.storage import open_store

VERSION = "cd" * 32
SOURCE = "s3://bucket/some where"
TIME = datetime(2026, 11, 24, 10, tzinfo=UTC)


def meta(**values: Any) -> Any:
    return {"path": "a.jpg", "size": 3, "e_tag": '"abc"', "last_modified": TIME, "version": None, **values}


def in_place(path: str, source: str = SOURCE) -> StagedFile:
    return StagedFile(path, hashlib.sha256(path.encode()).digest(), 3, "", 0, InPlace(source, f"sub/{path}"))


def written(lines: list[StagedFile | str], sources: tuple[str, ...]) -> bytes:
    out = io.BytesIO()
    write_manifest(out, ManifestHeader(version=VERSION, files=10, bytes=100, packs=(), sources=sources), lines)
    return out.getvalue()


def written_to(files: dict[str, bytes]) -> Callable[[StagedFile, Iterator[bytes]], None]:
    def write(file: StagedFile, content: Iterator[bytes]) -> None:
        files[file.path] = b"".join(content)

    return write


def test_files_in_place_come_back_from_a_manifest() -> None:
    lines: list[StagedFile | str] = [in_place("a ü.jpg"), in_place("b.jpg", "az://other"), "c.jpg", StagedFile("d", bytes(32), 3, "", 0)]
    header, read = open_manifest(written(lines, (SOURCE, "az://other")), VERSION)
    assert list(read) == lines
    assert header.schema_version == 2, "older versions refuse it by that"


def test_where_an_object_in_place_lies_is_no_name_in_the_store() -> None:
    assert object_key(in_place("a.jpg")) == f"{SOURCE}/sub/a.jpg"


@pytest.mark.parametrize("key", ["../a", "/a", "a//b", ""])
def test_a_key_that_leads_out_is_refused(key: str) -> None:
    file = in_place("a.jpg")._replace(in_place=InPlace(SOURCE, key))
    with pytest.raises(TrainerError, match="unsafe path"):
        list(open_manifest(written([file], (SOURCE,)), VERSION)[1])


def test_a_manifest_of_the_future_is_told_as_one() -> None:
    out = io.BytesIO()
    write_manifest(out, ManifestHeader(version=VERSION, files=1, bytes=1, packs=(), schema_version=3), [])
    with pytest.raises(TrainerError, match="written by a newer Trainyard"):
        open_manifest(out.getvalue(), VERSION)


def test_an_identity_follows_what_the_store_says_of_the_content() -> None:
    known = find_identity(SOURCE, meta())
    assert known == find_identity(SOURCE, meta(e_tag="abc", last_modified=TIME.replace(hour=11))), "quotes, and time where there is a tag"
    changed = [find_identity(SOURCE, meta(**change)) for change in ({"size": 4}, {"e_tag": '"abd"'}, {"e_tag": None})]
    changed += [find_identity("s3://other", meta()), find_identity(SOURCE, meta(e_tag=None, last_modified=TIME.replace(hour=11)))]
    assert len({known, *changed}) == 6
    assert known == find_identity(SOURCE, meta(e_tag='W/"abc"'))
    assert find_identity(SOURCE, meta(e_tag=None)) == find_identity(SOURCE, meta(e_tag=None, last_modified=TIME.replace(microsecond=5)))


def test_a_manifest_from_a_bucket_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.jpg").write_bytes(b"key")
    secret = in_place("a.jpg", tmp_path.as_uri())
    secret = secret._replace(sha256=find_identity(tmp_path.as_uri(), obstore.head(open_store(tmp_path.as_uri()), "sub/a.jpg")))
    with pytest.raises(TrainerError, match="which only one in a folder may") as refused:
        fetch_in_place([secret], "s3://bucket/store", written_to({}), lambda _: None)
    assert refused.value.code is ExitCode.PERMISSION


def test_a_source_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    missing = (tmp_path / "none").as_uri()
    with pytest.raises(TrainerError, match="is not there"):
        Sources(tmp_path.as_uri()).open(missing)
    assert not (tmp_path / "none").exists()


def test_of_many_objects_one_that_has_changed_ends_the_fetch(tmp_path: Path) -> None:
    uri, store = (tmp_path / "data").as_uri(), open_store((tmp_path / "data").as_uri())
    files: list[StagedFile] = []
    for number in range(600):
        obstore.put(store, f"{number}", b"abc")
        found = obstore.head(store, f"{number}")
        files.append(StagedFile(f"{number}", find_identity(uri, found), 3, "", 0, InPlace(uri, f"{number}")))
    sizes: list[int] = []
    verify_in_place(files, uri, sizes.append)
    assert sum(sizes) == 3 * 600
    (tmp_path / "data/300").write_bytes(b"xyz")
    fetched: dict[str, bytes] = {}
    with pytest.raises(TrainerError, match=r"data/300 has changed"):
        fetch_in_place(files, uri, written_to(fetched), sizes.append)
    assert fetched["10"] == b"abc"
    assert "300" not in fetched
