"""A user's weights file, opened without running what it brings along.

A ``.pt`` is a pickle: to load one is to run it. So it is read once, what its pickle would do is rehearsed with stand-ins,
and only a file that does nothing but rebuild the parts of a YOLO model is stored in the fit's own folder. Ultralytics then
loads that copy with torch's restricted unpickler, which refuses again on its own. ``trust_weights`` skips both.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import pickle
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint import read_record
from trainer.contract import AttemptLayout, ExitCode, TrainerError
from trainer.files import write_atomic

log = logging.getLogger("trainer")

TRUST_HINT = "if you know where the file comes from, allow it with --trust-weights (trust_weights: true); else do not load it"
FILE_HINT = "give a .pt file that Ultralytics or Trainyard wrote for object detection"

# Rebuilt as objects, never called: the classes below these packages that are torch modules.
_MODULE_PACKAGES = ("torch.nn.modules", "ultralytics.nn.modules", "ultralytics.nn.tasks")
# Objects without behaviour, by the names that releases of Ultralytics and Python gave them.
_DATA = re.compile(
    r"ultralytics\.utils\.(loss|tal)\.[A-Za-z0-9]+"
    r"|torchvision\.transforms\.transforms\.(Compose|Normalize|Resize|CenterCrop|ToTensor)"
    r"|torch\.(nn\.parameter\.Parameter|[A-Z][A-Za-z0-9]*Storage|Tensor|bool|bfloat16|float(16|32|64)|u?int(8|16|32|64)|complex(64|128))"
    r"|torch\.storage\.[A-Za-z]+Storage"
    r"|builtins\.(int|float|bool|str|list|dict|tuple)"
)
# What may be called, on values from the file: each builds a value and does nothing else.
_CALLABLE = re.compile(
    r"torch\._utils\._rebuild_(parameter|parameter_with_state|tensor|tensor_v2|tensor_v3|qtensor)"
    r"|torch\.(Size|device)|torch\.serialization\._get_layout|_codecs\.encode"
    r"|numpy\.(_core|core)\.multiarray\.scalar|numpy\.dtype|numpy\.dtypes\.\w+DType"
    r"|collections\.(OrderedDict|Counter)|builtins\.(set|frozenset|slice|complex|bytearray)"
    r"|pathlib(\._local)?\.(Posix|Windows)Path|torchvision\.transforms\.functional\.InterpolationMode"
    r"|ultralytics\.(yolo\.)?utils\.IterableSimpleNamespace"
)
_GETATTR = "builtins.getattr"
# Older checkpoints hold `Detect.forward` and `InterpolationMode.BILINEAR` by way of getattr.
_ATTRIBUTES = re.compile(r"forward(_\w+)?|[A-Z]+")


@dataclass
class Rehearsal:
    """What unpickling would look up and call, found out with stand-ins: nothing of the file runs, nothing is imported."""

    names: set[str] = field(default_factory=set)
    called: set[str] = field(default_factory=set)
    attributes: set[tuple[str, str]] = field(default_factory=set)

    def play(self, data: bytes) -> None:
        """Raises whatever the standard library's unpickler raises for something that is not a pickle."""
        rehearsal = self
        stand_ins: dict[str, type] = {}

        class Unpickler(pickle.Unpickler):
            def find_class(self, module: str, name: str) -> type:
                # Python 3 writes the names of Python 2 into the protocol that torch uses: `__builtin__.set`.
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                full = f"{module}.{name}"
                rehearsal.names.add(full)
                return stand_ins.setdefault(full, make_stand_in(full, rehearsal.note_call))

            def persistent_load(self, pid: Any) -> object:
                return object()  # the bytes of a tensor

        Unpickler(io.BytesIO(data), encoding="utf-8").load()

    def note_call(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.called.add(name)
        if name == _GETATTR:
            owner, attribute = (*arguments, None, None)[:2]
            self.attributes.add((getattr(owner, "full_name", type(owner).__name__), str(attribute)))

    def find_forbidden(self) -> list[str]:
        """Names that a YOLO model has no need of, sorted; empty for a harmless file."""
        found = {name for name in self.names if not (is_model_class(name) or _DATA.fullmatch(name) or self._may_call(name))}
        found |= {f"a call of {name}" for name in self.called if not self._may_call(name)}
        for owner, attribute in self.attributes:
            if not _ATTRIBUTES.fullmatch(attribute) or not (is_model_class(owner) or owner.endswith(".InterpolationMode")):
                found.add(f"getattr({owner}, {attribute!r})")
        return sorted(found - {f"a call of {name}" for name in found})

    @staticmethod
    def _may_call(name: str) -> bool:
        return name == _GETATTR or _CALLABLE.fullmatch(name) is not None


def make_stand_in(full_name: str, note_call: Callable[[str, tuple[Any, ...]], None]) -> type:
    class Meta(type):
        def __call__(cls, *arguments: Any) -> Any:
            note_call(full_name, arguments)
            return object.__new__(cls)

    def accept(*_arguments: Any) -> None:
        """Nothing: a stand-in keeps no state."""

    def make(cls: type, *_arguments: Any, **_named: Any) -> Any:
        return object.__new__(cls)

    members = {"full_name": full_name, "__new__": make}
    return Meta(full_name, (), {**members, **dict.fromkeys(("__setstate__", "__setitem__", "append", "extend", "add"), accept)})


def is_model_class(name: str) -> bool:
    """Whether it names a torch module of torch's or Ultralytics' own, as their models are made of."""
    module, _, attribute = name.rpartition(".")
    if not any(module == package or module.startswith(f"{package}.") for package in _MODULE_PACKAGES):
        return False
    return re.fullmatch(r"(v10)?[A-Z]\w*", attribute) is not None


# --- Weights, from the user's file to the fit's copy ---------------------------------------------------


def refuse_weights(path: Path, what: str, hint: str = FILE_HINT) -> TrainerError:
    return TrainerError(f"the weights file {path} {what}", hint=hint, code=ExitCode.CONFIG)


def restrict_loading(*, restricted: bool) -> None:
    """Whether Ultralytics, in this process, loads files with torch's restricted unpickler and builds models without ``eval``."""
    import os

    from ultralytics.nn import tasks

    os.environ["ULTRALYTICS_SAFE_LOAD"] = str(restricted)  # for processes that this one starts
    tasks.SAFE_LOAD = restricted  # pyright: ignore[reportPrivateImportUsage]


def adopt_weights(path: Path, folder: Path, *, trust: bool) -> Path:
    """A copy of the weights in `folder`, the very bytes that were verified, under a name ending in ``.pt``.

    Raises TrainerError (CONFIG), naming the file, for one that is no detection model of Ultralytics, that differs from the
    sha256 recorded beside it, or, without `trust`, that would look up or call anything else than the parts of such a model.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise refuse_weights(path, f"cannot be read: {exc.strerror}", "check the path and its permissions") from exc
    refuse_changed(path, hashlib.sha256(data).hexdigest())
    if trust:
        log.warning("trust_weights: %s is loaded without restriction, and may run code", path)
    else:
        refuse_forbidden(path, data)
    copy = folder / "weights.pt"  # not the file's own name: Ultralytics replaces some, such as yolov5n.pt, by others
    write_atomic(copy, data)
    copy.chmod(0o600)
    check_model(path, copy)
    return copy


def refuse_changed(path: Path, digest: str) -> None:
    """Raises TrainerError where a Trainyard record beside the file, a manifest or a checkpoint's, gives another sha256."""
    expected: Any = None
    if record := read_record(path):
        expected = record.sha256
    elif path.as_posix().endswith(f"/{AttemptLayout.MODEL}"):
        manifest = path.parents[1] / AttemptLayout.MANIFEST
        try:
            expected = json.loads(manifest.read_bytes())["files"][AttemptLayout.MODEL]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):  # another tool's folder: nothing is known of the file
            return
    if expected is not None and expected != digest:
        what = f"changed since it was written: its sha256 is {digest[:12]}..., its record says {str(expected)[:12]}..."
        raise refuse_weights(path, what, "restore the file, or copy it elsewhere if the change is wanted")


def refuse_forbidden(path: Path, data: bytes) -> None:
    rehearsal = Rehearsal()
    try:
        rehearsal.play(read_pickle(path, data))
    except TrainerError:
        raise
    except Exception as exc:  # whatever the unpickler of an arbitrary file raises
        raise refuse_weights(path, f"is damaged, or no PyTorch checkpoint ({type(exc).__name__}: {shorten(exc)})") from exc
    forbidden = rehearsal.find_forbidden()
    if forbidden:
        named = ", ".join(forbidden[:5]) + (f" and {len(forbidden) - 5} more" if len(forbidden) > 5 else "")
        raise refuse_weights(path, f"was not loaded: it holds what is not allowed in a model: {named}", TRUST_HINT)


def read_pickle(path: Path, data: bytes) -> bytes:
    """The pickle inside, read as torch reads it, so that both see the same one."""
    import torch

    if not data.startswith(b"PK\x03\x04"):
        raise refuse_weights(path, "is no PyTorch checkpoint (it is no zip archive)")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
        if "data.pkl" not in names:
            raise refuse_weights(path, "is no PyTorch checkpoint (a zip archive without data.pkl)")
        reader = torch._C.PyTorchFileReader(io.BytesIO(data))  # pyright: ignore[reportPrivateUsage]
    except (zipfile.BadZipFile, RuntimeError) as exc:
        raise refuse_weights(path, f"is damaged or cut short ({shorten(exc)})") from exc
    if "constants.pkl" in names:
        raise refuse_weights(path, "is a TorchScript export, which cannot be trained on", "give the .pt file it was exported from")
    return reader.get_record("data.pkl")


def check_model(path: Path, copy: Path) -> None:
    """Raises TrainerError (CONFIG) where the copy of `path` does not load, or is not a detection model."""
    from ultralytics.nn.tasks import guess_model_task, torch_safe_load

    try:
        state, _ = torch_safe_load(copy)
        model = (state.get("ema") or state.get("model")) if isinstance(state, dict) else None
        task = guess_model_task(model) if hasattr(model, "yaml") else ""
    except Exception as exc:  # whatever the unpickler of an arbitrary file raises
        raise refuse_weights(path, f"is not an Ultralytics checkpoint ({shorten(exc)})") from exc
    if not task:
        raise refuse_weights(path, "holds no Ultralytics model")
    if task != "detect":
        raise refuse_weights(path, f"is a model for the task {task!r}, not for detection")


def shorten(exc: BaseException) -> str:
    return (next(iter(str(exc).splitlines()), "") or type(exc).__name__)[:200]
