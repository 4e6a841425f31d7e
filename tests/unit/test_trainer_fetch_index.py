from __future__ import annotations

import hashlib
from pathlib import Path

from hypothesis import given, strategies as st

from trainer.fetch_index import GAP_BYTES, PART_BYTES, FetchIndex, Needs, Wanted, cut_parts, wanted
from trainer.packs import InPlace, StagedFile


def test_each_folder_is_counted_once_and_none_that_is_there() -> None:
    needs = Needs(4096, {"a"}.__contains__)
    for path, size, there in (("a/b/1", 5000, None), ("a/b/2", 0, None), ("a/b/c/3", 1, 1), ("a/bb/4", 4097, 1), ("ü", 1, None)):
        needs.add(path, size, there)
    assert needs.entries == 3 + len(["a/b", "a/b/c", "a/bb"])
    assert needs.bytes == 4096 * (2 + 0 + 0 + 1 + 1 + 3) + len("a/b/1a/b/2a/b/c/3a/bb/4ü".encode())


FILES = st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 3 * GAP_BYTES), st.integers(0, PART_BYTES + GAP_BYTES)), max_size=20)


@given(FILES)
def test_parts_hold_each_file_once_and_are_no_longer_than_needed(places: list[tuple[str, int, int]]) -> None:
    files = sorted(Wanted(key, offset, bytes(32), str(number), size) for number, (key, offset, size) in enumerate(places))
    parts = list(cut_parts(files))
    assert sorted(file for part in parts for file in part.files) == files
    for part in parts:
        assert all(file.key == part.key and part.start <= file.offset and file.offset + file.size <= part.end for file in part.files)
        assert not part.is_large or len({(file.offset, file.size) for file in part.files}) == 1
        assert (part.start, part.end) == (part.files[0].offset, max(file.offset + file.size for file in part.files))


def test_the_index_sorts_by_object_and_leaves_nothing(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"").digest()
    files = [StagedFile(f"{pack}{offset}", digest, 1, pack * 64, offset) for offset in (3, 1, 2) for pack in ("b", "a")]
    lent = StagedFile("z", digest, 1, "", 0, InPlace("s3://bucket/images", "z.jpg"))
    (tmp_path / "index").write_text("of a fetch that was killed")
    index = FetchIndex(tmp_path / "index")
    index.fill([*files, lent])
    assert list(index.files()) == sorted(map(wanted, files))
    assert list(index.files_in_place()) == [lent]
    index.sort_paths()
    assert (index.has("a1"), index.has("z"), index.has("a9")) == (True, True, False)
    index.close()
    assert list(tmp_path.iterdir()) == []
