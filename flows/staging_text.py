"""How far a staging is, and what it was, in words. Pure, and imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blocks.staging import Counts, Staged


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
