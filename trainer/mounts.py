"""Which objects of a bucket lie in a folder of this machine, because the platform has mounted or fetched them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from trainer.errors import ExitCode, TrainerError

ENV_MOUNTS = "TRAINYARD_MOUNTS"  # {"s3://bucket/prefix": "/folder", ...}


@dataclass(frozen=True)
class Mounts:
    """A folder for each URI. Of two that fit, the longer one counts, and of equal ones the first."""

    folders: tuple[tuple[str, Path], ...] = ()

    def find(self, uri: str) -> Path | None:
        """Where the object or the prefix lies, None where no mount has it."""
        for prefix, folder in sorted(self.folders, key=lambda pair: -len(pair[0])):
            if uri.rstrip("/") == prefix.rstrip("/") or uri.startswith(prefix if prefix.endswith("/") else f"{prefix}/"):
                names = [unquote(name) for name in uri[len(prefix) :].split("/") if name]
                return None if ".." in names else folder.joinpath(*names)
        return None

    def localize(self, uri: str) -> str:
        """The URI of the folder that has it, or the URI as it is."""
        found = self.find(uri)
        return uri if found is None else found.as_uri()

    def to_json(self) -> str:
        return json.dumps({prefix: str(folder) for prefix, folder in self.folders})


def parse_mounts(text: str, name: str) -> tuple[tuple[str, Path], ...]:
    """Mounts as a variable gives them. Raises TrainerError (CONFIG)."""
    if not text:
        return ()
    try:
        pairs = dict(json.loads(text))
    except (TypeError, ValueError):
        raise _wrong(name, '{"s3://bucket/prefix": "/folder"}') from None
    return check_mounts(pairs, name)


def parse_arguments(arguments: Iterable[str]) -> tuple[tuple[str, Path], ...]:
    """Mounts as arguments give them: URI=PATH. Raises TrainerError (CONFIG)."""
    pairs = [argument.rpartition("=") for argument in arguments]
    if not all(sign for _, sign, _ in pairs):
        raise _wrong("--mount", "s3://bucket/prefix=/folder")
    return tuple(one for uri, _, path in pairs for one in check_mounts({uri: path}, "--mount"))


def check_mounts(pairs: Mapping[str, str], name: str) -> tuple[tuple[str, Path], ...]:
    for uri, path in pairs.items():
        if not urlsplit(uri).scheme or not isinstance(path, str) or not path.startswith("/"):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise _wrong(name, "a URI and an absolute path for each mount")
    return tuple((uri, Path(path)) for uri, path in pairs.items())


def _wrong(name: str, wanted: str) -> TrainerError:
    return TrainerError(f"{name} names no mounts", hint=f"give {wanted}", code=ExitCode.CONFIG)
