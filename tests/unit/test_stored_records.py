"""Records outlive the version that wrote them: each is read by builds that know a field more, or a field less, at every level.

What a reader cannot do without are the required fields; they are frozen in `REQUIRED`.
"""

from __future__ import annotations

import functools
import importlib
import json
import operator
import pkgutil
import types
from collections.abc import Iterator
from typing import Any, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, Field, ValidationError, create_model
from pydantic.fields import FieldInfo

import blocks
import trainer
from trainer.contract import StoredRecord, TrainConfig, TrainJob, UserInput

SKIPPED_MODULES = ("trainer.__main__", "trainer.frameworks.", "blocks.profiles")  # they start something, or load torch or Prefect

# A new required field breaks every older record, and so every run that is open while somebody upgrades. Give it a default.
REQUIRED: dict[str, set[str]] = {
    "CancelRequest": {"attempt", "asked_by"},
    "CheckLine": {"name", "ok", "message"},
    "CheckReport": {"provider", "lines"},
    "CheckpointRecord": {
        *("sha256", "bytes", "epoch", "epochs", "run_id", "attempt"),
        *("config_hash", "config", "dataset_version", "best_epoch", "best_sha256"),
    },
    "Claim": {"run_id", "holders"},
    "DatasetCheck": set(),
    "DatasetIndex": {"name", "root", "format", "task", "classes", "images", "label_files", "version", "split_sources"},
    "DatasetRef": {"root", "index_uri", "version", "name", "image_count"},
    "Driver": {"flow_run_id", "host", "pid", "pid_created_at"},
    "Event": {"kind", "message"},
    "ExitRecord": {"exit_code", "started_at"},
    "JobFile": {"run_id", "attempt", "fingerprint", "host", "pid", "pid_created_at"},
    "JobRef": {"provider", "native_id", "run_id", "attempt", "output_uri", "fingerprint"},
    "JobStatus": {"state"},
    "LogBatch": {"lines", "cursor", "ended"},
    "Outcome": {"state"},
    "Plan": {"provider", "spec", "instance_type", "region", "request", "fingerprint"},
    "Price": {"usd_per_hour", "as_of", "source"},
    "Problem": {"field", "message"},
    "Progress": {"attempt", "phase", "epochs"},
    "Receipt": {"asked_by", "asked_at", "state", "native_id", "ended_at"},
    "Result": {
        *("outcome", "model_uri", "manifest_uri", "metrics", "metrics_split"),
        *("files", "best_epoch", "epochs", "duration_seconds"),
    },
    "ResultManifest": {
        *("run_id", "attempt", "framework", "task", "model", "dataset_version"),
        *("best_epoch", "epochs", "metrics", "metrics_split", "files"),
    },
    "RunFile": {"run_id", "name", "request", "request_hash", "provider", "settings", "owner"},
    "Telling": set(),
    "TrainJob": {"run_id", "attempt", "name", "config", "dataset"},
    "WatchPolicy": set(),
    "Submission": {"name", "namespace", "fingerprint", "keep_seconds", "created_at"},
}

# --- A record of each type, as this version writes it ------------------------------------------------------

TIME = "2026-11-23T10:00:00Z"
FILES = {"model/model.pt": {"sha256": "a" * 64, "bytes": 3}}
DATASET = {
    **{"root": "/d", "index_uri": "file:///d.json", "version": "v", "name": "shapes", "image_count": 2},
    **{"store_uri": "file:///s", "check": {"max_problem_share": 0.1}},
}
CONFIG = {"model": "yolo11n", "epochs": 3, "batch_size": "auto", "model_params": {"mosaic": 0.5}, "augmentations": [{"transform": "Blur"}]}
SPEC = {
    **{"run_id": "abcd", "name": "n", "config": CONFIG, "dataset": DATASET, "output_uri": "file:///o"},
    **{"max_runtime_seconds": 60, "resources": {"cpus": 2}},
}
PROGRESS = {"attempt": 1, "phase": "training", "epoch": 1, "epochs": 3, "metrics": {"map50": 0.5}, "updated_at": TIME}
PRICE = {"usd_per_hour": 1.5, "as_of": "2026-11", "source": "list"}
STATUS = {"state": "running", "progress": PROGRESS, "reason": "preempted", "started_at": TIME}
RESULT = {
    **{"outcome": "complete", "model_uri": "m", "manifest_uri": "n", "metrics": {"map50": 0.5}, "metrics_split": "test"},
    **{"files": FILES, "best_epoch": 1, "epochs": 3, "duration_seconds": 2.0},
}
DRIVER = {"flow_run_id": "f", "host": "h", "pid": 1, "pid_created_at": 1.0, "seen_at": TIME}
PLAN = {
    **{"provider": "local", "spec": SPEC, "instance_type": "", "region": "", "request": {"a": 1}},
    **{"price": PRICE, "fingerprint": "f", "warnings": ["w"]},
}
SAMPLES: dict[str, dict[str, Any]] = {
    "CancelRequest": {"attempt": 1, "asked_by": "me", "asked_at": TIME},
    "CheckLine": {"name": "disk", "ok": True, "message": "fine"},
    "CheckReport": {"provider": "local", "lines": [{"name": "disk", "ok": True, "message": "fine"}]},
    "CheckpointRecord": {
        **{"sha256": "a", "bytes": 1, "epoch": 1, "epochs": 3, "run_id": "r", "attempt": 1, "config_hash": "c", "config": {"model": "m"}},
        **{"dataset_version": "v", "best_epoch": 1, "best_sha256": "a", "progress": PROGRESS},
    },
    "Claim": {"run_id": "abcd", "holders": [DRIVER]},
    "DatasetCheck": {"split": {"val": 0.2}, "max_problem_share": 0.1},
    "DatasetIndex": {
        **{"name": "d", "root": "/d", "format": "yolo", "task": "object-detection", "classes": ["a"], "version": "v"},
        "images": [
            {
                **{"path": "a.jpg", "split": "train", "width": 4, "height": 4, "bytes": 9, "mtime_ns": 1, "sha256": "s"},
                "boxes": [[0, 0.5, 0.5, 0.1, 0.1]],
            }
        ],
        "label_files": [{"path": "a.txt", "bytes": 1, "mtime_ns": 1, "sha256": "s"}],
        "problems": [{"path": "b.jpg", "kind": "unreadable-image", "message": "m"}],
        "split_sources": {"train": "given"},
    },
    "DatasetRef": DATASET,
    "Driver": DRIVER,
    "Event": {"kind": "k", "message": "m", "data": {"a": [1]}, "at": TIME},
    "ExitRecord": {"exit_code": 75, "reason": "preempted", "started_at": TIME, "ended_at": TIME, "phase_seconds": {"training": 1.0}},
    "JobFile": {"run_id": "r", "attempt": 1, "fingerprint": "f", "host": "h", "pid": 1, "pid_created_at": 1.0, "created_at": TIME},
    "JobRef": {
        **{"provider": "local", "native_id": "1", "run_id": "r", "attempt": 1, "output_uri": "o", "fingerprint": "f"},
        "submitted_at": TIME,
    },
    "JobStatus": STATUS,
    "LogBatch": {"lines": ["a"], "cursor": "1", "ended": False},
    "Outcome": {"state": "succeeded", "result": RESULT, "status": STATUS, "closed_at": TIME},
    "Plan": PLAN,
    "Price": PRICE,
    "Problem": {"field": "f", "message": "m"},
    "Progress": PROGRESS,
    "Receipt": {"asked_by": "me", "asked_at": TIME, "state": "cancelled", "native_id": "1", "ended_at": TIME},
    "Result": RESULT,
    "ResultManifest": {
        **{"run_id": "r", "attempt": 1, "framework": "yolo", "task": "object-detection", "model": "m", "dataset_version": "v"},
        **{"best_epoch": 1, "epochs": 3, "metrics": {}, "metrics_split": "val", "files": FILES, "created_at": TIME},
    },
    "RunFile": {
        **{"run_id": "r", "name": "n", "request": {"config": CONFIG}, "request_hash": "h", "provider": "local", "settings": {}},
        **{"owner": "me", "created_at": TIME},
    },
    "Telling": {"sent": True, "at": TIME},
    "TrainJob": {"run_id": "r", "attempt": 1, "name": "n", "config": CONFIG, "dataset": DATASET},
    "WatchPolicy": {},
    "Submission": {"name": "ty-r-1", "namespace": "n", "fingerprint": "f", "keep_seconds": 60, "usd_per_hour": 1.5, "created_at": TIME},
}


def find_types() -> list[type[StoredRecord]]:
    """Every type of record in the two packages, found by importing all their modules."""
    for package in (trainer, blocks):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.startswith(SKIPPED_MODULES):
                importlib.import_module(module.name)
    return sorted({kind for kind in descendants(StoredRecord) if kind.__module__.split(".")[0] in ("trainer", "blocks")}, key=repr)


def descendants(kind: type[Any]) -> Iterator[type[Any]]:
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


TYPES = find_types()
by_type = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)


def sample(kind: type[StoredRecord]) -> StoredRecord:
    return kind.model_validate(SAMPLES[kind.__name__])


# --- The tests -------------------------------------------------------------------------------------------------


def test_every_type_of_record_has_a_sample() -> None:
    missing = {kind.__name__ for kind in TYPES} - SAMPLES.keys()
    assert not missing, f"add a sample, and a row in REQUIRED, for {sorted(missing)}"


@by_type
def test_no_field_becomes_required(kind: type[StoredRecord]) -> None:
    required = {name for name, field in kind.model_fields.items() if field.is_required()}
    added, dropped = required - REQUIRED[kind.__name__], REQUIRED[kind.__name__] - required
    assert not added, f"{kind.__name__}: {sorted(added)} must have a default, or records that older versions wrote cannot be read"
    assert not dropped, f"{kind.__name__}: {sorted(dropped)} is required no longer, so older versions cannot read new records"


@by_type
def test_unknown_fields_are_kept_at_every_level(kind: type[StoredRecord]) -> None:
    written = json.loads(sample(kind).model_dump_json())
    for path in objects_in(written, sample(kind)):
        document = json.loads(json.dumps(written))
        functools.reduce(operator.getitem, path, document)["from_the_future"] = {"x": [1]}
        again = json.loads(kind.model_validate_json(json.dumps(document)).model_dump_json())
        expected = written if path in dropped_in(sample(kind)) else document
        assert again == expected, path
        assert kind.model_validate(document) == kind.model_validate_json(json.dumps(document))


@by_type
def test_builds_with_a_field_more_or_less_read_the_record(kind: type[StoredRecord]) -> None:
    text = sample(kind).model_dump_json()
    levels = {kind, *nested_types(kind)}
    for level in levels:
        changes: list[tuple[str | None, str | None]] = [
            (name, None) for name, field in level.model_fields.items() if not field.is_required()
        ]
        for dropped, added in [*changes, (None, "added_field")]:
            build = rebuild(kind, level, dropped, added)
            read = build.model_validate_json(text)
            assert build is not kind
            if issubclass(level, (StoredRecord, UserInput)):
                kept = json.loads(read.model_dump_json())
                assert without(kept, "added_field") == json.loads(text), (level, dropped)


def test_a_new_field_of_the_config_is_refused_from_a_person_and_kept_in_a_record() -> None:
    with pytest.raises(ValidationError, match="unknown field 'from_the_future'"):
        TrainConfig.model_validate({"from_the_future": 1})
    with pytest.raises(ValidationError, match="did you mean 'epochs'"):
        TrainConfig(epoch=3)  # type: ignore[call-arg]
    document = json.loads(sample(TrainJob).model_dump_json())
    document["config"]["from_the_future"] = 1
    job = TrainJob.model_validate_json(json.dumps(document))
    assert json.loads(job.model_dump_json())["config"]["from_the_future"] == 1
    assert TrainConfig.model_json_schema()["additionalProperties"] is False
    # Wrong values are refused there too.
    document["config"]["epochs"] = 0
    with pytest.raises(ValidationError, match="epochs"):
        TrainJob.model_validate_json(json.dumps(document))


# --- Builds that never were -------------------------------------------------------------------------------------


def objects_in(document: Any, value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where models lie in the document; `value` is the record that it was written from."""
    if isinstance(value, BaseModel):
        children = [objects_in(document[name], getattr(value, name), (*path, name)) for name in type(value).model_fields]
        return [path, *(place for child in children for place in child)]
    if isinstance(value, tuple):
        return [place for at, item in enumerate(value) for place in objects_in(document[at], item, (*path, at))]
    if isinstance(value, dict):
        return [place for name, item in value.items() for place in objects_in(document[name], item, (*path, name))]
    return []


def dropped_in(record: StoredRecord) -> list[tuple[Any, ...]]:
    """Places whose models drop what they do not know: the items of an index, of which there are many thousands."""
    document = json.loads(record.model_dump_json())
    found: list[tuple[Any, ...]] = []
    for path in objects_in(document, record):
        value: Any = record
        for step in path:
            value = value[step] if isinstance(value, (dict, tuple)) else getattr(value, step)
        if type(value).model_config.get("extra") != "allow":
            found.append(path)
    return found


def nested_types(kind: type[BaseModel]) -> set[type[BaseModel]]:
    found: set[type[BaseModel]] = set()
    for field in kind.model_fields.values():
        for part in parts_of(field.annotation):
            found |= {part, *nested_types(part)}
    return found


def parts_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and get_origin(annotation) is None:
        return [annotation]
    return [part for argument in get_args(annotation) for part in parts_of(argument)]


def rebuild(kind: type[BaseModel], target: type[BaseModel], dropped: str | None, added: str | None) -> type[BaseModel]:
    """The type as another build has it: with `target`, it or one inside it, without the field `dropped` and with the field `added`."""
    if kind is not target and target not in nested_types(kind):
        return kind
    fields: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        if kind is target and name == dropped:
            continue
        changed = FieldInfo.merge_field_infos(field, annotation=replace(field.annotation, target, dropped, added))
        fields[name] = (changed.annotation, changed)
    if kind is target and added:
        fields[added] = (str, Field(default="new"))
    if kind is target and dropped is None:
        return create_model(kind.__name__, __base__=kind, **fields)
    base = next(b for b in (StoredRecord, UserInput, BaseModel) if issubclass(kind, b))
    return create_model(kind.__name__, __base__=base, **{name: value for name, value in fields.items() if name != "schema_version"})


def replace(annotation: Any, target: type[BaseModel], dropped: str | None, added: str | None) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and get_origin(annotation) is None:
        return rebuild(annotation, target, dropped, added)
    origin: Any = get_origin(annotation)
    arguments = get_args(annotation)
    if not parts_of(annotation):
        return annotation
    changed = [argument if argument is ... else replace(argument, target, dropped, added) for argument in arguments]
    if origin in (Union, types.UnionType):
        return functools.reduce(operator.or_, changed)
    return origin[tuple(changed)]


def without(document: Any, name: str) -> Any:
    if isinstance(document, dict):
        return {key: without(value, name) for key, value in document.items() if key != name}
    return [without(item, name) for item in document] if isinstance(document, list) else document
