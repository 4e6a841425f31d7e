"""Read an image once: hash it, decode it fully, and say how large it is as displayed."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

from PIL import Image

# Bound before Ultralytics replaces it by one that tries to install a HEIF plug-in for whatever it cannot read.
from PIL.Image import open as open_image

from trainer.dataset_raw import IMAGE_SUFFIXES

MIN_SIDE = 10  # pixels; Ultralytics drops smaller images
_PILLOW_FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")


class Decoded(NamedTuple):
    """Displayed width and height in pixels, and the bytes that were decoded."""

    width: int
    height: int
    bytes: int
    mtime_ns: int
    sha256: str


def decode_image(path: Path) -> Decoded | str:
    """Read a file once, hash it and decode it fully; or say why it cannot be used."""
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return f"{path.suffix or 'no suffix'} is not supported; use {' '.join(s[1:] for s in IMAGE_SUFFIXES)}"
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            return "it is not a regular file"
        with path.open("rb") as file:
            stat, content = os.fstat(file.fileno()), file.read()
        if not content:
            return "the file is empty"
        with open_image(io.BytesIO(content), formats=_PILLOW_FORMATS) as image:
            image.load()
            width, height = image.size
            # 5 to 8 turn the image by a quarter. Pillow itself has turned a TIFF by now, and dropped the tag.
            if image.getexif().get(0x0112) in (5, 6, 7, 8):
                width, height = height, width
    except Exception as exc:  # broken files make Pillow's plug-ins raise nearly anything
        return "it is not an image" if isinstance(exc, Image.UnidentifiedImageError) else f"{exc}" or type(exc).__name__
    if min(width, height) < MIN_SIDE:
        return f"it is {width} x {height} pixels; at least {MIN_SIDE} are needed on each side"
    return Decoded(width, height, len(content), stat.st_mtime_ns, hashlib.sha256(content).hexdigest())
