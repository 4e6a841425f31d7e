"""What a run says of itself, as text. Needs no Prefect: the command line and the artifacts share it."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from blocks.job import JobStatus, Plan, Result, seconds_between
from blocks.pricing import attempts_left
from blocks.record import RunFile, RunRecord
from blocks.spending import Cost, run_cost
from flows.staging_text import format_seconds
from trainer.contract import METRIC_NAMES, AttemptLayout, DatasetRef, Progress
from trainer.dataset import DatasetIndex, DatasetProblem, ProblemKind
from trainer.storage import to_path

MOST_EPOCHS_SHOWN = 200  # all of them are in progress.jsonl
TAG_PREFIXES = ("epoch ", "val mAP50 ", "test mAP50 ", "ETA ", "job: ", "cause: ", "next: ")


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
    names = {"map50": "val mAP50", "map50_95": "val mAP50-95", "precision": "precision", "recall": "recall"}
    figures = {label: round(progress.metrics[name], 3) for name, label in names.items() if name in progress.metrics}
    losses = {name: round(value, 3) for name, value in progress.losses.items()}
    return {"epoch": progress.epoch, **figures, "images/s": round(progress.images_per_second or 0), **losses}


def epoch_table(epochs: list[Progress]) -> list[dict[str, Any]]:
    """The newest epoch first, where it is seen without scrolling."""
    return [epoch_row(progress) for progress in reversed(epochs[-MOST_EPOCHS_SHOWN:])]


def best_of(epochs: list[Progress]) -> str:
    scored = [progress for progress in epochs if "map50" in progress.metrics]
    best = max(scored, key=lambda progress: progress.metrics["map50"], default=None)
    return f"best val mAP50 {best.metrics['map50']:.3f} at epoch {best.epoch}" if best else "no figures yet"


# --- Tags: the only words that Prefect shows beside a run's name, on its page and in the list of runs ---------


def running_tags(status: JobStatus) -> list[str]:
    """How far, how good, how long still."""
    progress = status.progress
    if progress is None or not progress.epoch:
        return [f"job: {status.state.value}"]
    tags = [f"epoch {progress.epoch}/{progress.epochs}"]
    tags += [f"val mAP50 {progress.metrics['map50']:.3f}"] if "map50" in progress.metrics else []
    return tags + ([f"ETA {format_seconds(progress.eta_seconds)}"] if progress.eta_seconds and not status.state.is_terminal else [])


def replace_tags(present: list[str], ours: list[str]) -> list[str]:
    """Those of the user and the deployment stay."""
    return [tag for tag in present if not tag.startswith(TAG_PREFIXES)] + ours


# --- Reports: headline, then what to do, then tables ----------------------------------------------------------


def describe_result(result: Result, cost: Cost) -> str:
    """One line: how good, where, at what cost of the whole run."""
    return (
        f"mAP50 {format_figure(result.metrics.get('map50'))} on the {result.metrics_split} split after {result.epochs} epochs,"
        f" {format_seconds(result.duration_seconds)}, cost {format_cost(*cost)}. Model: {place(result.model_uri)}"
    )


def place(uri: str) -> str:
    """A path where it is one: people paste it."""
    return str(to_path(uri)) if uri.startswith("file:") else uri


def build_running_report(run: RunFile, status: JobStatus, epochs: list[Progress], cost: Cost) -> str:
    """Pure: what the report says until there is a result."""
    lines = [
        f"# {run.name}: {describe_status(status)}",
        "",
        f"**{best_of(epochs)}**, cost so far {format_cost(*cost)}.",
        "",
        "Next: wait; this page and `training-metrics` grow with each epoch. Cancel here stops the training and keeps a checkpoint.",
        "",
        *command_lines({"Follow": f"trainyard logs -f {run.run_id}", "Stop": f"trainyard cancel {run.run_id}"}),
    ]
    return "\n".join([*lines, run_line(run)])


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a run without a result ended, for people."""

    name: str
    state: str
    cause: str
    next: str
    checkpoint: str = ""
    facts: dict[str, str]
    commands: dict[str, str]
    tags: list[str]

    @property
    def line(self) -> str:
        return f"{self.state}: {self.cause}. Next: {self.next} ({self.name})"


def ending_of(record: RunRecord, flow_run_name: str, message: str, *, cancelled: bool) -> Ending:
    """From the record; of a run that has none, since it was refused before, from the message of Prefect's state."""
    cause, _, hint = re.sub(r"^Flow run encountered an exception: (\w+: )?", "", message).partition(" Next: ")
    cause = cause.rstrip(".")
    state = "cancelled" if cancelled else "failed"
    if not record.exists():
        hint = hint or "nothing was started or spent; mend it and start again"
        tags = [f"cause: {shorten(cause)}", "next: report under Artifacts"]
        return Ending(name=flow_run_name, state=state, cause=cause, next=hint, facts={"Cost": "$0.00"}, commands={}, tags=tags)
    run, attempts, epochs = record.run(), record.attempts(), read_epochs(record)
    outcome = record.outcome(attempts[-1]) if attempts else None
    asked = record.cancel_request(attempts[-1] if attempts else 1)
    resume = f"uv run trainyard resume {run.run_id}"
    if outcome is not None and outcome.message and not cancelled:
        cause, hint = outcome.message, outcome.hint
    if cancelled:
        cause = (asked.why or f"{asked.asked_by} asked to stop it") if asked else cause or "cancelled"
    checkpoint = newest_checkpoint(record)
    go_on = f"`{resume}` goes on from the checkpoint" if checkpoint else "start it again"
    still_open = bool(attempts) and outcome is None
    if still_open:
        go_on = f"the job may still run and cost: `uv run trainyard status {run.run_id}`, `uv run trainyard cancel {run.run_id}`"
    status = outcome.status if outcome else None
    last = epochs[-1] if epochs else None
    facts = {
        "Epochs": f"{last.epoch} of {last.epochs}" if last else "0",
        "How good": best_of(epochs),
        "Cost": format_cost(*run_cost(record, attempts[-1] if attempts else 0)),
        "Time": format_seconds(seconds_between(status.started_at, status.ended_at))
        if status and status.started_at and status.ended_at
        else "-",
    }
    what = outcome.reason.value if outcome and outcome.reason and not cancelled else shorten(cause)
    tags = [f"epoch {last.epoch}/{last.epochs}"] if last else []
    tags += [f"cause: {what}", f"next: trainyard resume {run.run_id}" if checkpoint and not still_open else "next: report under Artifacts"]
    commands = {"What it did": f"uv run trainyard logs {run.run_id}"}
    hint = f"{hint}; or {go_on}" if hint and not cancelled else go_on
    return Ending(
        name=run.name,
        state=state,
        cause=cause.rstrip("."),
        next=hint,
        checkpoint=place(checkpoint) if checkpoint else "",
        facts=facts,
        commands=commands,
        tags=tags,
    )


def newest_checkpoint(record: RunRecord) -> str | None:
    """Where the last one lies that has a record, as only those are gone on from."""
    for attempt in reversed(record.attempts()):
        folder = f"attempts/{attempt}/{AttemptLayout.CHECKPOINTS}"
        names = record.folder.names(folder)
        found = sorted(name for name in names if name.endswith(".pt") and f"{name.removesuffix('.pt')}.json" in names)
        if found:
            return f"{record.uri}/{folder}/{found[-1]}"
    return None


def shorten(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def build_ending(ending: Ending) -> str:
    """Pure: the report of a run without a result."""
    facts = ending.facts
    return "\n".join(
        [
            *(f"# {ending.name}: {ending.state}", "", f"**Cause:** {ending.cause}", "", f"**Next:** {ending.next}", ""),
            *(f"Last checkpoint: {f'`{ending.checkpoint}`' if ending.checkpoint else 'none'}", ""),
            *command_lines(ending.commands),
            *(f"| {' | '.join(facts)} |", "|" + "---|" * len(facts), f"| {' | '.join(facts.values())} |", ""),
        ]
    )


def command_lines(commands: dict[str, str]) -> list[str]:
    return [*(f"- {what}: `{command}`" for what, command in commands.items()), ""] if commands else []


def run_line(run: RunFile) -> str:
    return f"Run `{run.run_id}`, owner {run.owner}, provider {run.provider}, started {run.created_at:%Y-%m-%d %H:%M} UTC."


def build_report(
    run: RunFile, result: Result, cost: Cost, index: DatasetIndex | None, source: DatasetRef | None, evaluation: dict[str, Any]
) -> str:
    """Pure: the run's report as markdown. The verdict first. `index` and `source` are missing from the records of some old runs."""
    model = shlex.quote(place(result.model_uri))
    commands = {
        "Predict": f"uv run yolo predict model={model} source=IMAGES",
        "Train on from it": f"uv run trainyard train DATASET --weights {model}",
        "All of the run": f"uv run trainyard status {run.run_id}",
    }
    lines = [
        f"# {run.name}: succeeded, mAP50 {format_figure(result.metrics.get('map50'))}",
        "",
        f"**mAP50 {format_figure(result.metrics.get('map50'))}** on the {result.metrics_split} split"
        f" (mAP50-95 {format_figure(result.metrics.get('map50_95'))}), best of {result.epochs} epochs: {result.best_epoch}."
        f" Time {format_seconds(result.duration_seconds)}, cost {format_cost(*cost)}.",
        "",
        f"Model: `{place(result.model_uri)}`",
        "",
        *command_lines(commands),
        "| " + " | ".join(METRIC_NAMES) + " | cost | time |",
        "|" + "---|" * (len(METRIC_NAMES) + 2),
        "| "
        + " | ".join(f"{result.metrics.get(name, float('nan')):.4f}" for name in METRIC_NAMES)
        + f" | {format_cost(*cost)} | {format_seconds(result.duration_seconds)} |",
        "",
    ]
    lines += class_table(evaluation)
    if index is not None:
        lines += dataset_lines(index)
    if source is not None:
        lines += source_lines(source)
    lines += ["", run_line(run)]
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


def source_lines(source: DatasetRef) -> list[str]:
    """Where the images of this version lie, and how to have them again. The version in full: it is what other runs are compared by."""
    if source.store_uri is None:
        return [f"- version `{source.version}`, read in place from `{place(source.root)}`"]
    store = place(source.store_uri)
    at = f" at {source.store_endpoint}" if source.store_endpoint else ""
    root = "" if source.root.startswith(f"{source.store_uri}#") else f", from `{place(source.root)}`"
    fetch = f"uv run trainyard dataset fetch {source.version[:12]} --store {shlex.quote(store)} --to FOLDER"
    return [f"- version `{source.version}` in the store `{store}`{at}{root}", f"- fetch it: `{fetch}`"]


def describe_worst_case(plan: Plan) -> str:
    """What a run may cost, and what that covers."""
    cost = f"at worst {format_cost(plan.worst_case_usd)}"
    if not plan.worst_case_usd:
        return cost
    count, run_time = attempts_left(plan.spec), plan.spec.max_runtime_seconds
    attempts = "one attempt" if count == 1 else f"{count} attempts"
    waits = "a wait for machines, which costs nothing where they are paid for in use, is not in it"
    if plan.attempt_seconds is not None and plan.attempt_seconds > run_time:
        waits = f"that is {format_seconds(run_time)} of run time each, and the longest wait, which costs nothing where no machine is held"
    return f"{cost} for {attempts} of {format_seconds(plan.attempt_seconds or run_time)}; {waits}"


def format_cost(usd: float | None, at_least: bool = False) -> str:
    return "unknown" if usd is None else f"{'at least ' if at_least else ''}${usd:.2f}"
