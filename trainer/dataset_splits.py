"""Make the splits that a dataset lacks: deterministic, and never with one group of images in two of them."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from pathlib import PurePosixPath
from typing import Literal

from trainer.contract import ExitCode, SplitConfig, TrainerError
from trainer.dataset_raw import SPLITS, Split, data_error

SplitSource = Literal["given", "made"]


def assign_splits(
    images: dict[str, str], given: dict[str, Split | None], config: SplitConfig, notes: list[str]
) -> tuple[dict[str, Split], dict[str, SplitSource]]:
    """Split by path, and which splits were given or made. What is missing is made from train; images of no split are train's.

    ``images`` maps the path of each usable image to the hash of its bytes; what a person should know is added to ``notes``.
    Shares are of the images that train has before. Raises TrainerError where no validation split can be made.
    """
    have: set[Split] = {split for split in given.values() if split}
    splits: dict[str, Split] = {path: split or "train" for path, split in given.items()}
    pool = {path: digest for path, digest in images.items() if splits[path] == "train"}
    sources: dict[str, SplitSource] = {"train": "given" if "train" in have else "made", **{s: "given" for s in SPLITS[1:] if s in have}}
    if images and not pool:
        raise data_error(
            f"there is no train split, only {' and '.join(sorted(have))}", "Give a train split, or the images without any split."
        )
    missing: list[tuple[Split, float]] = [("test", config.test), ("val", config.val)]
    missing = [(split, share) for split, share in missing if split not in have and (share or split == "val")]
    if not missing:
        notes += ["split.by was not used: no split had to be made."] if config.by else []
        return splits, sources
    groups = _ordered_groups(pool, config, notes)
    if "val" not in have and (not config.val or len(groups) < 2):
        raise _no_validation(len(pool), config)
    total_groups = len(groups)
    for position, (split, share) in enumerate(missing):
        taken = _take_groups(
            groups, share * len(pool), keep=len(missing) - position, at_least=1 if split == "val" or total_groups >= 3 else 0
        )
        splits.update({path: split for group in taken for path in group})
        count = sum(map(len, taken))
        if taken:
            sources[split] = "made"
        notes.append(_note_made(split, count, len(pool), config, "train" in have))
    return splits, sources


def _no_validation(count: int, config: SplitConfig) -> TrainerError:
    if not config.val:
        message, hint = "the dataset has no val split and split.val is 0", "Give a val split, or set split.val, e.g. 0.1."
    elif config.by and count > 1:
        message, hint = (
            f"split.by puts all {count} images into one group, so no val split can be made",
            "Use a pattern that tells groups apart.",
        )
    else:
        message, hint = f"no val split can be made from {count} image(s)", "Give a val split, or more images."
    return TrainerError(message, hint=hint, code=ExitCode.CONFIG if config.by or not config.val else ExitCode.DATA)


def _note_made(split: Split, count: int, total: int, config: SplitConfig, is_train_given: bool) -> str:
    if not count:
        return f"There is no {split} split: too few images or groups to make one."
    source = "the train split" if is_train_given else "all"
    how = f"{split} was made: {count} of the {total} images of {source} were set aside" + (f", grouped by {config.by}" if config.by else "")
    advice = f"Give a {split} split to use your own" + ("; split.test = 0 turns this off." if split == "test" else ".")
    return f"{how} (seed {config.seed}). {advice}"


def _ordered_groups(images: dict[str, str], config: SplitConfig, notes: list[str]) -> list[list[str]]:
    """Paths that must stay together, in the order in which groups leave train. Without a pattern only equal images are kept together."""
    groups: dict[str, list[str]] = defaultdict(list)
    first: dict[str, str] = {}
    unmatched = 0
    for path, digest in images.items():
        match = re.search(config.by, PurePosixPath(path).name) if config.by else None
        key = next((text for text in (*match.groups()[:1], match[0]) if text), "") if match else ""
        unmatched += bool(config.by and not key)
        # The two kinds of keys must never meet: a path holds no NUL.
        groups[f"\0{key}" if key else first.setdefault(digest, path)].append(path)
    if unmatched:
        notes.append(f"{unmatched} images do not match split.by ({config.by}); each is a group of its own.")
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{config.seed}:{key.lstrip(chr(0))}".encode()).hexdigest())
    return [groups[key] for key in order]


def _take_groups(groups: list[list[str]], target: float, *, keep: int, at_least: int) -> list[list[str]]:
    """Remove groups from the front while that brings the count of images nearer to the target; ``keep`` groups stay."""
    wanted, count = int(target + 0.5), 0
    taken: list[list[str]] = []
    for group in list(groups):
        if len(groups) > keep and count + len(group) / 2 <= wanted:
            taken.append(group)
            groups.remove(group)
            count += len(group)
        if count >= wanted:
            break
    if len(taken) < at_least and len(groups) > keep:
        taken.append(min(groups, key=len))
        groups.remove(taken[0])
    return taken
