"""Trials as steps of a recipe: from the search of a step to a step for each trial and rung, and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from align.errors import ErrorList, InputError, Location, dotted_loc, within
from align.registry import pick
from align.stages.base import POLICY
from align.stages.evaluate import Evaluate
from align.stages.training.stage import TrainingStage
from align.workflow.recipe.expansion import Expanded, expand
from align.workflow.search.points import point, with_point
from align.workflow.search.settings import SearchSettings

Searches = Mapping[str, SearchSettings]


def trial_name(step: str, trial: int, rung: int) -> str:
    """Return the name of the step that trains a trial up to a rung; both are counted from 1."""
    return f"{step}-trial-{trial}-rung-{rung}"


def evaluation_name(evaluation: str, trained: str) -> str:
    """Return the name of the step that evaluates a trial, as the stage `evaluate` names its steps."""
    return f"{evaluation}-{trained}"


def expand_with_trials(
    given: Mapping[Any, Any], searches: Searches, seed: int, errors: ErrorList, broken: set[str]
) -> list[Expanded]:
    """Return the steps in the order in which they run, with the trials of each search before the step it is about.

    A step whose search has ended has the settings of the chosen trial, and resumes its training.
    """
    chosen = {name: (search, search.chosen) for name, search in searches.items() if search.chosen and name in given}
    points = {name: point(search, seed, trial) for name, (search, trial) in chosen.items()}
    given = {name: with_point(raw, points[str(name)]) if name in points else raw for name, raw in given.items()}
    placed = expand(given, errors, broken)
    if errors.found:
        return placed
    for name, search in searches.items():
        with errors.collect():
            placed = _with_trials(placed, given, name, search, seed)
        broken |= {name} if errors.found else set()
    return placed


def _with_trials(
    placed: Sequence[Expanded], given: Mapping[Any, Any], name: str, search: SearchSettings, seed: int
) -> list[Expanded]:
    """Return the steps with the trials of one search, each followed by its evaluation."""
    base, evaluation = searched_step(placed, name), _evaluation(placed, name, search)
    _check_end(base, search)
    found, taken = list[Expanded](), {each.name for each in placed}
    for rung, trials in enumerate(search.levels, start=1):
        for trial in trials:
            step = _trained(given, base, name, search, point(search, seed, trial), rung)
            resume = trial_name(base.name, trial, rung - 1) if rung > 1 else None
            trained = trial_name(base.name, trial, rung)
            asks = evaluation.step.model_copy(update={"policies": [trained], "models": []})
            found.append(base._replace(name=trained, step=step.model_copy(update={"resume": resume})))
            found.append(evaluation._replace(name=evaluation_name(search.evaluation, trained), step=asks))
    if twice := taken.intersection(each.name for each in found):
        raise InputError(f"the step {min(twice)!r} has the name of a trial; rename it", ("search", name))
    if search.chosen is not None:
        rungs = [rung for rung, trials in enumerate(search.levels, start=1) if search.chosen in trials]
        if not rungs:
            raise InputError(f"{search.chosen} is none of the trials {search.levels}", ("search", name, "chosen"))
        resume = trial_name(base.name, search.chosen, rungs[-1])
        placed = [
            each._replace(step=each.step.model_copy(update={"resume": resume})) if each is base else each
            for each in placed
        ]
    at = next(number for number, each in enumerate(placed) if each.name == base.name)
    return [*placed[:at], *found, *placed[at:]]


def searched_step(placed: Sequence[Expanded], name: str) -> Expanded:
    """Return the step that the search of `name` is about: itself, or of a step in rounds the first round."""
    loc = ("search", name)
    if "." in name:
        raise InputError("a searched step has no '.' in its name; rename it", loc)
    with within(*loc):
        pick({each.origin: each for each in placed}, name, "step")
    own = [each for each in placed if each.origin == name and isinstance(each.step, TrainingStage)]
    if not own or own[0].step.makes != POLICY:
        raise InputError("a search is for a step that trains a policy: sft or preference", loc)
    return own[0]


def _check_end(base: Expanded, search: SearchSettings) -> None:
    """Raise where the searched step stops before the last rung, whose checkpoint it would resume."""
    assert isinstance(base.step, TrainingStage)
    until = base.step.train.until_step
    if until is not None and until < search.rungs[-1]:
        message = f"the last rung is {search.rungs[-1]}, and the step stops after {until}: train.until_step"
        raise InputError(message, ("search", base.origin, "rungs"))


def _evaluation(placed: Sequence[Expanded], name: str, search: SearchSettings) -> Expanded:
    """Return a step of the evaluation that compares the trials."""
    found = {each.origin: each for each in placed if isinstance(each.step, Evaluate)}
    with within("search", name, "evaluation"):
        return pick(found, search.evaluation, "step with stage: evaluate")


def _trained(
    given: Mapping[Any, Any], base: Expanded, name: str, search: SearchSettings, values: Mapping[str, Any], rung: int
) -> TrainingStage:
    """Return the searched step with the settings of a trial, up to a rung, in place of the written ones."""
    if rung > len(search.rungs):
        raise InputError(f"names {rung} rungs of {len(search.rungs)}", ("search", name, "started"))
    stops = {"train.until_step": search.rungs[rung - 1], "train.on_divergence": "stop"}
    errors = ErrorList()
    raw = with_point(given[name], {**values, **stops})
    placed = expand({**given, name: raw}, errors, set())
    for error in errors.found:
        error.loc = _place(error.loc, name, search)
    errors.raise_found()
    step = next(each.step for each in placed if each.name == base.name)
    assert isinstance(step, TrainingStage)
    return step


def _place(loc: Location, name: str, search: SearchSettings) -> Location:
    """Return where a search sets a setting of a trial."""
    below = dotted_loc(loc[2:])
    if below == "train.until_step":
        return ("search", name, "rungs")
    key = next((key for key in search.space if below == key or below.startswith(f"{key}.")), None)
    return loc if key is None else ("search", name, "space", key)
