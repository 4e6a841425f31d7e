"""The command line without Prefect: listing, deleting, completion, colours, options, attaching."""

from __future__ import annotations

import errno
import json
import os
import pty
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from blocks.attempts import cancel_run
from blocks.errors import AuthError, ConfigError, ServiceUnavailable
from blocks.job import JobRef, JobState, JobStatus
from blocks.outputs import known_outputs, note_seen, remember_output
from blocks.providers.local_process import LocalProvider
from blocks.record import Outcome, RunRecord
from blocks.refs import ref_key
from flows.cli import COMMANDS, app, tell
from flows.cli_completion import output_folders
from flows.cli_store import Ticker
from tests.unit.test_blocks_pruning import make_run
from tests.unit.test_blocks_record import run_file
from trainer.contract import AttemptLayout, ExitCode, Phase, Progress, TrainerError, TrainyardError, utc_now

BIN = Path(sys.executable).parent
DONE = Outcome(state=JobState.SUCCEEDED)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRAINYARD_HOME", str(tmp_path))
    return tmp_path


def call(*arguments: str, keys: str | None = None) -> Result:
    return CliRunner().invoke(app, list(arguments), input=keys)


def make_runs(tmp_path: Path) -> None:
    for run_id, changes in {
        "aaaa1111": {"name": "fruit-yolo11n", "owner": "ada"},
        "bbbb2222": {"name": "Fruit-pico", "owner": "bob", "provider": "moon"},
        "cccc3333": {"name": "cells", "owner": "ada"},
    }.items():
        record = RunRecord(str(tmp_path / "runs"), run_id)
        record.open(run_file(run_id).model_copy(update=changes))


def listed(*arguments: str) -> list[str]:
    result = call("runs", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return [row["run_id"] for row in json.loads(result.stdout)]


# --- Listing ----------------------------------------------------------------------------------------------


def test_runs_are_filtered(tmp_path: Path) -> None:
    make_runs(tmp_path)
    assert listed() == ["cccc3333", "bbbb2222", "aaaa1111"]
    assert listed("--name", "fruit") == ["bbbb2222", "aaaa1111"]
    assert listed("--owner", "ada", "--name", "FRUIT") == ["aaaa1111"]
    assert listed("--provider", "moon") == ["bbbb2222"]
    assert listed("--limit", "1") == ["cccc3333"]
    assert listed("--since", "1h") == ["cccc3333", "bbbb2222", "aaaa1111"]
    assert listed("--since", "0s") == []
    assert listed("--state", "starting", "--state", "failed", "--limit", "2") == ["cccc3333", "bbbb2222"]
    assert listed("--state", "succeeded") == []
    assert "no such runs" in call("runs", "--name", "nothing").output


@pytest.mark.parametrize(("arguments", "told"), [(("--state", "done"), "'succeeded'"), (("--since", "2x"), "30d"), (("--limit", "0"), "0")])
def test_unknown_filters_are_refused_with_what_is_known(arguments: tuple[str, ...], told: str) -> None:
    result = call("runs", *arguments)
    assert result.exit_code == ExitCode.USAGE
    assert told in result.output


@pytest.mark.parametrize("name", ["run.json", "attempts/1/outcome.json", "attempts/1/plan.json"])
def test_damage_of_one_run_is_told_and_the_others_are_listed(tmp_path: Path, name: str) -> None:
    make_run("fine1234", tmp_path, None)
    bad = make_run("harm1234", tmp_path, DONE)
    bad.folder.put(name, b'{"run_id": ')
    (tmp_path / "runs" / "somebody else's").mkdir()
    result = call("runs", "--json")
    assert result.exit_code == 0
    assert [row["run_id"] for row in json.loads(result.stdout)] == ["fine1234"]
    [line] = result.stderr.splitlines()
    assert line.startswith(f"damaged: {bad.uri} ")


@pytest.fixture(params=[ServiceUnavailable, AuthError, ConfigError])
def unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> RunRecord:
    """A run whose job trains, and nobody can look at it."""
    record = make_run("good1234", tmp_path, None)
    job = {"provider": "local", "native_id": "1", "run_id": record.run_id, "attempt": 1, "fingerprint": "f"}
    record.write_ref(JobRef.model_validate({**job, "output_uri": record.attempt_uri(1)}))
    progress = Progress(attempt=1, phase=Phase.TRAINING, epochs=5, epoch=2, updated_at=utc_now())
    record.folder.put(f"attempts/1/{AttemptLayout.PROGRESS}", progress.model_dump_json().encode())

    def refuse(_: LocalProvider, __: JobRef) -> JobStatus:
        raise request.param("no answer from the API server", hint="look at the network")

    for verb in ("poll", "cancel"):
        monkeypatch.setattr(LocalProvider, verb, refuse)
    return record


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_job_that_nobody_can_look_at_is_told_with_what_is_recorded(unseen: RunRecord, options: tuple[str, ...]) -> None:
    result = call("status", "good", *options)
    assert result.exit_code in {ExitCode.UNAVAILABLE, ExitCode.PERMISSION, ExitCode.CONFIG}
    for told in ("unknown", "no answer from the API server", "look at the network", unseen.uri, '"epoch": 2' if options else "epoch 2/5"):
        assert told in result.stdout


def test_a_job_that_nobody_can_look_at_is_listed_and_why_is_told(unseen: RunRecord) -> None:
    result = call("runs", "--json")
    [row] = json.loads(result.stdout)
    assert (row["run_id"], row["state"], row["epoch"]) == (unseen.run_id, "unknown", 2)
    assert f"not looked at: {unseen.uri}: no answer" in result.stderr


def test_a_stop_that_the_provider_does_not_take_is_told_to_stand(unseen: RunRecord) -> None:
    failure = call("cancel", "good").exception
    assert isinstance(failure, TrainyardError)
    assert unseen.cancel_request(1) is not None
    assert "the wish to stop is in the run's record, and the training itself looks for it" in failure.message
    lost = failure.hint.index("trainyard cancel good1234 --lost")
    assert ("get a new login" in failure.hint[:lost]) == isinstance(failure, AuthError)


def test_who_watched_is_told_that_a_job_trains_on_unless_it_is_over(
    unseen: RunRecord, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.running import tell_left

    tell_left(unseen)
    assert "the training goes on" in capsys.readouterr().err
    unseen.write_outcome(1, DONE)
    tell_left(unseen)
    tell_left(None)
    tell_left(RunRecord(unseen.output_uri, "none1234"))
    assert not capsys.readouterr().err

    def silent(_: RunRecord) -> list[int]:
        raise TrainerError("the store does not answer", code=ExitCode.UNAVAILABLE)

    monkeypatch.setattr(RunRecord, "attempts", silent)
    tell_left(unseen)
    assert "is not known: the store does not answer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "collect", "resume"])
@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", "a/b", ""])
def test_a_run_is_named_by_its_id_only(command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from flows.cli import tell

    result = call(command, name)
    assert isinstance(result.exception, Exception)
    assert tell(result.exception) == ExitCode.NOT_FOUND
    assert "is not a run id" in capsys.readouterr().err


def test_the_run_id_is_no_option() -> None:
    assert call("train", "x", "--run-id", "abcd1234").exit_code == ExitCode.USAGE


# --- Deleting ---------------------------------------------------------------------------------------------


def test_rm_shows_and_wants_a_yes(tmp_path: Path) -> None:
    make_run("good1234", tmp_path, DONE)
    refused = call("runs", "rm", "good")
    assert refused.exit_code == ExitCode.USAGE
    assert "good1234" in refused.output
    assert "--yes" in refused.output
    assert (tmp_path / "runs" / "good1234").exists()
    assert call("runs", "rm", "good", "--yes").exit_code == 0
    assert not (tmp_path / "runs" / "good1234").exists()


def test_rm_refuses_an_open_run_and_deletes_none_beside_it(tmp_path: Path) -> None:
    make_run("good1234", tmp_path, DONE)
    open_run = make_run("open1234", tmp_path, None)
    result = call("runs", "rm", "good", "open", "--yes")
    assert "it is open" in str(result.exception)
    assert "trainyard cancel open1234" in str(result.exception)
    assert (tmp_path / "runs" / "good1234").exists()
    open_run.write_outcome(1, Outcome(state=JobState.CANCELLED))
    cancel_run(open_run, asked_by="me")
    assert call("runs", "rm", "good", "open", "good1234", "--yes").exit_code == 0
    assert list((tmp_path / "runs").iterdir()) == []


def test_prune_shows_asks_and_deletes(tmp_path: Path) -> None:
    make_run("good1234", tmp_path, DONE)
    checkpoints = tmp_path / "runs/good1234/attempts/1/checkpoints"
    assert "good1234" in call("runs", "prune", "--dry-run").output
    assert call("runs", "prune").exit_code == ExitCode.USAGE
    assert "nothing to prune" in call("runs", "prune", "--older-than", "30d", "--yes").output
    assert checkpoints.exists()
    assert "freed" in call("runs", "prune", "--yes").output
    assert not checkpoints.exists()
    assert "nothing to prune" in call("runs", "prune", "--yes").output


def in_terminal(*arguments: str, keys: bytes = b"", **environment: str) -> tuple[int, str]:
    """The command in a terminal of its own: its exit code and what it showed."""
    pid, descriptor = pty.fork()
    if pid == 0:
        os.execve(BIN / "trainyard", ["trainyard", *arguments], {**os.environ, "TERM": "xterm", **environment})
    os.write(descriptor, keys)
    shown = b""
    while True:
        try:
            data = os.read(descriptor, 65536)
        except OSError:
            break
        if not data:
            break
        shown += data
    _, status = os.waitpid(pid, 0)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(status), shown.decode()


@pytest.mark.parametrize(("keys", "stays"), [(b"n\n", True), (b"\n", True), (b"y\n", False)])
def test_in_a_terminal_rm_asks(tmp_path: Path, keys: bytes, stays: bool) -> None:
    make_run("good1234", tmp_path, DONE)
    code, shown = in_terminal("runs", "rm", "good", keys=keys)
    assert code == 0, shown
    assert "models included?" in shown
    assert (tmp_path / "runs" / "good1234").exists() is stays


# --- Colours ----------------------------------------------------------------------------------------------

COMMAND_LINES = [("status", "zzzz"), ("runs",), ("status", "good"), ("runs", "prune", "--dry-run"), ("runs", "--help"), ("--help",)]


@pytest.mark.parametrize("arguments", COMMAND_LINES, ids=" ".join)
def test_no_colours_where_they_are_not_wanted(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    make_run("good1234", tmp_path, DONE)
    piped = subprocess.run([BIN / "trainyard", *arguments], capture_output=True, check=False, stdin=subprocess.DEVNULL)
    assert b"\x1b" not in piped.stdout + piped.stderr
    _, shown = in_terminal(*arguments, NO_COLOR="1")
    assert "\x1b[3" not in shown, shown


def test_a_terminal_shows_colours() -> None:
    assert "\x1b[31merror" in in_terminal("status", "zzzz")[1]


# --- Completion -------------------------------------------------------------------------------------------


def complete(words: str, cwd: Path) -> list[str]:
    environment = {**os.environ, "COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_TRAINYARD_COMPLETE": "bash_complete"}
    done = subprocess.run([BIN / "trainyard"], env=environment, cwd=cwd, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_the_shell_completes_commands_options_and_runs(tmp_path: Path) -> None:
    make_runs(tmp_path)
    remember_output((tmp_path / "else where").as_uri())
    RunRecord(str(tmp_path / "else where"), "aadd4444").open(run_file("aadd4444"))
    (tmp_path / "runs" / "aabroken").mkdir()
    (tmp_path / "runs" / "aabroken" / "run.json").write_text("{")
    note_seen("s3://bucket/runs", {"aaeebucket": "cells"})
    assert complete("trainyard re", tmp_path) == ["plain,resume"]
    assert set(complete("trainyard ", tmp_path)) == {f"plain,{name}" for name in COMMANDS}
    for command in ("status", "logs -f", "cancel", "collect", "resume", "runs rm", "runs rm cccc3333"):
        assert set(complete(f"trainyard {command} aa", tmp_path)) == {
            f"plain,{name}" for name in ("aaaa1111", "aadd4444", "aabroken", "aaeebucket")
        }
    assert complete("trainyard status ../", tmp_path) == []
    assert complete("trainyard runs pr", tmp_path) == ["plain,prune"]
    assert complete("trainyard logs --fo", tmp_path) == ["plain,--follow"]
    assert "plain,--epochs" in complete("trainyard train --", tmp_path)


def test_completing_a_run_is_quick_and_loads_no_models(tmp_path: Path) -> None:
    script = "import sys; from flows.cli import app\ntry: app.main([], 'trainyard', complete_var='_TRAINYARD_COMPLETE')\n"
    script += "finally: print(*(name for name in ('pydantic', 'prefect', 'rich') if name in sys.modules))"
    make_runs(tmp_path)
    environment = {**os.environ, "COMP_WORDS": "trainyard status ", "COMP_CWORD": "2", "_TRAINYARD_COMPLETE": "bash_complete"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1].strip() == "", done.stdout
    assert "plain,cccc3333" in done.stdout


def test_completion_looks_where_the_record_lies(tmp_path: Path) -> None:
    remember_output((tmp_path / "else where").as_uri())
    assert [folder.as_uri() for folder in output_folders()] == [output.uri for output in known_outputs()]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_shell_gets_its_script(shell: str) -> None:
    assert "_TRAINYARD_COMPLETE" in call("completion", shell).output
    assert call("completion", "csh").exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full/x"), ExitCode.DISK_FULL, "the disk is full at /full/x"),
        (OSError(errno.EROFS, "Read-only file system", "/ro/x"), ExitCode.OCCUPIED, "no access at /ro/x: Read-only"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), ExitCode.OCCUPIED, "no access at /x"),
    ],
)
def test_a_machine_that_cannot_be_written_to_is_told_without_a_traceback(
    failure: OSError, code: ExitCode, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tell(failure) == code
    told = capsys.readouterr().err
    assert says in told
    assert "TRAINYARD_HOME" in told
    with pytest.raises(ZeroDivisionError):
        tell(ZeroDivisionError("a defect"))


def test_a_full_disk_under_sqlite_is_a_full_disk() -> None:
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA max_page_count=1")
    with pytest.raises(sqlite3.OperationalError) as full:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    assert tell(full.value) == ExitCode.DISK_FULL


def test_an_empty_store_is_not_the_current_folder() -> None:
    done = CliRunner().invoke(app, ["dataset", "list", "--store", ""])
    assert done.exit_code == ExitCode.USAGE
    assert "it is empty" in done.output


@pytest.mark.parametrize("command", [["list"], ["show", "x"], ["fetch", "x", "--to", "copy"], ["verify", "x"], ["rm", "x"], ["gc"]])
def test_who_only_looks_at_a_store_makes_none(command: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["dataset", *command, "--store", str(tmp_path / "typo")])
    assert isinstance(done.exception, TrainerError)
    assert "there is no store at" in done.exception.message
    assert not (tmp_path / "typo").exists()


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([0.0, 1.0, 9.9, 10.0, 19.9, 20.0])
    monkeypatch.setattr("flows.cli_store.time.monotonic", lambda: next(times))
    ticker = Ticker()
    for done in range(1, 6):
        ticker.on_bytes(done * 10**6, 10 * 10**6)
    assert capsys.readouterr().err.splitlines() == [
        "3.0 MB of 10.0 MB, 300.0 kB/s, ETA 23s",
        "5.0 MB of 10.0 MB, 250.0 kB/s, ETA 20s",
    ]


def test_a_name_that_is_too_long_is_told_with_the_limit() -> None:
    with pytest.raises(TrainerError, match="too long for a name") as told:
        ref_key("n" * 101)
    assert told.value.hint == "use at most 100 characters (--name)"
    assert ref_key("n" * 100)
