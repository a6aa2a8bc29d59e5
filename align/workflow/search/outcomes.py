"""Outcomes of trials, from the manifests of their steps: ranking, promotion, and the cost of the search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.accounting.ledger import sum_if_known
from align.errors import InputError, RunError
from align.workflow.recipe.schema import Recipe
from align.workflow.search.settings import SearchSettings
from align.workflow.search.trials import evaluation_name, trial_name

Manifests = Mapping[str, Mapping[str, Any]]
COSTS = ("flops", "seconds", "cost")  # names in a ledger


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a trial reached at a rung, and what that rung took; costs are None if they are unknown."""

    trial: int
    score: Mapping[str, Any]  # value, low, high and n
    diverged: str | None  # why its training ended early
    first_step: int  # optimizer steps of the rung before
    last_step: int
    num_steps: int  # of the whole training
    earlier: Mapping[str, float | None]  # of the steps before the training that were made for this trial
    training: Mapping[str, float | None]
    evaluation: Mapping[str, float | None]

    def sort_key(self, *, is_greater_better: bool) -> tuple[bool, float, int]:
        """Return a key by which the best outcome comes first: trials without a value last, of equal ones the first."""
        value = float(self.score["value"]) if self.has_value else 0.0
        return not self.has_value, -value if is_greater_better else value, self.trial

    @property
    def has_value(self) -> bool:
        """Whether the trial can be chosen: its training did not diverge, and its metric is a number."""
        return self.diverged is None and not math.isnan(self.score["value"])


def trial_names(recipe: Recipe, *, decided: bool) -> set[str]:
    """Return the names of all steps of trials, or only those that no later rung can need any more.

    These are the trials of all rungs but the latest one of a search that has not ended.
    """
    found: set[str] = set()
    for name, searched in recipe.searched.items():
        search = recipe.search[name]
        is_whole = search.chosen is not None or not decided
        for rung, trials in enumerate(search.levels if is_whole else search.levels[:-1], start=1):
            found |= {trial_name(searched.base, trial, rung) for trial in trials}
        found |= {step for steps in searched.earlier.values() for step in steps if is_whole}
    return found


def check_chosen(recipe: Recipe, name: str) -> None:
    """Raise `InputError` for a step whose settings a search has yet to choose."""
    for search, searched in recipe.searched.items():
        if name in searched.waiting and recipe.search[search].chosen is None:
            raise InputError(f"step {name!r} waits for a search, which only `align run` does", ("search", search))


def outcomes(recipe: Recipe, name: str, manifests: Manifests) -> list[list[Outcome]]:
    """Return the outcomes of the finished trials of a search, by rung."""
    search = recipe.search[name]
    base = recipe.searched[name].base
    found: list[list[Outcome]] = []
    for rung, trials in enumerate(search.levels, start=1):
        names = {trial: trial_name(base, trial, rung) for trial in trials}
        asked = {trial: evaluation_name(search.evaluation, names[trial]) for trial in trials}
        steps = recipe.searched[name].earlier if rung == 1 else {}
        first = 0 if rung == 1 else search.rungs[rung - 2]
        found.append([])
        for trial in trials:
            made = (*steps.get(trial, ()), names[trial], asked[trial])
            if all(step in manifests for step in made):
                found[-1].append(_outcome(recipe, search, trial, first, [manifests[step] for step in made]))
    return found


def _outcome(
    recipe: Recipe, search: SearchSettings, trial: int, first: int, manifests: Sequence[Mapping[str, Any]]
) -> Outcome:
    """Return the outcome of a trial; `manifests` end with those of its training and of its evaluation."""
    *earlier, trained, asked = manifests
    (scores,) = asked["scores"].values()
    last = int(trained["optimizer_steps"])
    return Outcome(
        trial,
        scores.get(recipe.metric_columns()[search.metric]) or _unknown(asked, search.metric),
        trained.get("diverged"),
        min(first, last),
        last,
        int(trained["planned_steps"]),
        _costs(earlier),
        _costs([trained]),
        _costs([asked]),
    )


def _costs(manifests: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the total costs of the steps; None if a cost of one of them is unknown."""
    return {name: sum_if_known(manifest["ledger"][name] for manifest in manifests) for name in COSTS}


def _unknown(asked: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Return the score of an evaluation that has no value of a metric, with the reason."""
    measures = {f"{task}.{name}": value for task, known in asked["measures"].items() for name, value in known.items()}
    reason = measures.get(metric, {}).get("reason", f"the evaluation has no value of {metric} for its rows")
    return {"value": math.nan, "low": None, "high": None, "n": 0, "reason": reason}


def ranked(found: Sequence[Outcome], search: SearchSettings) -> list[Outcome]:
    """Return the outcomes of a rung, the best first."""
    return sorted(found, key=lambda each: each.sort_key(is_greater_better=search.is_greater_better))


def num_promoted(number: int, search: SearchSettings) -> int:
    """Return how many of `number` trials of a rung are promoted to the next one.

    >>> [num_promoted(number, SearchSettings.model_construct(halving=3.0)) for number in (1, 2, 9, 10)]
    [1, 1, 3, 3]
    """
    return max(1, int(number / search.halving))


def advanced(search: SearchSettings, found: Sequence[Sequence[Outcome]]) -> SearchSettings:
    """Return the search with its next trial, its next rung, or the chosen trial; every started trial has an outcome.

    Raises `RunError` if no trial has a value.
    """
    levels = search.levels
    last = ranked(found[-1], search)
    if len(levels) == 1 and _has_room(search, found[0]):
        return search.model_copy(update={"started": [[*levels[0], len(levels[0]) + 1]]})
    best = [each.trial for each in last if each.has_value][: num_promoted(len(levels[-1]), search)]
    if not best:
        raise RunError(f"no trial of the last rung can be chosen: {_lacking(last[0], search)}")
    if not search.is_at_end(len(best)):
        return search.model_copy(update={"started": [*levels, sorted(best)]})
    if search.finish == "end":
        return search.model_copy(update={"started": levels, "chosen": best[0]})
    every = [(each, rung) for rung, level in enumerate(found, start=1) for each in level]
    first, rung = min(every, key=lambda each: each[0].sort_key(is_greater_better=search.is_greater_better))
    return search.model_copy(update={"started": levels, "chosen": first.trial, "chosen_rung": rung})


def _lacking(found: Outcome, search: SearchSettings) -> str:
    """Return why the trial cannot be chosen."""
    if found.diverged is None and "reason" in found.score:
        return f"{search.metric} is unknown: {found.score['reason']}"
    reason = found.diverged or f"{search.metric} is {found.score['value']}"
    return f"{reason}; search lower learning rates"


def _has_room(search: SearchSettings, first: Sequence[Outcome]) -> bool:
    """Return whether the budget allows one more trial, at the mean cost of those of the first rung so far."""
    budget = search.budget
    number = len(first) + 1
    if budget.trials is not None and number > budget.trials:
        return False
    limits = {"flops": budget.flops, "cost": budget.money}
    return all(limit is None or _predicted(search, first, number, name) <= limit for name, limit in limits.items())


def _predicted(search: SearchSettings, first: Sequence[Outcome], number: int, name: str) -> float:
    """Return what a search of `number` trials will have taken at its end, with the training of the chosen one."""
    training = sum(_known(each.training, name) for each in first)
    evaluation = sum(_known(each.evaluation, name) for each in first)
    earlier = sum(_known(each.earlier, name) for each in first)
    num_steps = sum(each.last_step for each in first)  # 0 if every trial has diverged in its first step
    per_step = training / max(1, num_steps)
    end = max(each.num_steps for each in first)
    total = (training + evaluation + earlier) / len(first) * number
    trials = number
    before = min(search.rungs[0], end)
    for rung in search.rungs[1:]:
        trials = num_promoted(trials, search)
        after = min(rung, end)
        total += trials * per_step * (after - before) + (trials > 1) * trials * evaluation / len(first)
        before = after
    return total + per_step * (end - before) * (search.finish == "end")


def _known(costs: Mapping[str, float | None], name: str) -> float:
    value = costs[name]
    if value is None:
        raise RunError(f"the {name} of a trial is unknown, so it cannot be limited; give budget.trials")
    return value
