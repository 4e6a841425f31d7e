"""`trainyard dataset check`: what a training would see, and what it would leave out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from trainer.contract import SplitConfig, Task

if TYPE_CHECKING:
    from trainer.dataset import DatasetIndex

SPLITS = ("train", "val", "test")


@click.command()
@click.argument("path")
@click.option("--task", type=click.Choice([task.value for task in Task]), default=Task.OBJECT_DETECTION.value, show_default=True)
@click.option("--split-by", help=r"Pattern in the file name that groups images, e.g. '^(cam\d+_\d+)'.")
@click.option(
    "--max-problem-share", type=click.FloatRange(0, 1), default=0.05, show_default=True, help="Refuse above this share of broken images."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(path: str, task: str, split_by: str | None, max_problem_share: float, as_json: bool) -> None:
    """Read the dataset at PATH (YOLO, COCO JSON or Pascal VOC), list its problems, refuse it where a training would."""
    from blocks.errors import ConfigError
    from blocks.provider import describe_validation
    from flows.display import print_table
    from flows.reporting_text import problem_line
    from flows.staging_text import describe_number
    from trainer.dataset import check_dataset

    try:
        split = SplitConfig(by=split_by)
    except ValidationError as exc:
        raise ConfigError(describe_validation(exc)) from None
    index = check_dataset(Path(path).absolute(), task=Task(task), split=split, max_problem_share=max_problem_share)
    if as_json:
        click.echo(json.dumps(describe(index)))
        return
    used = describe_number(len(index.images) + len(index.label_files), "file")
    click.echo(
        f"{index.name}: {index.format.value}, {describe_number(len(index.images), 'image')}; a training uses {used} of it, which are"
    )
    click.echo(f"version {index.version[:12]} (`dataset stage` brings all files of the folder, and tells the version of all)")
    boxes = {name: index.box_counts(name) for name in SPLITS}
    rows = [(name, *(boxes[split_name][number] for split_name in SPLITS)) for number, name in enumerate(index.classes)]
    rows.append(("images", *(index.count(name) for name in SPLITS)))
    print_table("boxes per class and split", ("class", *SPLITS), rows)
    for problem in index.problems:
        click.echo(problem_line(problem))
    for note in index.notes:
        click.echo(f"note: {note}")


def describe(index: DatasetIndex) -> dict[str, Any]:
    return {
        "name": index.name,
        "format": index.format.value,
        "used_version": index.version,
        "classes": list(index.classes),
        "images": {name: index.count(name) for name in SPLITS},
        "boxes": {name: index.box_counts(name) for name in SPLITS},
        "split_sources": index.split_sources,
        "problems": [problem.model_dump(mode="json") for problem in index.problems],
        "notes": list(index.notes),
    }
