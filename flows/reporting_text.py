"""What a run says of itself, as text. Needs no Prefect: the command line and the artifacts share it."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from blocks.job import JobStatus, Result
from blocks.record import RunFile, RunRecord
from trainer.contract import METRIC_NAMES, AttemptLayout, Progress
from trainer.dataset import DatasetIndex, DatasetProblem, ProblemKind


def describe_status(status: JobStatus) -> str:
    """One line for people: state, epoch, figures, rate, time left."""
    parts = [status.state.value]
    progress = status.progress
    if progress is not None and progress.epoch:
        parts.append(f"epoch {progress.epoch}/{progress.epochs}")
        names = {"map50": "val mAP50", "map50_95": "mAP50-95"}
        parts += [f"{label} {progress.metrics[name]:.3f}" for name, label in names.items() if name in progress.metrics]
        parts += [f"{progress.images_per_second:.0f} images/s"] if progress.images_per_second else []
        parts += [f"ETA {format_seconds(progress.eta_seconds)}"] if progress.eta_seconds and not status.state.is_terminal else []
    if status.message:
        parts.append(status.message)
    return ", ".join(parts)


def format_seconds(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def read_epochs(record: RunRecord) -> list[Progress]:
    """One Progress per finished epoch over all attempts, the newest attempt's where several finished it."""
    by_epoch: dict[int, Progress] = {}
    for attempt in record.attempts():
        data = record.folder.get(f"attempts/{attempt}/{AttemptLayout.PROGRESS_LINES}") or b""
        for line in data.splitlines():
            try:
                progress = Progress.model_validate_json(line)
            except ValidationError:  # torn by a power cut or a full disk; the epochs around it are good
                continue
            by_epoch[progress.epoch] = progress
    return [by_epoch[epoch] for epoch in sorted(by_epoch)]


def epoch_row(progress: Progress) -> dict[str, Any]:
    figures = {name: round(value, 4) for name, value in {**progress.metrics, **progress.losses}.items()}
    return {"epoch": progress.epoch, **figures, "images/s": round(progress.images_per_second or 0, 1)}


def build_report(run: RunFile, result: Result, index: DatasetIndex | None, evaluation: dict[str, Any]) -> str:
    """Pure: the run's report as markdown. The verdict first."""
    lines = [
        f"# {run.name}",
        "",
        f"**mAP50 {format_figure(result.metrics.get('map50'))}** on the {result.metrics_split} split"
        f" (mAP50-95 {format_figure(result.metrics.get('map50_95'))}), best of {result.epochs} epochs: {result.best_epoch}.",
        "",
        f"Model: `{result.model_uri}`",
        "",
        "| " + " | ".join(METRIC_NAMES) + " | cost | time |",
        "|" + "---|" * (len(METRIC_NAMES) + 2),
        "| "
        + " | ".join(f"{result.metrics.get(name, float('nan')):.4f}" for name in METRIC_NAMES)
        + f" | {format_cost(result.cost_usd)} | {format_seconds(result.duration_seconds)} |",
        "",
    ]
    lines += class_table(evaluation)
    if index is not None:
        lines += dataset_lines(index)
    lines += ["", f"Run `{run.run_id}`, owner {run.owner}, provider {run.provider}, started {run.created_at:%Y-%m-%d %H:%M} UTC."]
    return "\n".join(lines)


def class_table(evaluation: dict[str, Any]) -> list[str]:
    rows = evaluation.get("classes", [])
    if not rows:
        return []
    lines = ["| class | instances | precision | recall | mAP50 | mAP50-95 |", "|---|---|---|---|---|---|"]
    for row in rows:
        figures = " | ".join(format_figure(row[name]) for name in ("precision", "recall", "map50", "map50_95"))
        lines.append(f"| {row['name']} | {row['instances']} | {figures} |")
    return [*lines, ""]


def format_figure(value: float | None) -> str:
    """A class that the split does not show has no figures."""
    return "-" if value is None else f"{value:.3f}"


def problem_line(problem: DatasetProblem) -> str:
    """Whether the image is left out, or only the box in it."""
    boxes = (ProblemKind.DEGENERATE_BOX, ProblemKind.OUT_OF_RANGE_BOX, ProblemKind.UNKNOWN_CLASS)
    what = "box left out" if problem.kind in boxes else "noted" if problem.kind is ProblemKind.DUPLICATE_IMAGE else "left out"
    return f"{what}: {problem.path}: {problem.message}"


def dataset_lines(index: DatasetIndex) -> list[str]:
    counts = ", ".join(f"{index.count(name)} {name}" for name in ("train", "val", "test"))
    lines = [f"Dataset {index.name} ({index.format}), version {index.version[:12]}: {counts} images."]
    lines += [f"- {note}" for note in index.notes]
    lines += [f"- {problem_line(problem)}" for problem in index.problems[:10]]
    lines += [f"- and {len(index.problems) - 10} more: `trainyard dataset check` lists all" for _ in range(len(index.problems) > 10)]
    return lines


def format_cost(usd: float | None) -> str:
    return "unknown" if usd is None else f"${usd:.2f}"
