"""How far a staging is, and what it was, in words. Pure, and imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blocks.registering import Registered
    from blocks.staging import Counts, Staged

MOST_UNLABELLED = 0.05  # of the images: a training refuses more, unless it is told otherwise


def format_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def format_rate(size: int, seconds: float) -> str:
    return f"{format_bytes(size / max(seconds, 1e-3))}/s"


def format_eta(done: int, total: int, seconds: float) -> str:
    return f"{(total - done) * seconds / done:.0f} s" if done else "unknown"


def describe_counts(counts: Counts, seconds: float, total: int = 0) -> str:
    """The line of a staging that is under way. `total` are the bytes of the whole dataset, where they are known."""
    text = f"{counts.changed_files} files read, {format_bytes(counts.read_bytes)}, {format_rate(counts.read_bytes, seconds)}"
    eta = f", ETA {format_eta(counts.read_bytes, total, seconds)}" if total and counts.read_bytes else ""
    return f"{text}, {format_bytes(counts.sent_bytes)} sent{eta}"


def describe_staged(staged: Staged) -> str:
    reused = 1 - min(1.0, staged.sent_bytes / staged.bytes) if staged.bytes else 1.0
    return (
        f"{staged.name}: version {staged.version[:12]}, {staged.files} files, {format_bytes(staged.bytes)}; "
        f"{format_bytes(staged.sent_bytes)} sent (reused {reused:.1%}) in {staged.seconds:.1f} s"
    )


def describe_missing_labels(registered: Registered) -> str:
    """What is wrong with the labels of a registered dataset, and what to do; empty where enough images have one."""
    images, (image, label) = registered.images, registered.unlabelled
    missing = images - registered.labelled
    if missing <= MOST_UNLABELLED * images:
        return ""
    if registered.matched and registered.matched.format == "coco":
        return (
            f"{missing} of the {images} images, such as {image}, are not in the COCO file, so no training uses them. Next: add them to it"
        )
    if registered.labelled:
        text = (
            f"{missing} of the {images} images, such as {image}, have no label. A training leaves them out, and refuses a set that has "
            f"more than {MOST_UNLABELLED:.0%} of such."
        )
    else:
        text = f"none of the {images} images has a label, so there is nothing to train on."
    unread = f"{registered.unread} was not read: if it describes them in the form of COCO, all is well; else " if registered.unread else ""
    return (
        f"{text} Next: {unread}put the labels where a training looks for them ({label} for {image}; an empty one where an image shows "
        "nothing), or give a folder of them or a COCO .json with --labels, and register again"
    )
