"""Searched keys: their keys in the recipe, their values in a trial, and the steps that depend on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from align.errors import ErrorList, InputError, Location, dotted_loc, within
from align.pipeline import order
from align.registry import pick
from align.stages.evaluate import Evaluate
from align.workflow.recipe.schema import Recipe, WrittenRecipe
from align.workflow.search.points import point, value_at
from align.workflow.search.settings import Range, SearchSettings

Build = Callable[[Mapping[str, Any]], Recipe]  # the recipe without searches, with values at dotted keys

LENGTHS = {"steps": 3, "data": 3, "policy": 2}  # least parts of a key of the recipe: `policy` alone is the step's
OWN = ("resume", "train.until_step", "train.on_divergence")  # keys that the search sets
ALLOWED = "steps.NAME.KEY of a step that it depends on, data.NAME.KEY or policy.KEY"
PROBES = (0.25, 0.75)  # shares of a range at which content hashes are compared


def recipe_key(name: str, key: str) -> str:
    """Return where the recipe has a searched key of the search of step `name`: a key of this step, if not its own.

    >>> recipe_key("dpo", "loss.settings.beta"), recipe_key("dpo", "data.pairs.limit"), recipe_key("dpo", "data.pairs")
    ('steps.dpo.loss.settings.beta', 'data.pairs.limit', 'steps.dpo.data.pairs')
    """
    section, *rest = key.split(".")
    return key if len(rest) + 1 >= LENGTHS.get(section, len(key) + 1) else f"steps.{name}.{key}"


def values_of(search: SearchSettings, name: str, seed: int, trial: int) -> dict[str, Any]:
    """Return the values of a trial, by their keys in the recipe."""
    return {recipe_key(name, key): value for key, value in point(search, seed, trial).items()}


def check_keys(recipe: Recipe, name: str, base: str) -> None:
    """Raise for searched keys that no trial can have values of its own for; `base` is the searched step."""
    errors = ErrorList()
    seen = set[str]()
    for key in recipe.search[name].space:
        with errors.collect(), within("search", name, "space", key):
            _check_key(recipe, name, base, key)
            if (whole := recipe_key(name, key)) in seen:
                raise InputError(f"is {whole}, which has another range already; remove one of them")
            seen.add(whole)
    errors.raise_found()


def _check_key(recipe: Recipe, name: str, base: str, key: str) -> None:
    section, part, *below = recipe_key(name, key).split(".")
    first = key.partition(".")[0]
    is_own = recipe_key(name, key) != key
    if is_own and first in WrittenRecipe.model_fields and first not in type(recipe.steps[base]).model_fields:
        raise InputError(f"a search draws no {first!r}; give a key of step {name!r}, {ALLOWED}")
    if section == "data":
        pick(recipe.data, part, "source of data")
        testing = [recipe.written[step][0] for step, each in recipe.steps.items() if part in each.tests()]
        if testing:
            raise InputError(f"step {testing[0]!r} evaluates on {part!r}, which is the same for all trials")
    if section == "steps":
        steps = {recipe.written[step][0]: each for step, each in recipe.steps.items()}
        if isinstance(pick(steps, part, "step"), Evaluate):
            raise InputError(f"step {part!r} evaluates, which is the same for all trials; give {ALLOWED}")
        if part == name and (below[0] in OWN or ".".join(below) in OWN):
            raise InputError("the search sets it itself; remove it")


def dependent(recipe: Recipe, name: str, base: str, build: Build) -> dict[str, set[str]]:
    """Return the steps that depend on each searched key by themselves: another value changes their content hash.

    Raises for a key on which nothing depends that the searched step is made from.
    """
    search = recipe.search[name]
    first = values_of(search, name, recipe.seed, 1)
    found = dict[str, set[str]]()
    errors = ErrorList()
    for written, each in search.space.items():
        key = recipe_key(name, written)
        probes = [build({**first, key: value}) for value in _probes(each)]
        hashes = [{step.name: step.key for step in probe.pipeline(str)} for probe in probes]
        names = {step for known in hashes for step in known}
        found[key] = {step for step in names if len({known.get(step) for known in hashes}) > 1}
        if not any(found[key] & {base, *probe.ancestors(base)} for probe in probes):
            message = f"changes nothing of step {name!r}, nor of a step that it depends on; give a key that does"
            errors.found.append(InputError(message, ("search", name, "space", written)))
    errors.raise_found()
    return found


def _probes(values: Range) -> list[Any]:
    return values.choices or [value_at(values, share) for share in PROBES]


def keys_by_step(recipe: Recipe, dependent: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return the searched keys that each step of a recipe depends on, directly or through the steps that it reads."""
    found: dict[str, set[str]] = {}
    for step in order(recipe.graph()):
        own = {key for key, names in dependent.items() if step.name in names}
        found[step.name] = own.union(*(found[name] for name in step.inputs))
    return found


def place(loc: Location, name: str, search: SearchSettings) -> Location:
    """Return where a search sets the setting at `loc` of a trial; `loc` itself where the search does not."""
    dotted = dotted_loc(loc)
    if dotted == f"steps.{name}.train.until_step":
        return ("search", name, "rungs")
    for written in search.space:
        key = recipe_key(name, written)
        if dotted == key or dotted.startswith(f"{key}."):
            return ("search", name, "space", written)
    return loc
