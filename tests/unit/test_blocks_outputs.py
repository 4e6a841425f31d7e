from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from blocks.claims import has_record
from blocks.credentials import AccessRef
from blocks.driving import driven_runs
from blocks.errors import ConfigError, RunNotFound, ServiceUnavailable
from blocks.outputs import Output, all_runs, default_output_uri, find_run, known_outputs, list_runs, remember_output
from blocks.record import RunRecord
from tests.unit.test_blocks_record import run_file

NOWHERE = "http://127.0.0.1:9"  # the port of a service that is not there


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    monkeypatch.setattr("trainer.storage.RETRIES", {"ask": {"max_retries": 0}})
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    return tmp_path


def test_an_output_is_noted_with_how_it_is_reached(home: Path) -> None:
    access = AccessRef("https://store.example", "aws-credentials/prod")
    remember_output("s3://bucket/runs/")
    remember_output("s3://bucket/runs", AccessRef("https://old.example"))
    remember_output("s3://bucket/runs", access)
    remember_output("s3://bucket/runs")
    remember_output(str(home / "else where"), access)
    elsewhere = (home / "else where").as_uri()
    assert set(known_outputs()) == {Output(default_output_uri()), Output(elsewhere), Output("s3://bucket/runs", access)}


def test_an_output_that_does_not_answer_hides_no_other(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    remember_output("s3://bucket/runs", AccessRef(NOWHERE))
    RunRecord(str(home / "runs"), "abcd1234").open(run_file("abcd1234"))
    listing = list_runs()
    assert [record.run_id for record, _ in listing.runs] == ["abcd1234"]
    assert list(listing.silent) == ["s3://bucket/runs"]
    assert [record.run_id for record in all_runs()] == ["abcd1234"]
    assert "not looked at: s3://bucket/runs" in caplog.text
    assert find_run("abcd").run_id == "abcd1234"
    assert has_record("abcd1234")
    with pytest.raises(
        ServiceUnavailable, match=r"^s3://bucket/runs was not looked at: .*; elsewhere no run begins with 'zzzz'\. Next: check"
    ):
        find_run("zzzz")
    silent: list[str] = []
    assert driven_runs(lambda output, _: silent.append(output.uri)) == []
    assert silent == ["s3://bucket/runs"]


def test_a_run_is_found_by_the_uri_of_its_record(home: Path) -> None:
    record = RunRecord((home / "unknown").as_uri(), "abcd1234")
    record.open(run_file("abcd1234"))
    with pytest.raises(RunNotFound):
        find_run("abcd1234")
    assert find_run(record.uri).uri == record.uri
    assert find_run("abcd1234").uri == record.uri, "its folder is known from now on"
    with pytest.raises(RunNotFound, match="there is no run at"):
        find_run(f"{record.uri}5")


def test_saved_credentials_are_loaded_when_they_are_needed_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    monkeypatch.setitem(sys.modules, "blocks.profiles", SimpleNamespace(load_credentials=loaded.append))
    monkeypatch.setattr("blocks.credentials.build_access", lambda _block, scheme, endpoint: SimpleNamespace(scheme=scheme))
    access = AccessRef("https://store.example", "aws-credentials/lazy")
    record = RunRecord("s3://bucket/runs", "abcd1234", access)
    assert record.uri == "s3://bucket/runs/abcd1234"
    assert loaded == []
    assert access.resolve("file:///folder") is None
    assert access.resolve(record.uri) is access.resolve("s3://another/one")
    assert loaded == ["aws-credentials/lazy"]
    assert AccessRef().resolve("s3://bucket") is None


def test_whoever_looks_after_runs_learns_where_the_profiles_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from prefect.exceptions import PrefectHTTPStatusError

    from blocks import profiles
    from flows.finding import learn_outputs

    saved = [SimpleNamespace(id=number, updated="today", name=name) for number, name in enumerate(("bucket", "broken"))]
    monkeypatch.setattr(profiles, "PROFILES", (profiles.LocalProfile,))
    loaded: list[str] = []

    def load(name: str) -> profiles.Profile:
        loaded.append(name)
        return profiles.LocalProfile(slots=1, output="s3://of-a-profile/runs", store_endpoint=NOWHERE) if name == "bucket" else broken()

    def broken() -> profiles.Profile:
        raise ConfigError("it is of no use")

    monkeypatch.setattr(profiles, "load_profile", load)
    client = SimpleNamespace(read_block_documents_by_type=lambda _slug, *, include_secrets: saved)
    assert learn_outputs(cast("Any", client)) == ["profile broken: it is of no use"]
    assert Output("s3://of-a-profile/runs", AccessRef(NOWHERE)) in known_outputs()
    assert learn_outputs(cast("Any", client)) == []
    assert loaded == ["bucket", "broken"], "once, until somebody changes them"

    def unknown(_slug: str, *, include_secrets: bool) -> list[Any]:
        asked = httpx.Request("GET", "http://server")
        raise PrefectHTTPStatusError("no such type", request=asked, response=httpx.Response(404, request=asked))

    assert learn_outputs(cast("Any", SimpleNamespace(read_block_documents_by_type=unknown))) == []
