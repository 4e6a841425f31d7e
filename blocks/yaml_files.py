"""YAML that a person wrote: read, and where it is none told without its text, which may hold a secret."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import yaml

from blocks.errors import ConfigError


def read_fields(path: str, hint: str) -> dict[str, Any]:
    """The mapping that a file holds. Raises ConfigError, with that hint, where it cannot be read or holds none."""
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read {path}: {exc}", hint=hint) from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is no YAML{describe_yaml_error(exc)}", hint=hint) from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} holds no fields", hint=hint)
    return cast("dict[str, Any]", loaded)


def describe_yaml_error(exc: yaml.YAMLError) -> str:
    """Line and problem; the parser itself quotes the line."""
    mark = getattr(exc, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark is not None else ""
    return f"{where}: {getattr(exc, 'problem', None) or 'it cannot be read'}"
