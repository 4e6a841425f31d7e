"""Whether the place of a run's record can be used from here: the line that every provider's check has for it."""

from __future__ import annotations

import secrets

from blocks.job import CheckLine
from trainer.contract import TrainyardError
from trainer.storage import ObjectFolder


def check_store(objects: ObjectFolder) -> CheckLine:
    """Writes a small object, once and not again, reads it, and removes it: all that a run needs of a store."""
    name, data = f".check-{secrets.token_hex(4)}", secrets.token_bytes(16)
    try:
        made, again = objects.create(name, data), objects.create(name, b"another")
        read = objects.get(name)
        objects.delete(name)
    except TrainyardError as exc:
        fix = exc.hint or "check bucket, endpoint and credentials of the profile"
        return CheckLine(name="store", ok=False, message=exc.message, fix=fix, exit_code=int(exc.code))
    if not made or again or read != data:
        fix = "use a store that honours If-None-Match: Amazon S3, MinIO, Ceph, R2, Azure Blob, Google Cloud Storage"
        return CheckLine(name="store", ok=False, message=f"{objects.uri} does not keep what was written first", fix=fix)
    return CheckLine(name="store", ok=True, message=f"{objects.uri} can be written and read")
