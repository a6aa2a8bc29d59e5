"""Results of a run: the table of policies and evaluations, and paired changes between policies."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from align.evaluation.statistics import Score, bootstrap_interval, ratio
from align.report.pareto.paired import Answers
from align.workflow.recipe.schema import Recipe

Manifests = Mapping[str, Mapping[str, Any]]


def results_table(manifests: Manifests) -> dict[str, dict[str, Any]]:
    """Return policies x evaluations: `{policy: {column: {value, low, high, n}}}`."""
    rows: dict[str, dict[str, Any]] = {}
    for manifest in manifests.values():
        for policy, scores in manifest.get("scores", {}).items():
            rows.setdefault(policy, {}).update(scores)
    return rows


class _Column(NamedTuple):
    """The verdicts of a policy's column."""

    file: Path
    part: str  # of each line
    asked: Any  # the settings of the task and of its rows


def changes(recipe: Recipe, manifests: Manifests) -> dict[str, dict[str, Any]]:
    """Return the paired change of each policy against the evaluated policy that it starts from.

    `{policy: {column: {value, low, high, n, from}}}`, with the 95 % bootstrap interval of the paired difference over
    prompts. There is no change where the two were asked different prompts, or in another way.
    """
    columns: dict[str, dict[str, _Column]] = {}
    for name, manifest in manifests.items():
        for column, (task, part) in manifest.get("columns", {}).items():
            policy = next(iter(manifest["scores"]))
            file = recipe.root / name / f"{task}.jsonl"
            asked = [each.asked for each in recipe.steps[name].columns(recipe.resolved(name)) if each.name == column]
            columns.setdefault(policy, {})[column] = _Column(file, part, asked)
    found: dict[str, dict[str, Any]] = {}
    for policy, own in columns.items():
        before = _start(recipe, policy)
        while before is not None and before not in columns:
            before = _start(recipe, before)
        if before is None:
            continue
        for column in [each for each in own if each in columns[before]]:
            then, now = columns[before][column], own[column]
            if then.asked == now.asked and (change := _change(_answers_in(then), _answers_in(now))):
                found.setdefault(policy, {})[column] = {**change, "from": before}
    return found


def _start(recipe: Recipe, policy: str) -> str | None:
    """Return the step that a policy starts from, or its copy after a search; None for a policy that no step makes."""
    start = recipe.steps[policy].start if policy in recipe.steps else None
    return next((copy for copy, trial in recipe.copies.items() if trial == start), start)


def _answers_in(column: _Column) -> Answers:
    """Return the verdicts on each prompt that has the part."""
    found = Answers(column.asked)
    for line in map(json.loads, column.file.read_text("utf-8").splitlines()):
        parts = {**line["parts"], **line.get("measures", {})}
        if column.part in parts:
            found.add(line["row"] if "row" in line else line["prompt"], *parts[column.part])
    return found


def _change(then: Answers, now: Answers) -> dict[str, Any] | None:
    """Return the paired difference with its interval; None if the prompts differ, or without any."""
    if then.prompts != now.prompts or not then.prompts:  # a calibration error has no parts
        return None
    pairs = list(zip(*(zip(each.passed, each.of, strict=True) for each in (then, now)), strict=True))
    values = np.asarray(pairs, dtype=np.float64)  # [prompts, then or now, passed or of]

    def difference(chosen: np.ndarray) -> float:
        (passed, of), (passed_now, of_now) = values[chosen].sum(axis=0)
        return ratio(float(passed_now), float(of_now)) - ratio(float(passed), float(of))

    low, high = bootstrap_interval(difference, len(values))
    return Score(difference(np.arange(len(values))), low, high, len(values))._asdict()
