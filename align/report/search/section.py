"""The trials of each search of settings: their settings, rungs, scores and costs, and who was chosen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from typing import NamedTuple

from align.report.charts import unit_of
from align.report.formatting import RATE, duration, interval_text, plain, scaled, score_text
from align.report.run_folder import Facts, Run
from align.report.tables import Cell, Table


class Search(NamedTuple):
    """A search, as the page shows it."""

    title: str
    about: str
    table: Table


def searches(runs: Mapping[str, Run]) -> Iterator[Search]:
    """Yield every search of the runs."""
    for label, run in runs.items():
        for step, found in run.search.items():
            rates = {task for task in run.tasks if unit_of(task, [run]) == RATE}
            columns, rows = trial_rows(found, rates)
            cells = [[Cell(text, "best" if row[-1] == "chosen" else "") for text in row] for row in rows]
            title = f"Search of {step}" + (f", {label}" if label else "")
            yield Search(title, summary(found, rates), Table("search", columns, cells))


def trial_rows(found: Facts, rates: Set[str]) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a search's table, and a row for each trial and rung, the best trials of each rung first.

    Scores of the tasks in `rates` are shown in percent.
    """
    keys = list(found["space"])
    is_rate = found["column"] in rates
    columns = ["trial", *keys, "optimizer steps", found["column"], "95 % interval", "FLOPs", "time", "outcome"]
    rows: list[tuple[tuple[int, bool, float, int], list[str]]] = []
    for number, trial in found["trials"].items():
        values = [_text(trial["settings"][key]) for key in keys]
        for level, rung in enumerate(trial["rungs"]):
            score = rung["score"]
            cells = [number, *values, f"{rung['optimizer_steps']:,}", score_text(score["value"], rate=is_rate)]
            cells += [interval_text(score, rate=is_rate), scaled(rung["flops"]), duration(rung["seconds"])]
            is_last = rung["diverged"] is not None or math.isnan(score["value"])
            value = 0.0 if is_last else -score["value"] if found["greater_is_better"] else score["value"]
            place = level, is_last, value, int(number)
            is_here = found.get("chosen_rung") in (None, level + 1)
            rows.append((place, [*cells, _outcome(rung, is_chosen=is_here and number == str(found["chosen"]))]))
    return columns, [cells for _, cells in sorted(rows, key=lambda row: row[0])]


def summary(found: Facts, rates: Set[str]) -> str:
    """Return one paragraph: ranges, number and cost of trials, what was chosen, and its score on other rows."""
    parts: list[str] = []
    if ranges := found.get("ranges"):
        parts.append(f"Searched: {', '.join(f'{key} ({text})' for key, text in ranges.items())}.")
    if made := [step for steps in found.get("earlier", {}).values() for step in steps]:
        parts.append(f"Made for trials, and shared by those with equal values: {', '.join(made)}.")
    parts.append(f"{len(found['trials'])} trials took {_costs(found['cost_of_trials'])}.")
    if found["chosen"] is not None:
        settings = found["trials"][str(found["chosen"])]["settings"]
        chosen = ", ".join(f"{key} {_text(value)}" for key, value in settings.items())
        parts.append(f"Trial {found['chosen']} was chosen ({chosen}): it has the best {found['column']}, which is")
        parts.append("optimistic, as the best of several.")
        if found.get("chosen_rung") is not None:
            rungs = found["trials"][str(found["chosen"])]["rungs"]
            parts.append(f"Its training stops after {rungs[found['chosen_rung'] - 1]['optimizer_steps']:,} steps.")
        elif found["cost_of_chosen"] is not None:
            parts.append(f"Its training to the end took {_costs(found['cost_of_chosen'])} more.")
        unseen = ", ".join(
            f"{column} {score_text(score['value'], rate=rate)} ({interval_text(score, rate=rate)})"
            for column, score in (found["estimate"] or {}).items()
            for rate in [column in rates]
        )
        unseen = unseen or "not evaluated; evaluate the step on a test split for an unbiased estimate"
        parts.append(f"On rows that no trial was compared on: {unseen}.")
    return " ".join(parts)


def _costs(costs: Facts) -> str:
    return f"{scaled(costs['flops'])} FLOPs and {duration(costs['seconds'])}"


def _text(value: object) -> str:
    return plain(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


def _outcome(rung: Facts, *, is_chosen: bool) -> str:
    if rung["diverged"] is not None:
        return f"dropped: {rung['diverged']}"
    if rung["goes_on"] is None:
        return "not compared yet"
    if is_chosen:
        return "chosen"
    return "promoted" if rung["goes_on"] else "dropped"
