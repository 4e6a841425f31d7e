from __future__ import annotations

import gzip
import json
import os
import shlex
import unicodedata
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from blocks.garbage import Policy, collect, open_marker
from blocks.refs import read_ref, read_refs
from blocks.staging import Staged, stage_folder
from flows.cli import app
from flows.requesting import build_request
from trainer.errors import ExitCode, TrainyardError
from trainer.packs import manifest_key
from trainer.storage import list_paths, open_store, to_store_uri
from trainer.verifying import verify_version

DAMAGE = [b"", b'{"version": "ab', b"\xff", b'{"version": "", "files": 1, "bytes": 1}', b'{"version": "cells", "files": 1, "bytes": 1}']


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path / "home"))


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store with two datasets, of which the ref of one, that has two versions, can be damaged."""
    uri = str(tmp_path / "store")
    stage(tmp_path, uri, "whole", b"1")
    stage(tmp_path, uri, "my cells", b"old")
    stage(tmp_path, uri, "my cells", b"new")
    return uri


def stage(tmp_path: Path, uri: str, name: str, content: bytes, *, again: bool = False) -> Staged:
    (tmp_path / name).mkdir(exist_ok=True)
    (tmp_path / name / "1.jpg").write_bytes(content)
    return stage_folder(tmp_path / name, uri, again=again)


def damage(uri: str, content: bytes = b"{") -> None:
    (Path(uri) / "refs/my cells.json").write_bytes(content)


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["dataset", *arguments])


def error_of(done: Result) -> TrainyardError:
    assert isinstance(done.exception, TrainyardError)
    return done.exception


@pytest.mark.parametrize("content", DAMAGE)
def test_a_damaged_ref_is_listed_as_damaged_and_blocks_no_other_dataset(uri: str, tmp_path: Path, content: bytes) -> None:
    damage(uri, content)
    read = read_refs(open_store(uri), uri)
    assert (list(read.whole), list(read.damaged)) == (["whole"], ["my cells"])
    shown = call("list", "--store", uri)
    assert shown.exit_code == 0
    assert "whole" in shown.stdout
    assert "my cells" in shown.stdout
    assert "damaged" in shown.stdout
    assert f"trainyard dataset rm 'my cells' --store {uri}" in shown.stderr
    told = json.loads(call("list", "--store", uri, "--json").stdout)
    assert told["whole"]["files"] == 1
    assert list(told["my cells"]) == ["damaged"]
    assert stage(tmp_path, uri, "whole", b"2").files == 1
    assert stage(tmp_path, uri, "new", b"new").files == 1, "also what the store has under the damaged one"
    for blocked in (call("stage", str(tmp_path / "my cells"), "--store", uri), call("verify", "my cells", "--store", uri)):
        assert error_of(blocked).code is ExitCode.DATA


def test_nothing_is_freed_while_a_ref_is_damaged_until_it_is_removed(uri: str, tmp_path: Path) -> None:
    before = set(list_paths(open_store(uri), ""))
    damage(uri)
    for options in ([], ["--yes"], ["--yes", "--json"]):
        refused = error_of(call("gc", "--store", uri, "--grace", "0s", "--keep-previous", "0", *options))
        assert refused.code is ExitCode.DATA
        assert f"'my cells' in {uri} is damaged, so nobody knows which versions it needs; nothing was freed" in refused.message
    assert set(list_paths(open_store(uri), "")) == before
    command = next(part for part in refused.hint.split("`") if " rm " in part)
    assert call(*shlex.split(command)[2:], "--yes").exit_code == 0
    assert collect(open_marker(uri), uri, Policy(), ()).objects == 0, "what is young stays"
    assert call("gc", "--store", uri, "--grace", "0s", "--yes").exit_code == 0
    assert [path for path in list_paths(open_store(uri), "refs") if path.endswith(".json")] == ["refs/whole.json"]


def test_what_is_no_ref_is_not_taken_for_a_damaged_one(uri: str, tmp_path: Path) -> None:
    """macOS leaves a file of its own beside each; and HFS+ takes the accents of names apart, which stay refs."""
    stage(tmp_path, uri, "Zähne", b"3")
    refs = Path(uri) / "refs"
    (refs / "Zähne.json").rename(refs / unicodedata.normalize("NFD", "Zähne.json"))
    for foreign in ("._whole.json", "whole (copy).json", "notes.txt"):
        (refs / foreign).write_bytes(b"\0\5\x16\7")
    read = read_refs(open_store(uri), uri)
    assert ([unicodedata.normalize("NFC", name) for name in read.whole], read.damaged) == (["Zähne", "my cells", "whole"], {})
    assert call("gc", "--store", uri, "--grace", "0s", "--yes").exit_code == 0
    for ref in read.whole.values():
        assert verify_version(uri, ref.version).files == 1
    assert sum(path.name.startswith(("._", "whole (", "notes")) for path in refs.iterdir()) == 3, "nor is it deleted"


def test_staged_with_again_a_damaged_ref_is_written_anew(uri: str, tmp_path: Path) -> None:
    damage(uri)
    staged = stage(tmp_path, uri, "my cells", b"new", again=True)
    ref, _ = read_ref(open_store(uri), uri, "my cells")
    assert ref is not None
    assert (ref.version, ref.previous) == (staged.version, ())
    assert verify_version(uri, staged.version).files == 1


# --- Manifests ---------------------------------------------------------------------------------------------


def commands(refused: TrainyardError) -> list[list[str]]:
    """Those that a hint names, without the name of the program."""
    return [shlex.split(part)[2:] for part in refused.hint.split("`") if part.startswith("trainyard dataset ")]


def damage_manifest(uri: str, version: str) -> None:
    path = Path(uri) / manifest_key(version)
    path.write_bytes(path.read_bytes()[:-20])
    os.utime(path, (1e9, 1e9))


def test_an_older_version_that_is_damaged_frees_nothing_until_it_is_given_up(uri: str, tmp_path: Path) -> None:
    """The hint names the store, and its command mends: later collections need no option."""
    old = stage(tmp_path, uri, "my cells", b"older")
    newest = stage(tmp_path, uri, "my cells", b"newest")
    damage_manifest(uri, old.version)
    before = set(list_paths(open_store(uri), ""))
    refused = error_of(call("gc", "--store", uri, "--grace", "0s", "--yes"))
    assert refused.code is ExitCode.DATA
    assert f"{old.version[:12]} is damaged" in refused.message
    assert "'my cells' had before" in refused.message
    assert "STORE" not in str(refused)
    assert set(list_paths(open_store(uri), "")) == before
    [command] = commands(refused)
    assert uri in command
    done = call(*command, "--yes", "--json")
    assert json.loads(done.stdout)["freed"]["objects"] == 1, "the manifest; what it may have named is young"
    assert call("gc", "--store", uri, "--grace", "0s", "--yes").exit_code == 0
    assert verify_version(uri, newest.version).files == 1
    assert manifest_key(old.version) not in set(list_paths(open_store(uri), ""))


def test_a_newest_version_that_is_damaged_is_never_given_up_and_the_hint_mends_it(uri: str, tmp_path: Path) -> None:
    """Its manifest says what differs from the version before it, which is the one that is damaged."""
    for number in range(9):
        (tmp_path / "my cells" / f"same {number}.jpg").write_bytes(b"%d" % number)
    old = stage(tmp_path, uri, "my cells", b"older")
    newest = stage(tmp_path, uri, "my cells", b"newest")
    damage_manifest(uri, old.version)
    for options in ([], ["--drop-damaged"]):
        refused = error_of(call("gc", "--store", uri, "--grace", "0s", "--yes", *options))
        assert f"{old.version[:12]} is damaged" in refused.message
        assert "'my cells'" in refused.message
    again, _, removal = commands(refused)
    assert removal == ["rm", "my cells", "--store", uri]
    again[again.index("PATH")] = str(tmp_path / "my cells")
    assert call(*again).exit_code == 0
    assert call("gc", "--store", uri, "--grace", "0s", "--yes", "--drop-damaged").exit_code == 0
    assert call("gc", "--store", uri, "--grace", "0s", "--yes").exit_code == 0
    assert verify_version(uri, newest.version).files == 10


def test_what_a_newer_trainyard_wrote_is_not_damaged(uri: str, tmp_path: Path) -> None:
    old = stage(tmp_path, uri, "my cells", b"older")
    stage(tmp_path, uri, "my cells", b"newest")
    header = {"schema_version": 9, "version": old.version, "files": 1, "bytes": 1, "packs": []}
    (Path(uri) / manifest_key(old.version)).write_bytes(gzip.compress(json.dumps(header).encode() + b"\n"))
    refused = error_of(call("gc", "--store", uri, "--grace", "0s", "--yes", "--drop-damaged"))
    assert "written by a newer Trainyard" in refused.message
    assert "update Trainyard here" in refused.hint


def test_the_hint_of_show_names_the_store(uri: str, tmp_path: Path) -> None:
    newest = stage(tmp_path, uri, "my cells", b"newest")
    damage_manifest(uri, newest.version)
    assert f"--store {uri} --again" in error_of(call("show", newest.version, "--store", uri)).hint


def test_every_command_that_is_told_names_the_store_as_a_shell_reads_it(uri: str, tmp_path: Path) -> None:
    place = str(Path(uri).rename(tmp_path / "my store"))
    for version in ("0" * 64, "none"):
        refused = error_of(call("show", version, "--store", place))
        assert f"dataset list --store '{place}'" in refused.hint
    with pytest.raises(TrainyardError) as told:
        verify_version(place, "0" * 64)
    assert f"list --store '{place}'" in told.value.hint
    assert f"--name NAME --store '{place}' --again" in told.value.hint
    assert f"gc --store '{place}'`" in call("rm", "whole", "--store", place, "--yes").output
    assert f"list --store '{place}'" in error_of(call("rm", "whole", "--store", place, "--yes")).hint


# --- Where a store is --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("file://relative{}/new", "file:///relative{}/new"),
        ("file:{}/new", "file://{}/new"),
        ("file:new", "write ./new"),
        ("file://{}/new#set", "write file://{}/new; its dataset 'set' is named by itself"),
        ("file://{}/new?a=b", "write file://{}/new;"),
    ],
)
def test_a_file_uri_that_means_another_place_than_it_says_is_refused(tmp_path: Path, wrong: str, right: str) -> None:
    """By its rules the former would be a folder of the machine called relative."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set/1.jpg").touch()
    for arguments in (["stage", str(tmp_path / "set")], ["list"], ["gc"]):
        refused = error_of(call(*arguments, "--store", wrong.format(tmp_path)))
        assert refused.code is ExitCode.CONFIG
        assert right.format(tmp_path) in refused.hint
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        "https://account.blob.core.windows.net/cells?sv=2024-11-04&sig=SECRET",
        "s3://bucket/cells?X-Amz-Signature=SECRET",
        "s3://bucket//cells?X-Amz-Signature=SECRET",
        "s3://KEY:SECRET@bucket/cells",
        "s3://KEY:half/of-the-SECRET@bucket/cells",
        "s3:/KEY:SECRET@bucket/cells",
        "https://somebody:SECRET@account.blob.core.windows.net/cells",
    ],
)
def test_a_secret_in_a_uri_is_refused_and_nowhere_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    told = [error_of(call("list", "--store", wrong))]
    monkeypatch.setenv("TRAINYARD_STORE", wrong)
    told.append(error_of(call("list")))
    with pytest.raises(TrainyardError) as refused:
        to_store_uri(wrong)
    told.append(refused.value)
    for dataset, options in ((wrong, {}), (str(tmp_path), {"store": wrong}), (str(tmp_path), {"output": wrong})):
        with pytest.raises(TrainyardError) as refused:
            build_request(dataset, options)
        told.append(refused.value)
    for each in told:
        assert each.code is ExitCode.CONFIG
        assert "SECRET" not in f"{each} {each!r}"
    if "s3://bucket" not in wrong:
        with pytest.raises(TrainyardError, match=r"object store|not shown") as refused:
            open_store(wrong)
        assert "SECRET" not in str(refused.value)


def test_a_tilde_that_the_shell_leaves_is_the_home(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in --store=~/store."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for arguments in (["stage", str(tmp_path / "whole")], ["gc", "--yes"], ["rm", "whole", "--yes"], ["gc", "--grace", "0s", "--yes"]):
        assert call(*arguments, "--store=~/store").exit_code == 0, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "my cells", "store", "whole"]
    refused = error_of(call("list", "--store=~nobody-of-that-name/store"))
    assert refused.code is ExitCode.CONFIG
    nobody = "~nobody-of-that-name/x"
    for arguments in (
        ["fetch", "my cells", "--to", nobody, "--store", uri],
        ["register", str(tmp_path), "--labels", nobody, "--store", uri],
    ):
        refused = error_of(call(*arguments))
        assert refused.code is ExitCode.CONFIG
        assert nobody in refused.message
    with pytest.raises(TrainyardError, match=nobody):
        build_request(nobody, {})


def test_a_folder_that_is_no_store_is_told_as_such(uri: str, tmp_path: Path) -> None:
    for arguments in (["list"], ["gc"], ["rm", "x", "--yes"], ["verify", "x"]):
        refused = error_of(call(*arguments, "--store", str(tmp_path / "my cells")))
        assert refused.code is ExitCode.NOT_FOUND
        assert "is no store" in refused.message
    for name in ("whole", "my cells"):
        assert call("rm", name, "--store", uri, "--yes").exit_code == 0
    assert call("gc", "--store", uri, "--grace", "0s", "--yes").exit_code == 0
    assert f"no datasets in {uri}" in call("list", "--store", uri).output, "it was one, and is empty now"


def test_the_folder_above_is_staged_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cells/inner").mkdir(parents=True)
    (tmp_path / "cells/1.jpg").touch()
    monkeypatch.chdir(tmp_path / "cells/inner")
    assert stage_folder(Path(".."), str(tmp_path / "store")).name == "cells"


@pytest.mark.parametrize("folder", ["packs", "refs", "manifests"])
def test_the_objects_of_the_store_itself_are_not_staged(uri: str, folder: str) -> None:
    with pytest.raises(TrainyardError, match="keeps its own objects") as refused:
        stage_folder(Path(uri) / folder, uri)
    assert refused.value.code is ExitCode.CONFIG
