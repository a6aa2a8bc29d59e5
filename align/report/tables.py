"""The page's tables, as cells of text. With two runs, each step has a row of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.report.charts import all_policies, all_steps, all_tasks, unit_of
from align.report.quantities import (
    NATS,
    RATE,
    change_text,
    count,
    fixed,
    interval_text,
    plain,
    score_text,
)
from align.report.reading import BEGUN, FINISHED, FIRST, SECOND, WAITING, Facts, Run, Step

LABELS = {FIRST: "one", SECOND: "two"}
TONES = {FINISHED: "", BEGUN: "worse", WAITING: "quiet"}
READ = ("rows", "records", "trained", "held_out")
REASONS = ("dropped", "cut")  # of counts that are called `reason:why`


@dataclass(frozen=True, slots=True)
class Cell:
    """A value, with smaller lines under it; each of (text, tone)."""

    text: str = ""
    tone: str = ""
    under: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True, slots=True)
class Table:
    """Names of rows on the left, figures on the right."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: bool = False  # cells of text, on the left


def results(runs: Mapping[str, Run]) -> Table | None:
    """Policies by tasks: value, interval, change against the policy before it; the best of a task is marked."""
    tasks = all_tasks(runs.values())
    units = {task: unit_of(task, runs.values()) for task in tasks}
    best = {task: _best(task, units[task], runs.values()) for task in tasks}
    rows: list[list[Cell]] = []
    for policy in all_policies(runs.values()):
        for label, run in runs.items():
            if policy in run.table:
                beside = runs[FIRST] if label == SECOND else None
                cells = [_result(run, policy, task, unit=units[task], best=best[task], beside=beside) for task in tasks]
                rows.append([named(policy, label, *stage_of(run.step(policy))), *cells])
    return Table("results", ["policy", *tasks], rows) if rows else None


def steps(runs: Mapping[str, Run]) -> Table:
    """Every step: whether it is finished, what it trained on and where its loss went."""
    rows: list[list[Cell]] = []
    for label, step in each_step(runs):
        made, kept = step.manifest, step.manifest.get("kept") or {}
        first, last = (made.get(end) or {} for end in ("first", "last"))
        if not made and step.metrics:
            first, last = step.metrics[0], step.metrics[-1]
        loss = f"{fixed(first['loss'])} → {fixed(last['loss'])}" if "loss" in first and "loss" in last else ""
        numbers = [
            _counted(made, "rows", "trained"),
            count(made.get("optimizer_steps", last.get("step"))) if last else "",
            loss,
            *(
                fixed(kept[name]) if name in kept else ""
                for name in ("held_out/loss", "held_out/rewards/margins", "held_out/rewards/accuracies")
            ),
        ]
        state = Cell(step.state, TONES[step.state])
        rows.append([named(step.name, label, *stage_of(step)), state, *map(Cell, numbers)])
    held_out = ("held-out loss", "held-out margin", "held-out accuracy")
    return Table("steps", ["step", "state", "rows trained", "optimizer steps", "loss", *held_out], rows)


def rows_read(runs: Mapping[str, Run]) -> Table | None:
    """Rows read, dropped and cut by each step, with every reason."""
    rows: list[list[Cell]] = []
    for label, step in each_step(runs):
        counts: Mapping[str, Any] = step.manifest.get("rows") or {}
        if not counts:
            continue
        known = [Cell(count(counts[name]) if name in counts else "") for name in READ]
        given = [_reasons(counts, reason) for reason in REASONS]
        other = [
            f"{name.replace('_', ' ')} {plain(number)}"
            for name, number in counts.items()
            if name not in READ and name.partition(":")[0] not in REASONS and isinstance(number, int | float)
        ]
        rows.append([named(step.name, label), *known, *given, Cell("", under=[(text, "") for text in other])])
    kept = len(READ) + len(REASONS) + 1 + any(row[-1].under for row in rows)
    columns = ["step", "rows read", "records", "trained", "held out", "dropped", "cut", "other"]
    return Table("rows", columns[:kept], [row[:kept] for row in rows]) if rows else None


def differences(first: Run, second: Run) -> Table | None:
    """Settings in which two recipes differ."""
    one, two = dict(_leaves(first.recipe)), dict(_leaves(second.recipe))
    names = [name for name in dict.fromkeys([*one, *two]) if one.get(name) != two.get(name)]
    rows = [[Cell(name), Cell(one.get(name, "not set")), Cell(two.get(name, "not set"))] for name in names]
    return Table("differences", ["setting", "run A", "run B"], rows, words=True) if one or two else None


def reward_models(runs: Mapping[str, Run]) -> Iterator[tuple[str, Table]]:
    """What each reward model is worth on held-out rows: its attributes, and the pairs that it orders."""
    for label, step in each_step(runs):
        report: Mapping[str, Any] = step.manifest.get("report") or {}
        title = f"{step.name}, {label}" if label else step.name
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
            columns = ["attribute", "squared error", "of the mean", "correlation", "labels"]
            yield title, Table("attributes", columns, attributes)
        pairs = list(_pairs(report.get("pairs") or {}))
        if pairs:
            yield title, Table("pairs", ["pairs", "in the right order", "number"], pairs)


def _pairs(found: Facts) -> Iterator[list[Cell]]:
    named = [("all", found["all"])] if found.get("all") else []
    named += [("margin {:g} to {:g}".format(*each["margin"]), each) for each in found.get("by_margin") or ()]
    named += [(str(each["subset"]), each) for each in found.get("by_subset") or ()]
    for name, each in named:
        interval = (interval_text(each, rate=True), "")
        yield [Cell(name), Cell(score_text(each["value"], rate=True), under=[interval]), Cell(count(each.get("pairs")))]


def each_step(runs: Mapping[str, Run]) -> Iterator[tuple[str, Step]]:
    """Every step of every run, those of one name together, with the run's label."""
    for name in all_steps(runs.values()):
        for label, run in runs.items():
            if (step := run.step(name)) is not None:
                yield label, step


def named(name: str, label: str, *more: str) -> Cell:
    """The cell that a row begins with."""
    runs = [(label, LABELS[label])] if label else []
    return Cell(name, under=[*runs, *((text, "") for text in more)])


def stage_of(step: Step | None) -> list[str]:
    """A step's stage and, where it optimizes preferences, its loss."""
    loss = step.settings.get("loss") if step else None
    name: object = loss.get("name") if isinstance(loss, Mapping) else loss
    return [str(part) for part in (step.stage, name) if part] if step else []


def _best(task: str, unit: str, runs: Iterable[Run]) -> float | None:
    """The best value of the task; None where all are the same."""
    found = [scores[task]["value"] for run in runs for scores in run.table.values() if task in scores]
    if min(found) == max(found):
        return None
    return min(found) if unit == NATS else max(found)


def _result(run: Run, policy: str, task: str, *, unit: str, best: float | None, beside: Run | None) -> Cell:
    rate = unit == RATE
    score = run.table[policy].get(task)
    if score is None:
        return Cell("not evaluated", "quiet")
    under = [(interval_text(score, rate=rate), "")]
    change = run.changes.get(policy, {}).get(task)
    if change:
        moved = change_text(change["value"], rate=rate)
        interval = interval_text(change, rate=rate, signed=True)
        policies = list(run.table)
        above = policies[max(0, policies.index(policy) - 1)]
        since = f"since {change['from']}" if change.get("from", above) != above else ""
        under += [(" ".join(part for part in (moved, since) if part), _direction(change, less=unit == NATS))]
        under += [(interval, "")]
    against = (beside.table.get(policy) or {}).get(task) if beside is not None else None
    if against:
        under += [(f"B − A {change_text(score['value'] - against['value'], rate=rate)}", "")]
    tone = "best" if score["value"] == best else ""
    return Cell(score_text(score["value"], rate=rate), tone, [line for line in under if line[0]])


def _direction(change: Facts, *, less: bool) -> str:
    """Better or worse where the interval leaves no doubt."""
    low, high = change.get("low"), change.get("high")
    if low is None or high is None or low <= 0 <= high:
        return "quiet"
    return "better" if (low > 0) != less else "worse"


def _counted(made: Facts, group: str, name: str) -> str:
    found = (made.get(group) or {}).get(name)
    return "" if found is None else count(found)


def _reasons(counts: Facts, reason: str) -> Cell:
    """All that was dropped, or cut, and under it each why."""
    why = {name.partition(":")[2]: number for name, number in counts.items() if name.partition(":")[0] == reason}
    told = [(f"{name.strip()} {count(number)}", "") for name, number in why.items() if name]
    return Cell(count(sum(why.values())), "noted" if sum(why.values()) else "", told)


def _leaves(tree: Facts, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted name and value of each setting."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", str(value)
