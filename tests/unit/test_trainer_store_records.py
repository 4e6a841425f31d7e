"""Objects of a store outlive the version that wrote them: each is read by builds that know a field more, or a field less."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from blocks.garbage import PinFile
from blocks.leases import CollectionMark, LeaseFile
from blocks.refs import Ref
from trainer.fencing import Owner
from trainer.packs import ManifestHeader
from trainer.store_records import StoreRecord

TIME = "2026-11-23T10:00:00Z"
# As the first version wrote them, with what a reader cannot do without. A new required field breaks every store: give it a default.
FIRST: dict[type[StoreRecord], dict[str, Any]] = {
    Ref: {"version": "1f" * 32, "files": 1, "bytes": 2},
    ManifestHeader: {"version": "v", "files": 1, "bytes": 2, "packs": ["p"]},
    LeaseFile: {"dataset": "d"},
    CollectionMark: {"generation": "g", "deleting": True},
    PinFile: {"version": "v", "expires_at": TIME},
    Owner: {"token": "t", "generation": 1},
}
by_kind = pytest.mark.parametrize("kind", FIRST, ids=lambda kind: kind.__name__)


def test_every_kind_is_tried() -> None:
    assert set(StoreRecord.__subclasses__()) == set(FIRST)


@by_kind
def test_what_the_first_version_wrote_is_read(kind: type[StoreRecord]) -> None:
    record = kind.from_json(json.dumps(FIRST[kind]).encode())
    assert record.schema_version == 1
    assert kind.from_json(record.to_json()) == record


@by_kind
def test_fields_of_a_newer_version_are_passed_over(kind: type[StoreRecord]) -> None:
    known = kind.from_json(json.dumps(FIRST[kind]).encode())
    newer = {**msgspec.to_builtins(known), "schema_version": 9, "field_of_tomorrow": {"deep": [1]}}
    read = kind.from_json(json.dumps(newer).encode())
    assert read == msgspec.structs.replace(known, schema_version=9)


@by_kind
@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"null", b'{"schema_version": "one"}', b"\xff\xfe"])
def test_what_is_none_is_refused(kind: type[StoreRecord], damage: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of any wording
        kind.from_json(damage)


@by_kind
def test_a_missing_field_is_named(kind: type[StoreRecord]) -> None:
    name = next(iter(FIRST[kind]))
    with pytest.raises(ValueError, match=name):
        kind.from_json(json.dumps({key: value for key, value in FIRST[kind].items() if key != name}).encode())


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="timezone"):
        PinFile.from_json(b'{"version": "v", "expires_at": "2026-11-23T10:00:00"}')
