"""The results of the searches of a run, as `search.json` holds them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from align.accounting.ledger import sum_if_known
from align.stages.evaluate import Evaluate
from align.stages.inputs.sources import SourceSettings
from align.workflow.recipe.schema import Recipe
from align.workflow.search.outcomes import COSTS, Manifests, Outcome, outcomes
from align.workflow.search.points import point
from align.workflow.search.trials import trial_name

# Settings that decide which rows `skip` and `limit` count
COUNTED = ("format", "columns", "where", "on_error", "order")
BEST_RUNG = "the best trial and rung, without further training"


def search_results(recipe: Recipe, manifests: Manifests) -> dict[str, Any]:
    """Return every search of the recipe by the name of its step: its trials by rung, their costs, and what was chosen.

    Costs are None if they are unknown. `estimate` holds the scores of the chosen policy on rows that no trial was
    compared on; it is None before the policy is evaluated on such rows.
    """
    return {name: _search(recipe, name, manifests) for name in recipe.search}


def _search(recipe: Recipe, name: str, manifests: Manifests) -> dict[str, Any]:
    search, searched = recipe.search[name], recipe.searched[name]
    base = searched.base
    found = outcomes(recipe, name, manifests)
    trials: dict[int, dict[str, Any]] = {}
    for rung, level in enumerate(found, start=1):
        is_decided = len(search.levels) > rung or search.chosen is not None
        next_level = search.levels[rung] if len(search.levels) > rung else [search.chosen] * (search.finish == "end")
        for each in level:
            trial = trials.setdefault(each.trial, {"settings": point(search, recipe.seed, each.trial), "rungs": []})
            goes_on = each.trial in next_level if is_decided else None
            trial["rungs"].append(_rung(each, trial_name(base, each.trial, rung), goes_on=goes_on))
    every = [rung for trial in trials.values() for rung in trial["rungs"]]
    is_trained_on = search.chosen is not None and search.finish == "end" and base in manifests
    return {
        **search.model_dump(mode="json", exclude={"started", "drawn"}),
        "greater_is_better": search.is_greater_better,
        "ranges": {key: each.text for key, each in search.space.items()},
        "column": recipe.metric_columns()[search.metric],
        "earlier": {str(trial): list(steps) for trial, steps in searched.earlier.items()},
        "trials": {str(number): trials[number] for number in sorted(trials)},
        "cost_of_trials": {cost: sum_if_known(rung[cost] for rung in every) for cost in COSTS},
        "cost_of_chosen": {cost: manifests[base]["ledger"][cost] for cost in COSTS} if is_trained_on else None,
        "estimate": _estimate(recipe, name, manifests) or None,
    }


def search_lines(recipe: Recipe, name: str) -> list[tuple[str, str]]:
    """Return what a search draws and compares, and which steps its trials share, as lines with a heading."""
    search, searched = recipe.search[name], recipe.searched[name]
    first = trial_name(searched.base, search.levels[0][0], 1)
    needed = recipe.ancestors(first)
    rungs = ", ".join(map(str, search.rungs))
    own = dict.fromkeys(recipe.stands_for[step] for steps in searched.earlier.values() for step in steps)
    shared = [step for step in recipe.steps if step in needed and step not in recipe.stands_for]
    return [
        *((key, each.text) for key, each in search.space.items()),
        ("compared by", f"{search.metric} of {search.evaluation}, after {rungs} optimizer steps"),
        ("becomes", "the best trial of the last rung, trained to the end" if search.finish == "end" else BEST_RUNG),
        ("trials have", ", ".join([*own, searched.base])),
        ("trials share", ", ".join(shared) or "none"),
    ]


def _rung(found: Outcome, step: str, *, goes_on: bool | None) -> dict[str, Any]:
    return {
        "step": step,
        "optimizer_steps": found.last_step,
        "score": dict(found.score),
        "diverged": found.diverged,
        "goes_on": goes_on,
        **{cost: sum_if_known([found.training[cost], found.evaluation[cost], found.earlier[cost]]) for cost in COSTS},
    }


def _estimate(recipe: Recipe, name: str, manifests: Manifests) -> dict[str, Mapping[str, Any]]:
    """Return the scores of the searched step's last policy, by column, on sources that no trial was compared on."""
    policy = recipe.expanded(name)[-1]
    compared = _sources(recipe, recipe.search[name].evaluation)
    found: dict[str, Mapping[str, Any]] = {}
    for step, manifest in manifests.items():
        for column in recipe.steps[step].columns(recipe.resolved(step)) if policy in manifest.get("scores", {}) else ():
            evaluation = recipe.steps[step]
            assert isinstance(evaluation, Evaluate)
            source = recipe.data.get(evaluation.tasks[str(column.loc[-1])].data)
            is_known = column.name in manifest["scores"][policy]
            if is_known and source is not None and not any(_share_rows(source, other) for other in compared):
                found[column.name] = manifest["scores"][policy][column.name]
    return found


def _sources(recipe: Recipe, evaluation: str) -> list[SourceSettings]:
    """Return the sources of the tasks of an evaluation."""
    steps = [recipe.steps[name] for name, (origin, *_) in recipe.written.items() if origin == evaluation]
    names = {task.data for step in steps if isinstance(step, Evaluate) for task in step.tasks.values()}
    return [recipe.data[name] for name in sorted(names) if name in recipe.data]


def _share_rows(one: SourceSettings, other: SourceSettings) -> bool:
    """Return whether two sources may have rows in common: those of one split, unless they are other parts of a file."""
    if _split(one) != _split(other):
        return False
    if one.is_procedural or any(getattr(one, name) != getattr(other, name) for name in COUNTED):
        return True
    if one.choice.seed != other.choice.seed:  # two random orders
        return True
    first, second = sorted([one, other], key=lambda source: source.skip)
    return first.limit is None or first.skip + first.limit > second.skip


def _split(source: SourceSettings) -> tuple[str, str | None]:
    """Return the file or folder that a source reads, or the kind of its generated rows, and the split."""
    is_local = not source.is_procedural and os.path.exists(source.path)
    return os.path.realpath(source.path) if is_local else source.path, source.split
