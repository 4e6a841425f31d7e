"""A result that lies in a store, brought to a folder of this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blocks.credentials import AccessRef
from blocks.errors import ResultMissing
from blocks.job import Result
from trainer.errors import ExitCode, TrainerError
from trainer.store_access import access_to
from trainer.transfer import pull_files


def fetch_result(
    result: Result, attempt_uri: str, folder: Path, access: AccessRef, on_silence: Callable[[str], None] | None = None
) -> Path:
    """Its files below the folder, each held to its sha256; returns the model's. Tells and raises what `pull_files` does.

    Raises ResultMissing where the store has a file no more, or another: the record may be of before that.
    """
    try:
        with access_to(access.resolve(attempt_uri)):
            pull_files(attempt_uri, folder, result.files, on_silence=on_silence)
    except TrainerError as exc:
        if exc.code not in (ExitCode.DATA, ExitCode.NOT_FOUND):
            raise
        message = f"what the store has is not what the manifest says: {exc}"
        raise ResultMissing(message, hint=f"restore it below {attempt_uri}, or train again") from exc
    return folder / result.model_uri.removeprefix(f"{attempt_uri}/")
