from __future__ import annotations

from pathlib import Path

import pytest

from trainer.packs import InPlace, StagedFile
from trainer.partial_folders import choose_partial, remove_partials


def staged(path: str, in_place: InPlace | None = None) -> StagedFile:
    return StagedFile(path, bytes(32), 1, "", 0, in_place)


@pytest.mark.parametrize(
    ("files", "taken"),
    [
        ([staged("a/1"), staged("new/2"), staged("c")], True),
        ([staged("a/1"), staged("z", InPlace("s3://bucket", "z"))], False),
        ([staged("a")], False),  # a folder there
        ([staged("a/1/2")], False),  # a file there
    ],
)
def test_another_versions_folder_is_taken_over_where_all_can_come_to_it(tmp_path: Path, files: list[StagedFile], taken: bool) -> None:
    (tmp_path / "to.partial-aaaaaaaaaaaa/a").mkdir(parents=True)
    (tmp_path / "to.partial-aaaaaaaaaaaa/a/1").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/1").touch()
    (tmp_path / "to.partial-bbbbbbbbbbbb").symlink_to(tmp_path / "elsewhere")
    folder = choose_partial(tmp_path / "to", "c" * 64, lambda: files)
    assert (folder.name, folder.is_dir()) == ("to.partial-cccccccccccc", taken)
    remove_partials(tmp_path / "to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "to.partial-bbbbbbbbbbbb"], "a link is nobody's rest"
    assert (tmp_path / "elsewhere/1").exists()
