"""What a person types and what is stored: the two kinds of value, and how each takes a field that it does not know."""

from __future__ import annotations

from typing import Any, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationInfo, model_validator

from trainer.errors import unknown_name_message

# The context of a validation of data that some version of Trainyard stored, and no person typed.
STORED: dict[str, Any] = {"stored": True}


class UserInput(BaseModel):
    """A value that a person typed: unknown fields are refused, with the nearest known name.

    Inside a stored record they are kept: a newer version wrote them, and refused what it did not know itself.
    """

    # "allow", so that kept fields are written again; `_name_unknown_fields` refuses, which the schema for forms says too.
    model_config = ConfigDict(frozen=True, extra="allow", json_schema_extra={"additionalProperties": False})

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_fields(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, dict) and info.context is not STORED:
            for key in cast("dict[Any, Any]", value):
                if key not in cls.model_fields:
                    raise ValueError(unknown_name_message("field", str(key), list(cls.model_fields)))
        return cast("Any", value)


class StoredRecord(BaseModel):
    """A value that outlives the version that wrote it: unknown fields are kept, never an error."""

    model_config = ConfigDict(frozen=True, extra="allow")
    schema_version: int = 1

    @classmethod
    def model_validate(cls, obj: Any, *, context: Any = None, **options: Any) -> Self:
        return super().model_validate(obj, context=STORED if context is None else context, **options)

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, *, context: Any = None, **options: Any) -> Self:
        return super().model_validate_json(json_data, context=STORED if context is None else context, **options)
