"""How far a staging is, and what it was, in words. Pure, and imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blocks.counting import Counts
    from blocks.registering import Registered
    from blocks.staging import Staged

MOST_UNLABELLED = 0.05  # of the images: a training refuses more, unless it is told otherwise


def format_bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def describe_number(count: int, what: str) -> str:
    """`1 file`, `1200 files`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def format_rate(size: int, seconds: float) -> str:
    return f"{format_bytes(size / max(seconds, 1e-3))}/s"


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def format_eta(done: int, total: int, seconds: float) -> str:
    return format_seconds(max(0, total - done) * seconds / done) if done else "unknown"


def describe_counts(counts: Counts, seconds: float, total: int = 0) -> str:
    """The line of a staging that is under way. `total` are the bytes of the whole dataset, where the counts do not know them.

    "reused 99.1%": of the bytes that are in the store by now, those that it had before.
    """
    if not counts.done_files and counts.compared_bytes:
        return f"{format_bytes(counts.compared_bytes)} of {format_bytes(counts.to_compare_bytes)} in the store compared"
    total = counts.total_bytes or total
    files = f"{counts.done_files} of {counts.total_files} files" if counts.total_files else describe_number(counts.done_files, "file")
    size = format_bytes(counts.done_bytes) + (f" of {format_bytes(total)}" if total else "")
    sent = f"{format_bytes(counts.sent_bytes)} sent, {format_rate(counts.sent_bytes, seconds)}"
    eta = f", ETA {format_eta(counts.done_bytes, total, seconds)}" if total else ""
    reused = f", reused {counts.reused_bytes / counts.done_bytes:.1%}" if counts.done_bytes else ""
    return f"{files}, {size}, {sent}{eta}{reused}"


def describe_staged(staged: Staged) -> str:
    reused = 1 - min(1.0, staged.sent_bytes / staged.bytes) if staged.bytes else 1.0
    return (
        f"{staged.name}: version {staged.version[:12]}, {describe_number(staged.files, 'file')}, {format_bytes(staged.bytes)}; "
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
