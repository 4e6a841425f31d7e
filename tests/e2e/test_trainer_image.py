"""The trainer image: what is in it and what is not, how little a change moves, and that it runs where nothing is allowed."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import pytest

from blocks.image_source import find_revision, source_tag
from tests.docker_engine import Engine
from tests.image_layers import MIB, pushed_layers, scan_layer, unpacked_bytes, unpacked_layers
from tests.stack import REPOSITORY
from tests.trainer_image import NAME, SECRET, TrainerImage, copy_sources, make_image
from tests.wire import running_wire
from trainer.contract import CONTRACT_VERSION

IMPORTS = "import os, torch, torchvision, ultralytics, albumentations; print(os.getuid(), (torch.ones(2) + 1).tolist())"


@pytest.mark.parametrize("user", ["1000", "54321:0"], ids=["as it is", "as a cluster's own number"])
def test_it_runs_without_a_name_a_network_or_a_writable_disk(trainer_image: TrainerImage, user: str) -> None:
    options = [] if user == "1000" else ["--user", user]
    done = trainer_image.python(IMPORTS, *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{user.partition(':')[0]} [2.0, 2.0]"


@pytest.mark.parametrize("argv", [[], ["train"]], ids=["plain", "as SageMaker calls it"])
def test_without_a_job_it_says_what_it_lacks(trainer_image: TrainerImage, argv: list[str]) -> None:
    done = trainer_image.run(*argv)
    assert done.returncode == 78
    assert done.stdout.startswith("nobody has said where the job is")
    assert "Traceback" not in done.stdout + done.stderr


def test_it_says_what_it_is(trainer_image: TrainerImage) -> None:
    config = trainer_image.engine.inspect(trainer_image.reference)["Config"]
    assert config["User"] == "1000:1000"
    assert config["Entrypoint"] == ["python", "-P", "-m", "trainer"]
    assert config["StopSignal"] == "SIGTERM"
    labels = config["Labels"]
    assert labels["org.opencontainers.image.version"] == version("trainyard")
    assert labels["org.opencontainers.image.revision"] == find_revision(REPOSITORY)
    assert trainer_image.made.tag == source_tag(labels["io.trainyard.source-hash"])
    assert labels["io.trainyard.contract-version"] == str(CONTRACT_VERSION)
    assert SECRET not in str(config)


def test_no_layer_holds_what_has_no_place_in_it(trainer_image: TrainerImage) -> None:
    """The base is whoever's image the user names, and is searched for secrets alone; what we add is ours."""
    base, dependencies, *rest = unpacked_layers(trainer_image.engine, trainer_image.reference)
    assert (base / "usr/bin/python3").exists()
    assert any((dependencies / "opt/trainer/lib").glob("python3*/site-packages/torch"))
    secrets = [SECRET.encode()]
    assert [finding for layer in (dependencies, *rest) for finding in scan_layer(layer, secrets)] == []
    assert [found for found in scan_layer(base, secrets) if found.why == "holds a secret"] == []
    history = trainer_image.engine.docker("history", "--no-trunc", "--format", "{{.CreatedBy}}", trainer_image.reference).stdout
    assert "COPY" in history
    assert SECRET not in history
    code = rest[-1]
    assert [path.name for path in code.iterdir()] == ["app"]
    assert [path.name for path in (code / "app").iterdir()] == ["trainer"]
    assert {path.suffix for path in code.rglob("*") if path.is_file()} == {".py", ".pyc"}


def test_a_scan_finds_what_it_looks_for(tmp_path: Path) -> None:
    for name in ("opt/tests/x.py", ".git/config", "var/cache/pip/wheel", "usr/bin/su", "etc/open"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"a {SECRET} b" if name == "etc/open" else "")
    (tmp_path / "usr/bin/su").chmod(0o4755)
    (tmp_path / "etc/open").chmod(0o666)
    found = {finding.path: finding.why for finding in scan_layer(tmp_path, [])}
    assert set(found) == {"opt/tests", ".git", "var/cache/pip/wheel", "usr/bin/su", "etc/open"}
    assert "holds a secret" in [finding.why for finding in scan_layer(tmp_path, [SECRET.encode()])]


def test_layer_by_layer_it_is_as_big_as_told(trainer_image: TrainerImage, capsys: pytest.CaptureFixture[str]) -> None:
    registry = trainer_image.engine.registry
    pushed = pushed_layers(registry, NAME, trainer_image.digest)
    # A layer without files, such as that of a WORKDIR which is there already, is pushed, too.
    unpacked = [unpacked_bytes(layer) for layer in unpacked_layers(trainer_image.engine, trainer_image.reference)]
    with capsys.disabled():
        print("\ncompressed, MiB:", *(f"{layer.size / MIB:.2f}" for layer in pushed))
        print("unpacked, MiB:  ", *(f"{size / MIB:.2f}" for size in unpacked))
        print("seconds:", *(f"{name} {seconds:.1f}" for name, seconds in trainer_image.seconds.items()))
    assert pushed[-1].size < MIB
    assert unpacked[-1] < 2 * MIB
    assert sum(layer.size for layer in pushed) < 3.5 * 1024 * MIB


def test_a_changed_line_of_the_trainer_moves_less_than_a_megabyte(
    docker_engine: Engine, trainer_image: TrainerImage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counted before the registry: all that build and push send and receive, the look for the base and for known layers, too."""
    context = copy_sources(tmp_path / "context")
    errors = context / "trainer/errors.py"
    errors.write_text(errors.read_text() + f"\n# {uuid4()}\n")
    with running_wire(docker_engine.registry.host) as wire:
        changed = make_image(docker_engine, context, tmp_path, host=wire.host)
    assert changed.made.built
    assert changed.digest != trainer_image.digest
    known = set(pushed_layers(docker_engine.registry, NAME, trainer_image.digest))
    new = [layer for layer in pushed_layers(docker_engine.registry, NAME, changed.digest) if layer not in known]
    assert len(new) == 1, "who has the one image pulls one layer for the other"
    with capsys.disabled():
        print(f"\nbytes up {wire.up}, down {wire.down}, new layer {new[0].size}, told {changed.made.sent_bytes}")
    assert new[0].size < wire.up + wire.down < MIB
    docker_engine.docker("rmi", "--force", changed.made.image_id)


def test_what_is_not_the_trainers_makes_no_other_image(docker_engine: Engine, trainer_image: TrainerImage, tmp_path: Path) -> None:
    context = copy_sources(tmp_path / "context")
    for name in ("flows/train.py", "blocks/job.py", "docker/flow-runner-requirements.txt"):
        (context / name).write_text((context / name).read_text() + "\n# changed\n")
    for name in ("notes.txt", "trainer/credentials.json", "trainer/id_rsa", "trainer/.env", "trainer/img/1.jpg"):
        (context / name).parent.mkdir(exist_ok=True)
        (context / name).write_text("not ours")
    same = make_image(docker_engine, context, tmp_path)
    assert (same.made.built, same.made.tag, same.digest) == (False, trainer_image.made.tag, trainer_image.digest)
    # Nor does docker see another one: its cache gives the same.
    again = make_image(docker_engine, context, tmp_path, force=True)
    layers = [docker_engine.inspect(one.reference)["RootFS"]["Layers"] for one in (again, trainer_image)]
    assert layers[0] == layers[1]
