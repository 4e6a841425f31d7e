"""The small objects of a dataset store: read and written by msgspec, whose import costs a tenth of pydantic's.

A stage of unchanged data is done in the time that pydantic's import takes. Fields that are not known are passed over: a newer
version wrote them, and each object is written as a whole.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Self

import msgspec

AwareTime = Annotated[datetime, msgspec.Meta(tz=True)]


class StoreRecord(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int = 1

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises ValueError, naming the field, for what is none."""
        return msgspec.json.decode(data, type=cls)

    def to_json(self) -> bytes:
        """For people, too."""
        return msgspec.json.format(msgspec.json.encode(self), indent=1)
