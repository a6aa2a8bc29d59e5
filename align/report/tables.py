"""The tables of the page, as cells of text. With two runs, each step has a row for each run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from align.registry import is_in_nats
from align.report.charts import all_policies, all_steps, all_tasks, unit_of
from align.report.formatting import (
    RATE,
    change_text,
    count,
    fixed,
    interval_text,
    plain,
    scaled,
    score_text,
)
from align.report.run_folder import (
    FINISHED,
    LABELS,
    NOT_STARTED,
    RUNNING,
    THROUGHPUT,
    UNFINISHED,
    Facts,
    Run,
    Step,
)
from align.report.svg import VARIABLES

RUN_STYLES = dict(zip(LABELS, VARIABLES, strict=True))  # CSS classes of the runs' labels
STATE_STYLES = {FINISHED: "", RUNNING: "running", UNFINISHED: "worse", NOT_STARTED: "quiet"}
MIN_EPOCHS = 2  # from here on the steps table compares whole epochs
ROW_COUNTS = ("rows", "records", "trained", "held_out")
REASONS = {"dropped": "dropped", "cut": "truncated"}  # prefix of counts named `prefix:reason` -> column
HELD_OUT = {
    "held_out/loss": "held-out loss",
    "held_out/rewards/margins": "held-out margin",
    "held_out/rewards/accuracies": "held-out accuracy",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """A value with smaller lines below it, each as (text, CSS class)."""

    text: str = ""
    style: str = ""  # CSS class
    below: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """A table whose first column names its rows."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    is_text: bool = False  # left-aligned text in place of right-aligned numbers


def results_table(runs: Mapping[str, Run]) -> Table | None:
    """Return policies by tasks: score, interval and change from the previous policy, with the best score marked."""
    tasks = all_tasks(runs.values())
    units = {task: unit_of(task, runs.values()) for task in tasks}
    losses = {task for run in runs.values() for task in run.lower_is_better}
    best = {task: _best(task, runs.values(), is_loss=task in losses) for task in tasks}
    rows: list[list[Cell]] = []
    for policy in all_policies(runs.values()):
        for label, run in runs.items():
            if policy in run.table:
                first = runs[LABELS[0]] if label not in ("", LABELS[0]) else None
                cells = [
                    _result(run, policy, task, unit=units[task], best=best[task], other=first, label=label)
                    for task in tasks
                ]
                rows.append([row_name(policy, label, *stage_of(run.step(policy))), *cells])
    return Table("results", ["policy", *tasks], rows) if rows else None


def steps_table(runs: Mapping[str, Run]) -> Table:
    """Return every step with its state, training rows, optimizer steps and losses."""
    rows: list[list[Cell]] = []
    for label, step in each_step(runs):
        manifest = step.manifest
        kept = manifest.get("kept") or {}
        last = step.metrics[-1] if step.metrics else {}
        rates = [line[THROUGHPUT] for line in step.metrics if THROUGHPUT in line]
        trained = (manifest.get("rows") or {}).get("trained")
        numbers = [
            "" if trained is None else count(trained),
            count(manifest.get("optimizer_steps", last.get("step"))) if last else "",
            scaled(median(rates)) if rates else "",
            _losses(step.metrics),
            *(fixed(kept[metric]) if metric in kept else "" for metric in HELD_OUT),
        ]
        state = Cell(step.state, STATE_STYLES[step.state])
        rows.append([row_name(step.name, label, *stage_of(step)), state, *map(Cell, numbers)])
    columns = ["step", "state", "training rows", "optimizer steps", "tokens/s", "loss", *HELD_OUT.values()]
    return Table("steps", columns, rows)


def _losses(metrics: Sequence[Mapping[str, float]]) -> str:
    """Return the mean loss of the first and of the last epoch, or of the first and last tenth of a shorter training.

    The mean is weighted by prompts, so a last optimizer step of few prompts counts little.
    """
    known = [line for line in metrics if "loss" in line]
    if not known:
        return ""
    last = known[-1]
    epochs, steps = last.get("epoch", 0.0), last.get("step", float(len(known)))
    size = round(steps / epochs) if epochs >= MIN_EPOCHS else math.ceil(len(known) / 10)
    return f"{fixed(_mean_loss(known[:size]))} → {fixed(_mean_loss(known[-size:]))}"


def _mean_loss(lines: Sequence[Mapping[str, float]]) -> float:
    weights = [line.get("groups", 1.0) for line in lines]
    return math.fsum(w * line["loss"] for w, line in zip(weights, lines, strict=True)) / math.fsum(weights)


def rows_table(runs: Mapping[str, Run]) -> Table | None:
    """Return the rows that each step read, dropped and truncated, with the reasons."""
    rows: list[list[Cell]] = []
    for label, step in each_step(runs):
        counts: Mapping[str, Any] = step.manifest.get("rows") or {}
        if not counts:
            continue
        known = [Cell(count(counts[name]) if name in counts else "") for name in ROW_COUNTS]
        by_reason = [_reasons(counts, prefix) for prefix in REASONS]
        other = [
            f"{name.replace('_', ' ')} {plain(number)}"
            for name, number in counts.items()
            if name not in ROW_COUNTS and name.partition(":")[0] not in REASONS and isinstance(number, int | float)
        ]
        rows.append([row_name(step.name, label), *known, *by_reason, Cell("", below=[(text, "") for text in other])])
    columns = ["step", "rows read", "records", "training", "held out", *REASONS.values(), "other"]
    if not any(row[-1].below for row in rows):
        columns = columns[:-1]
        rows = [row[:-1] for row in rows]
    return Table("rows", columns, rows) if rows else None


def differences_table(runs: Mapping[str, Run]) -> Table | None:
    """Return the settings in which the recipes of several runs differ; None for one run, or without any recipe."""
    leaves = {label: dict(_leaves(run.recipe)) for label, run in runs.items()}
    names = dict.fromkeys(name for own in leaves.values() for name in own)
    differing = [name for name in names if len({own.get(name) for own in leaves.values()}) > 1]
    rows = [[Cell(name), *(Cell(own.get(name, "not set")) for own in leaves.values())] for name in differing]
    is_known = len(runs) > 1 and any(leaves.values())
    return Table("differences", ["setting", *runs], rows, is_text=True) if is_known else None


def measures_table(runs: Mapping[str, Run]) -> Table | None:
    """Return what evaluations measured beside their scores: a row for each policy and task."""
    found = [
        (label, policy, task, measures)
        for label, step in each_step(runs)
        for task, measures in (step.manifest.get("measures") or {}).items()
        for policy in step.manifest.get("scores") or {}
        if measures
    ]
    names = list(dict.fromkeys(name for *_, measures in found for name in measures))
    values = {name: [each[name]["value"] for *_, each in found if name in each] for name in names}
    rates = {
        name: not is_in_nats(name) and all(0 <= value <= 1 for value in values[name] if value is not None)
        for name in names
    }
    rows = [
        [row_name(policy, label, task), *(_measure(measures.get(name), rate=rates[name]) for name in names)]
        for label, policy, task, measures in found
    ]
    return Table("answers", ["policy", *(name.replace("_", " ") for name in names)], rows) if rows else None


def _measure(score: Facts | None, *, rate: bool) -> Cell:
    if score is None:
        return Cell()
    if score["value"] is None:
        return Cell(below=[(score["reason"], "")])
    if rate:
        return Cell(score_text(score["value"], rate=True), below=[(interval_text(score, rate=True), "")])
    return Cell(plain(score["value"]), below=[(f"{plain(score['low'])} to {plain(score['high'])}", "")])


def reward_model_tables(runs: Mapping[str, Run]) -> Iterator[tuple[str, str, Table]]:
    """Yield (step, heading, table) of each reward model's held-out evaluation: attributes, then pairs."""
    for label, step in each_step(runs):
        report: Mapping[str, Any] = step.manifest.get("report") or {}
        name = f"{step.name} of {label}" if label else step.name
        attributes = [
            [
                Cell(each["attribute"]),
                Cell(fixed(each["mse"])),
                Cell(fixed(each["mse_of_mean"])),
                Cell("" if each.get("pearson") is None else fixed(each["pearson"])),
                Cell(count(each.get("n"))),
            ]
            for each in report.get("attributes") or ()
        ]
        if attributes:
            columns = ["attribute", "MSE", "baseline MSE", "Pearson r", "labels"]
            yield name, "attributes of held-out responses", Table("attributes", columns, attributes)
        pairs = list(_pairs(report.get("pairs") or {}))
        if pairs:
            yield name, "accuracy on held-out pairs", Table("pairs", ["pairs", "accuracy", "count"], pairs)


def _pairs(report: Facts) -> Iterator[list[Cell]]:
    subsets = [("all", report["all"])] if report.get("all") else []
    subsets += [("margin {:.3g} to {:.3g}".format(*each["margin"]), each) for each in report.get("by_margin") or ()]
    subsets += [(str(each["subset"]), each) for each in report.get("by_subset") or ()]
    for name, each in subsets:
        interval = (interval_text(each, rate=True), "")
        yield [Cell(name), Cell(score_text(each["value"], rate=True), below=[interval]), Cell(count(each.get("pairs")))]


def each_step(runs: Mapping[str, Run]) -> Iterator[tuple[str, Step]]:
    """Yield (label, step) for every step of every run, with steps of equal name together."""
    for name in all_steps(runs.values()):
        for label, run in runs.items():
            if (step := run.step(name)) is not None:
                yield label, step


def row_name(name: str, label: str, *details: str) -> Cell:
    """Return the first cell of a row."""
    run = [(label, RUN_STYLES[label])] if label else []
    return Cell(name, below=[*run, *((text, "") for text in details)])


def stage_of(step: Step | None) -> list[str]:
    """Return a step's stage and the name of its loss, as far as they are known."""
    loss = step.settings.get("loss") if step else None
    name: object = loss.get("name") if isinstance(loss, Mapping) else loss
    return [str(part) for part in (step.stage, name) if part] if step else []


def _best(task: str, runs: Iterable[Run], *, is_loss: bool) -> float | None:
    """Return the best score of a task, or None if all are equal."""
    found = [scores[task]["value"] for run in runs for scores in run.table.values() if task in scores]
    if min(found) == max(found):
        return None
    return min(found) if is_loss else max(found)


def _result(run: Run, policy: str, task: str, *, unit: str, best: float | None, other: Run | None, label: str) -> Cell:
    rate = unit == RATE
    score = run.table[policy].get(task)
    if score is None:
        return Cell("not evaluated", "quiet")
    below = [(interval_text(score, rate=rate), "")]
    if change := run.changes.get(policy, {}).get(task):
        text = change_text(change["value"], rate=rate) + _baseline(run, policy, change)
        below += [(text, _direction(change, is_loss=task in run.lower_is_better))]
        below += [(interval_text(change, rate=rate, signed=True), "")]
    if other is not None and (of_other := (other.table.get(policy) or {}).get(task)):
        below += [(f"{label[-1]} − A {change_text(score['value'] - of_other['value'], rate=rate)}", "")]
    style = "best" if score["value"] == best else ""
    return Cell(score_text(score["value"], rate=rate), style, [line for line in below if line[0]])


def _baseline(run: Run, policy: str, change: Facts) -> str:
    """Return which policy a change is relative to, or '' for the one in the row above."""
    policies = list(run.table)
    above = policies[max(0, policies.index(policy) - 1)]
    return f" vs. {change['from']}" if change.get("from", above) != above else ""


def _direction(change: Facts, *, is_loss: bool) -> str:
    """Return "better" or "worse" where the interval excludes zero, else "quiet"."""
    low, high = change.get("low"), change.get("high")
    if low is None or high is None or low <= 0 <= high:
        return "quiet"
    return "better" if (low > 0) != is_loss else "worse"


def _reasons(counts: Facts, prefix: str) -> Cell:
    """Return the sum of the counts with a prefix, and below it the count of each reason."""
    by_reason = {name.partition(":")[2]: number for name, number in counts.items() if name.partition(":")[0] == prefix}
    below = [(f"{name.strip()} {count(number)}", "") for name, number in by_reason.items() if name]
    total = sum(by_reason.values())
    return Cell(count(total), "noted" if total else "", below)


def _leaves(tree: Facts, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the value of each setting."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", str(value)
