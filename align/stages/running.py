"""Running a recipe: every step in order, or one step as each process of an `accelerate launch` calls it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from align import artifacts, pipeline
from align.config import InputError, pick
from align.stages.evaluating import evaluate_policies
from align.stages.recipe import Recipe
from align.stages.rewards import train_reward_model
from align.stages.training import Context, import_policy, train
from align.train.runtime import Reporter


def run_recipe(recipe: Recipe, report: Reporter) -> dict[str, dict[str, Any]]:
    """The manifest of every step, after those that were not finished have run; also `table.json` beside them."""
    execute = _executor(recipe, report)
    made = pipeline.run(recipe.pipeline(), recipe.root, execute=execute, announce=report.note)
    artifacts.write_json(recipe.root / "table.json", table(made))
    return made


def run_step(recipe: Recipe, name: str, report: Reporter) -> None:
    """One step, whose inputs must be finished; called by every process of a launch, of which the first writes."""
    pick(recipe.steps, name, "step")
    steps = {step.name: step for step in recipe.pipeline()}
    marks = pipeline.fingerprints(list(steps.values()))
    needed = _before(steps, name)
    for other in needed:
        found = artifacts.manifest(recipe.root / other)
        if found is None or found.get("fingerprint") != marks[other]:
            raise InputError(
                f"step {name!r} needs {other!r}, which is not finished with these settings: align run first"
            )
    inputs = {other: recipe.root / other for other in steps[name].inputs}
    target = recipe.root / name
    if (artifacts.manifest(target) or {}).get("fingerprint") == marks[name]:
        report.note(f"{name}: finished before, skipped")
        return
    execute = _executor(recipe, report)
    if int(os.environ.get("RANK", "0")) == 0:
        chosen = [steps[other] for other in (*needed, name)]
        pipeline.run(chosen, recipe.root, execute=execute, announce=report.note)
    else:
        execute(steps[name], artifacts.working_folder(target), inputs)


def _executor(recipe: Recipe, report: Reporter) -> pipeline.Execute:
    def execute(step: pipeline.Step, working: Path, inputs: Mapping[str, Path]) -> Mapping[str, Any]:
        return STAGES[recipe.steps[step.name].stage](Context(recipe, step.name, working, inputs, report))

    return execute


def table(made: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Steps x evaluations: `{step: {task: {value, low, high, n}}}`."""
    rows: dict[str, dict[str, Any]] = {}
    for manifest in made.values():
        for step, scores in manifest.get("scores", {}).items():
            rows.setdefault(step, {}).update(scores)
    return rows


def _before(steps: Mapping[str, pipeline.Step], name: str) -> list[str]:
    """All steps that the step depends on, in the order given."""
    found: set[str] = set()
    waiting = list(steps[name].inputs)
    while waiting:
        other = waiting.pop()
        found.add(other)
        waiting += steps[other].inputs
    return [other for other in steps if other in found]


STAGES: dict[str, Callable[[Context], dict[str, Any]]] = {
    "import": import_policy,
    "sft": train,
    "preference": train,
    "reward_model": train_reward_model,
    "evaluate": evaluate_policies,
}
